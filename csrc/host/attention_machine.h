// A Hopper block on the host: runs the threads of attention_block.h as fibers, in an order drawn at
// random, and finds what goes wrong between them.
//
// Copies arrive at any time later. A product is computed only when it is waited for, from what
// shared memory and registers hold then, by the addresses that the PTX ISA gives for its
// descriptors: what is overwritten too early or read too late shows in the result. Shared memory
// begins as NaN. Threads that wait for each other forever are an error.
#pragma once

#include <ucontext.h>

#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#include "../attention_block.h"

namespace mmalign {

struct HostBf16 {
  static void unpack(uint32_t word, float (&x)[2]) {
    x[0] = bits_as<float>(word << 16);
    x[1] = bits_as<float>(word & 0xffff0000u);
  }
  static uint32_t round(float x) {
    const auto bits = bits_as<uint32_t>(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  }
  static uint32_t pack(float low, float high) { return round(low) | round(high) << 16; }
};

// A matrix in global memory, rows without a gap.
struct HostTensor {
  const uint16_t* data;
  int rows, columns;
};

class HostBlock {
 public:
  HostBlock(int num_threads, int shared_bytes, uint32_t seed)
      : random_(seed), memory_(shared_bytes + kPatternBytes, '\xff'), threads_(num_threads),
        warps_(num_threads / 32), rooms_(num_threads) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    shared_ = memory_.data() + (kPatternBytes - address % kPatternBytes) % kPatternBytes;
  }

  char* shared() const { return shared_; }

  // Runs body(thread) for all threads to the end.
  void run(std::function<void(int)> body) {
    body_ = std::move(body);
    for (Fiber& fiber : threads_) start(fiber);
    size_t done = 0;
    for (int idle = 0; done < threads_.size(); ++idle) {
      if (idle > 300) throw std::runtime_error("all threads wait");
      progress_ = false;
      deliver_some();
      done = 0;
      for (size_t warp = 0; warp < warps_.size(); ++warp) {
        const bool sleeps = random_() % 3 == 0;
        for (size_t i = warp * 32; i < warp * 32 + 32; ++i) {
          current_ = static_cast<int>(i);
          if (!sleeps && !threads_[i].done) swapcontext(&scheduler_, &threads_[i].context);
          if (!failure_.empty()) throw std::runtime_error(failure_);
          done += threads_[i].done;
        }
      }
      if (progress_) idle = 0;
    }
  }

  template <class Condition>
  void wait_until(Condition condition) {
    while (!condition()) swapcontext(&threads_[current_].context, &scheduler_);
    progress_ = true;
  }

  // -- mbarriers
  void add_barrier(int arrivals) { barriers_.push_back({arrivals, arrivals, 0, 0}); }
  void wait(int number, uint32_t parity) {
    wait_until([&] { return (barriers_[number].phase & 1) != parity; });
  }
  void arrive(int number, int64_t bytes = 0) {
    Barrier& barrier = barriers_[number];
    if (barrier.pending-- == 0) fail("more arrivals than expected");
    barrier.bytes += bytes;
    settle(barrier);
  }

  // -- named barriers, also those of warps
  void sync(int number, int num_threads) {
    Meeting& meeting = meetings_[number];
    const int generation = meeting.generation;
    come(meeting, num_threads);
    wait_until([&] { return meeting.generation != generation; });
  }
  void come_to(int number, int num_threads) { come(meetings_[number], num_threads); }
  void warp_sync(int thread) {
    Meeting& meeting = warps_[thread / 32];
    const int generation = meeting.generation;
    come(meeting, 32);
    wait_until([&] { return meeting.generation != generation; });
  }

  // What a thread lays out for its warp.
  const void*& room(int thread) { return rooms_[thread]; }

  // A box of 128 rows of 128 bytes, swizzled; zeros outside the tensor.
  void copy_later(const HostTensor& tensor, int barrier, int to, int column, int row) {
    copies_.push_back([=] {
      for (int r = 0; r < kKeyRows; ++r)
        for (int c = 0; c < kBoxColumns; ++c) {
          const bool inside = row + r < tensor.rows && column + c < tensor.columns;
          const uint16_t value =
              inside ? tensor.data[int64_t{row + r} * tensor.columns + column + c] : 0;
          memcpy(shared_ + swizzle(to + r * 128 + c * 2), &value, 2);
        }
      barriers_[barrier].bytes -= kKeyRows * 128;
      settle(barriers_[barrier]);
    });
  }

