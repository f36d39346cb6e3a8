// A block of threads on the host, run as fibers in an order random, with the barriers of
// a Hopper block. Copies into its shared memory arrive at any time later; shared memory begins as
// NaN; products see what threads wrote there only after a fence; threads that wait for each other
// forever are an error.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "../attention_tiles.h"

namespace mmalign {

// A matrix in global memory, rows without a gap, and how many of them a copy brings.
struct HostTensor {
  const uint16_t* data;
  int rows, columns, box_rows;
};

class HostBlock {
 public:
  HostBlock(int num_threads, int shared_bytes, uint32_t seed)
      : random_(seed), memory_(shared_bytes + kPatternBytes, '\xff'), threads_(num_threads),
        warps_(num_threads / 32), workspaces_(num_threads) {
    const auto address = reinterpret_cast<uintptr_t>(memory_.data());
    shared_ = memory_.data() + (kPatternBytes - address % kPatternBytes) % kPatternBytes;
    for_products_.assign(shared_, shared_ + shared_bytes);
  }

  char* shared() const { return shared_; }
  const char* for_products() const { return for_products_.data(); }
  void fence() { std::copy_n(shared_, for_products_.size(), for_products_.data()); }

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

  int current() const { return current_; }
  // What a thread lays out for its warp.
  const void*& workspace(int thread) { return workspaces_[thread]; }

  // What arrives at any time, and the bytes of it that a barrier hears of.
  void later(std::function<void()> copy) { copies_.push_back(std::move(copy)); }
  void complete(int barrier, int bytes) {
    barriers_[barrier].bytes -= bytes;
    settle(barriers_[barrier]);
  }

  // A box of rows of 128 bytes, swizzled; zeros outside the tensor.
  void copy_later(const HostTensor& tensor, int barrier, int to, int column, int row) {
    later([=] {
      for (int r = 0; r < tensor.box_rows; ++r)
        for (int c = 0; c < kBoxColumns; ++c) {
          const bool inside = row + r < tensor.rows && column + c < tensor.columns;
          const uint16_t value =
              inside ? tensor.data[int64_t{row + r} * tensor.columns + column + c] : 0;
          const uint32_t at = swizzle(to + r * 128 + c * 2);
          memcpy(shared_ + at, &value, 2);
          memcpy(for_products_.data() + at, &value, 2);
        }
      complete(barrier, tensor.box_rows * 128);
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
  std::vector<char> for_products_;
  std::vector<Fiber> threads_;
  std::vector<Meeting> warps_;
  std::vector<const void*> workspaces_;
  std::vector<Barrier> barriers_;
  Meeting meetings_[16];
  std::vector<std::function<void()>> copies_;
  std::function<void(int)> body_;
  ucontext_t scheduler_;
  int current_ = 0;
  bool progress_ = false;
  std::string failure_;
};

}  // namespace mmalign
