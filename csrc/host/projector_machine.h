// What the projector's kernel takes from CUDA, common.cuh and hopper.cuh, on the host; to include
// before projector_product.cuh. All threads of a cluster are fibers of one HostBlock, and each of
// its blocks has a stretch of the shared memory.
#pragma once

#include <map>

#include "../row_threads.h"
#include "attention_machine.h"

#define __device__
#define __forceinline__ inline
#define __CUDA_ARCH_FEAT_SM90_ALL

struct float2 {
  float x, y;
};
struct uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }

namespace mmalign {

using CUtensorMap = HostTensor;

class HostCluster {
 public:
  HostCluster(int num_blocks, int threads, int bytes, int index, int clusters, uint32_t seed)
      : size(num_blocks), threads(threads), stride(ceil_div(bytes, kPatternBytes) * kPatternBytes),
        index(index), clusters(clusters), block(num_blocks * threads, num_blocks * stride, seed),
        machines_(num_blocks * threads) {}

  const int size, threads, stride, index, clusters;
  HostBlock block;
  static inline HostCluster* running;

  // body(shared memory of the block), in every thread of every block.
  template <class Body>
  void run(Body body) {
    running = this;
    block.run([&](int thread) {
      const int begin = thread / threads * stride;
      HostMachine machine(block, thread, no_tensors_, 0, begin);
      machines_[thread] = &machine;
      body(block.shared() + begin);
    });
  }
  int thread() const { return block.current(); }
  int rank() const { return thread() / threads; }
  HostMachine& machine() { return *machines_[thread()]; }
  void warp_sync() { block.warp_sync(thread()); }

  int offset(const void* shared) const {
    return static_cast<int>(static_cast<const char*>(shared) - block.shared());
  }
  template <class X>
  X* in_block(X* shared, int to) {
    return reinterpret_cast<X*>(block.shared() + offset(shared) % stride + to * stride);
  }
  void add_barrier(uint64_t* barrier, int arrivals) {
    numbers_.emplace(barrier, static_cast<int>(numbers_.size()));
    block.add_barrier(arrivals);
  }
  int number(uint64_t* barrier) const { return numbers_.at(barrier); }

 private:
  const std::vector<HostTensor> no_tensors_;
  std::vector<HostMachine*> machines_;
  std::map<uint64_t*, int> numbers_;
};

inline HostCluster& host() { return *HostCluster::running; }

// -- CUDA

struct ThreadIndex {
  struct { operator unsigned() const { return host().thread() % host().threads; } } x;
};
struct BlockIndex {
  struct { operator unsigned() const { return host().index * host().size + host().rank(); } } x;
};
struct GridSize {
  struct { operator unsigned() const { return host().clusters * host().size; } } x;
};
static const ThreadIndex threadIdx{};
static const BlockIndex blockIdx{};
static const GridSize gridDim{};

inline void __syncthreads() { host().block.sync(host().rank(), host().threads); }
inline void __syncwarp() { host().warp_sync(); }
template <class X>
X __shfl_xor_sync(unsigned, X x, int with) {
  return bits_as<X>(host().machine().quad_exchange(bits_as<uint32_t>(x), with));
}
template <class X>
X __shfl_sync(unsigned, X x, int from) {
  HostBlock& block = host().block;
  const int thread = host().thread();
  block.workspace(thread) = &x;
  block.warp_sync(thread);
  const X theirs = *static_cast<const X*>(block.workspace(thread / kWarp * kWarp + from));
  block.warp_sync(thread);
  return theirs;
}
template <class X>
X __ldg(const X* from) { return *from; }
inline unsigned atomicAdd(unsigned* to, unsigned x) { return (*to += x) - x; }
inline void atomicOr(uint32_t* to, uint32_t x) { *to |= x; }
inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
[[noreturn]] inline void __trap() { std::abort(); }

// -- common.cuh, for bf16

struct Bf16 {
  uint16_t bits;
};
using Packed = uint4;
template <class T>
struct Vector {
  static constexpr int kLanes = kVectorBytes / sizeof(T);
  T lanes[kLanes];
};
inline float upcast(Bf16 x) { return bits_as<float>(uint32_t{x.bits} << 16); }
template <class T>
T narrow(float x) { return {static_cast<uint16_t>(HostBf16::round(x))}; }
template <class T>
Vector<T> unpack(const Packed& packed) { return bits_as<Vector<T>>(packed); }
inline uint32_t pack(float x, float y, Bf16) { return HostBf16::pack(x, y); }
inline float2 unpack_two(uint32_t two, Bf16) {
  float both[2];
  HostBf16::unpack(two, both);
  return {both[0], both[1]};
}
template <class T>
Packed load_shared_by_all(const T* at, bool inside) {
  Packed packed = {};
  if (inside) memcpy(&packed, at, sizeof(packed));
  return packed;
}
template <class T>
void store(T* at, const Packed& packed) { memcpy(at, &packed, sizeof(packed)); }
template <class X>
X warp_sum(X x) {
  for (int step = kWarp / 2; step > 0; step /= 2) x += __shfl_xor_sync(~0u, x, step);
  return x;
}

// -- hopper.cuh

inline uint32_t shared_address(const void* shared) { return host().offset(shared) % host().stride; }
inline void barrier_init(uint64_t* barrier, int arrivals) { host().add_barrier(barrier, arrivals); }
inline void barrier_init_fence() {}
inline void barrier_arrive(uint64_t* barrier) { host().block.arrive(host().number(barrier)); }
inline void barrier_arrive_expect(uint64_t* barrier, int bytes) {
  host().block.arrive(host().number(barrier), bytes);
}
inline void barrier_arrive_remote(uint64_t* barrier, int rank) {
  barrier_arrive(host().in_block(barrier, rank));
}
template <bool kCluster = false>
void barrier_wait(uint64_t* barrier, uint32_t parity) {
  host().block.wait(host().number(barrier), parity);
}
inline void tensor_load(void* to, const CUtensorMap* map, uint64_t* barrier, int column, int row) {
  host().block.copy_later(*map, host().number(barrier), host().offset(to), column, row);
}
inline void tensor_load_multicast(char* to, const CUtensorMap* map, uint64_t* barrier, int column,
                                  int row, uint16_t ranks) {
  for (int rank = 0; rank < host().size; ++rank)
    if (ranks >> rank & 1)
      tensor_load(host().in_block(to, rank), map, host().in_block(barrier, rank), column, row);
}
inline void store_remote(float2* to, uint64_t* barrier, int rank, float2 value) {
  HostBlock& block = host().block;
  const int number = host().number(host().in_block(barrier, rank));
  block.later([&block, number, value, to = host().in_block(to, rank)] {
    *to = value;
    block.complete(number, sizeof(value));
  });
}
inline int cluster_rank() { return host().rank(); }
inline int cluster_size() { return host().size; }
inline int cluster_index() { return host().index; }
inline int num_clusters() { return host().clusters; }
inline void cluster_sync() { host().block.sync(15, host().size * host().threads); }
inline int thread_of_warpgroup() { return host().machine().thread(); }
template <int kRegisters>
void take_registers() {}
template <int kRegisters>
void give_registers() {}

// -- wgmma.cuh

template <class T, int N>
struct Wgmma {
  static void run(float (&sums)[N / 2], uint64_t a, uint64_t b, bool adds) {
    host().machine().multiply(sums, a, b, adds);
  }
};
inline void wgmma_fence() {}
inline void wgmma_commit() { host().machine().commit(); }
template <int kPending>
void wgmma_wait() { host().machine().wait_products<kPending>(); }
template <int kCount>
void hold(float (&)[kCount]) {}

}  // namespace mmalign