  static uint32_t swizzle(uint32_t address) { return address ^ (address >> 7 & 7) << 4; }

 private:
  struct Barrier {
    int expected, pending;
    int64_t bytes;
    uint32_t phase;
  };
  struct Meeting {
    int here = 0, generation = 0;
  };
  struct Fiber {
    ucontext_t context;
    std::unique_ptr<char[]> stack;
    bool done = false;
  };
  static constexpr size_t kStackBytes = 128 << 10;

  void fail(const char* why) { failure_ = why; }

  void settle(Barrier& barrier) {
    progress_ = true;
    if (barrier.pending || barrier.bytes) return;
    ++barrier.phase;
    barrier.pending = barrier.expected;
  }

  void come(Meeting& meeting, int num_threads) {
    progress_ = true;
    if (++meeting.here < num_threads) return;
    meeting.here = 0;
    ++meeting.generation;
  }

  void deliver_some() {
    std::vector<std::function<void()>> later;
    for (auto& copy : copies_)
      if (random_() % 4 == 0)
        copy();
      else
        later.push_back(std::move(copy));
    copies_ = std::move(later);
    progress_ |= !copies_.empty();
  }

  static void enter(unsigned low, unsigned high) {
    auto* block = reinterpret_cast<HostBlock*>(uint64_t{high} << 32 | low);
    const int thread = block->current_;
    block->body_(thread);
    block->progress_ = block->threads_[thread].done = true;
    swapcontext(&block->threads_[thread].context, &block->scheduler_);
  }

  void start(Fiber& fiber) {
    fiber.stack.reset(new char[kStackBytes]);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    const auto self = reinterpret_cast<uint64_t>(this);
    makecontext(&fiber.context, reinterpret_cast<void (*)()>(&HostBlock::enter), 2,
                static_cast<unsigned>(self), static_cast<unsigned>(self >> 32));
  }

  std::mt19937 random_;
  std::vector<char> memory_;
  char* shared_;
  std::vector<Fiber> threads_;
  std::vector<Meeting> warps_;
  std::vector<const void*> rooms_;
  std::vector<Barrier> barriers_;
  Meeting meetings_[16];
  std::vector<std::function<void()>> copies_;
  std::function<void(int)> body_;
  ucontext_t scheduler_;
  int current_ = 0;
  bool progress_ = false;
  std::string failure_;
};

// The machine of attention_block.h: what one thread of a HostBlock calls.
class HostMachine {
 public:
  using Element = HostBf16;

  HostMachine(HostBlock& block, int thread_of_block, HostTensor projection, HostTensor turned_keys,
              int num_workers)
      : block_(block), id_(thread_of_block), projection_(projection), turned_keys_(turned_keys),
        num_workers_(num_workers) {}

  int group() const { return id_ / kWarpgroup - 1; }
  int thread() const { return id_ % kWarpgroup; }
  int lane() const { return id_ % 32; }
  template <class X>
  X* at(int byte) const {
    return reinterpret_cast<X*>(block_.shared() + byte);
  }
  uint32_t address(int byte) const { return byte; }

  void wait(int number, uint32_t parity) { block_.wait(number, parity); }
  void arrive(int number) { block_.arrive(number); }
  void expect(int number, int bytes) { block_.arrive(number, bytes); }
  void warp_arrive(int number) {
    block_.warp_sync(id_);
    if (lane() == 0) arrive(number);
  }
  void group_sync() { block_.sync(3 + group(), kWarpgroup); }
  void wait_turn() { block_.sync(1 + group(), 2 * kWarpgroup); }
  void pass_turn() { block_.come_to(2 - group(), 2 * kWarpgroup); }

  // Workers take turns here; on a GPU whoever is free takes the next item.
  int take_item(int* counter) {
    const int item = *counter;
    *counter += num_workers_;
    return item;
  }
  void load_box(Tensors tensor, int number, int to, int column, int row) {
    const HostTensor& from = tensor == Tensors::kProjection ? projection_ : turned_keys_;
    block_.copy_later(from, number, to, column, row);
  }
  int load_index(const int* from) const { return *from; }
  Angles load_angles(const float* from) const {
    Angles angles;
    memcpy(angles.values, from, sizeof(angles));
    return angles;
  }
  void writes_to_async() {}
  void store_chunk(void* to, int64_t element, const Chunk& chunk) {
    memcpy(static_cast<uint16_t*>(to) + element, &chunk, sizeof(chunk));
  }

