// Where wgmma finds the elements of its operands in shared memory, and which thread holds which
// element of the accumulators and of an A operand in registers (PTX ISA: "Asynchronous Warpgroup
// Level Matrix Instructions", matrix fragments and shared memory layout). Tiles are as TMA writes
// them with its 128-byte swizzle: consecutive rows of 128 bytes, eight rows a pattern of 1024
// bytes, in which the 16-byte chunks of row r are stored at chunk ^ (r % 8).
#pragma once

#include "host_device.h"

namespace mmalign {

constexpr int kSwizzleBytes = 128;    // of a row of a tile
constexpr int kPatternBytes = 1024;   // alignment of a tile, and bytes of eight of its rows
constexpr int kWarpgroup = 128;       // threads that run one wgmma
constexpr int kWarpgroupRows = 64;    // of the product

// Byte of a tile's element in shared memory; the tile begins at a multiple of 1024.
HOST_DEVICE uint32_t swizzled(uint32_t row, uint32_t byte_of_row) {
  const uint32_t chunk = (byte_of_row / 16) ^ (row % 8);
  return row * kSwizzleBytes + chunk * 16 + byte_of_row % 16;
}

// wgmma's descriptor of an operand in shared memory. stride_bytes: from eight rows to the next
// eight (kPatternBytes). leading_bytes: only for an operand that is transposed on the way, whose
// rows lie in several tiles of 128 bytes: from one tile to the next.
HOST_DEVICE uint64_t matrix_descriptor(uint32_t shared_address, uint32_t stride_bytes,
                                       uint32_t leading_bytes = 16) {
  constexpr uint64_t kSwizzle128 = 1;
  uint64_t descriptor = (shared_address & 0x3FFFF) >> 4;
  descriptor |= static_cast<uint64_t>((leading_bytes & 0x3FFFF) >> 4) << 16;
  descriptor |= static_cast<uint64_t>((stride_bytes & 0x3FFFF) >> 4) << 32;
  return descriptor | kSwizzle128 << 62;
}

// The same operand `bytes` further in shared memory: 32 bytes are 16 columns of a row of 16-bit
// elements, 8 * 1024 bytes 64 rows. Steps inside a pattern are those before the swizzle.
HOST_DEVICE uint64_t advance(uint64_t descriptor, uint32_t bytes) {
  return descriptor + (bytes >> 4);
}

// Element i of a thread's accumulators: its row of 64 and its column. thread: of the warpgroup.
HOST_DEVICE int accumulator_row(int thread, int i) {
  return thread / 32 * 16 + thread % 32 / 4 + i / 2 % 2 * 8;
}
HOST_DEVICE int accumulator_column(int thread, int i) { return i / 4 * 8 + thread % 4 * 2 + i % 2; }

// Element i (of 8) of a thread's A operand in registers, 64 rows of 16 columns; registers hold two.
HOST_DEVICE int operand_row(int thread, int i) { return accumulator_row(thread, i); }
HOST_DEVICE int operand_column(int thread, int i) { return accumulator_column(thread, i); }

}  // namespace mmalign
