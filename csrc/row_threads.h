// How threads share the rows of a matrix, and the shared memory of rms_norm_bwd, for the host.
#pragma once

#include <cstddef>

#include "host_device.h"

namespace mmalign {

constexpr int kWarp = 32;
constexpr int kVectorBytes = 16;      // the widest access of a thread
constexpr int kVectors = 4;           // of a row in a thread's registers: 64 bytes in flight
constexpr int kMaxRowThreads = 512;   // more would leave a thread fewer than 128 registers
constexpr int kMinBlockThreads = 128;
constexpr int kMaxStages = 3;  // tiles of rms_norm_bwd in shared memory: one in use, two in flight

struct RowThreads {
  int per_row, rows;
  int total() const { return per_row * rows; }
};

// The threads of a block; a vector is `lanes` columns.
inline RowThreads row_threads(int64_t columns, int lanes) {
  const auto threads = static_cast<int>(
      ceil_div<int64_t>(ceil_div<int64_t>(columns, kVectors * lanes), kWarp) * kWarp);
  return {threads, threads >= kMinBlockThreads ? 1 : kMinBlockThreads / threads};
}

// Dynamic shared memory of rms_norm_bwd: `tensors` tiles per stage.
inline size_t stages_bytes(int stages, int tensors, int num_threads) {
  return static_cast<size_t>(stages) * tensors * kVectors * num_threads * kVectorBytes;
}

// As many stages as leave room for two blocks on a multiprocessor, or else for one.
inline int choose_stages(int tensors, int num_threads, size_t per_multiprocessor,
                         size_t per_block) {
  constexpr size_t kReserved = 2048;  // of the system and of static variables, a block
  for (int stages = kMaxStages; stages > 1; --stages)
    if (2 * (stages_bytes(stages, tensors, num_threads) + kReserved) <= per_multiprocessor)
      return stages;
  return stages_bytes(2, tensors, num_threads) + kReserved <= per_block ? 2 : 1;
}

// Whether a launch sets cudaFuncAttributeMaxDynamicSharedMemorySize. The 48 KiB that need no opt-in
// are static and dynamic memory together, so no threshold on the dynamic part alone is right.
inline bool opts_in(size_t dynamic_bytes) { return dynamic_bytes > 0; }

}  // namespace mmalign