  template <class... Registers>
  void fence(Registers&...) {}
  template <int kCount>
  void multiply(float (&sums)[kCount], uint64_t a, uint64_t b, bool adds) {
    open_.push_back({sums, kCount, nullptr, a, b, adds});
  }
  template <int kCount>
  void multiply_transposed(float (&sums)[kCount], const uint32_t (&a)[4], uint64_t b) {
    open_.push_back({sums, kCount, a, 0, b, true});
  }
  void commit() {
    committed_.push_back(open_);
    open_.clear();
  }
  template <int kPending, class... Registers>
  void wait_products(Registers&...) {
    for (; committed_.size() > kPending; committed_.erase(committed_.begin()))
      for (const Product& product : committed_.front()) compute(product);
  }

  uint32_t quad_exchange(uint32_t word, int with) { return exchange(word, with); }
  float quad_max(float x) {
    x = std::fmax(x, exchange(x, 1));
    return std::fmax(x, exchange(x, 2));
  }
  float quad_sum(float x) {
    x += exchange(x, 1);
    return x + exchange(x, 2);
  }
  static float exp2(float x) { return std::exp2(x); }
  static float log2(float x) { return std::log2(x); }

 private:
  // registers: of the left operand, or it is described by a. Transposed where it is in registers.
  struct Product {
    float* sums;
    int count;
    const uint32_t* registers;
    uint64_t a, b;
    bool adds;
  };

  template <class X>
  X exchange(X value, int with) {
    block_.room(id_) = &value;
    block_.warp_sync(id_);
    const X theirs = *static_cast<const X*>(block_.room(id_ ^ with));
    block_.warp_sync(id_);
    return theirs;
  }

  float element(uint32_t address) const {
    uint16_t bits;
    memcpy(&bits, block_.shared() + HostBlock::swizzle(address), 2);
    return bits_as<float>(uint32_t{bits} << 16);
  }
  static uint32_t field(uint64_t descriptor, int at) { return (descriptor >> at & 0x3fff) << 4; }
  // Rows one after the other, 16 elements of each (PTX ISA: K-major, 128-byte swizzle).
  float by_row(uint64_t descriptor, int row, int k) const {
    return element(field(descriptor, 0) + row / 8 * field(descriptor, 32) + row % 8 * 128 + k * 2);
  }
  // 16 rows, of which columns 64 * i lie field 16 apart (MN-major, 128-byte swizzle).
  float by_column(uint64_t descriptor, int column, int k) const {
    return element(field(descriptor, 0) + column / 64 * field(descriptor, 16) + column % 64 * 2 +
                   k / 8 * field(descriptor, 32) + k % 8 * 128);
  }

  // Sums of this thread: of rows 16 * warp + lane / 4 and 8 further, columns 8 * i + lane % 4 * 2.
  void compute(const Product& product) {
    if (product.b >> 62 != 1) throw std::logic_error("no 128-byte swizzle");
    block_.room(id_) = product.registers;
    block_.warp_sync(id_);
    float left[2][16];
    for (int half = 0; half < 2; ++half)
      for (int k = 0; k < 16; ++k)
        left[half][k] = product.registers ? of_quad(half, k)
                                          : by_row(product.a, thread() / 32 * 16 + lane() / 4 +
                                                                  half * 8, k);
    for (int i = 0; i < product.count; ++i) {
      const int column = i / 4 * 8 + lane() % 4 * 2 + i % 2;
      float sum = product.adds ? product.sums[i] : 0;
      for (int k = 0; k < 16; ++k)
        sum += left[i / 2 % 2][k] * (product.registers ? by_column(product.b, column, k)
                                                       : by_row(product.b, column, k));
      product.sums[i] = sum;
    }
    block_.warp_sync(id_);
  }
  // The left operand in registers: register k / 8 * 2 + half of lane k % 8 / 2 of four.
  float of_quad(int half, int k) {
    const int holder = id_ / 4 * 4 + k % 8 / 2;
    float both[2];
    HostBf16::unpack(static_cast<const uint32_t*>(block_.room(holder))[k / 8 * 2 + half], both);
    return both[k % 2];
  }

  HostBlock& block_;
  const int id_;
  const HostTensor projection_, turned_keys_;
  const int num_workers_;
  std::vector<Product> open_;
  std::vector<std::vector<Product>> committed_;
};

}  // namespace mmalign
