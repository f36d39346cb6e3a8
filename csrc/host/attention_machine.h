// The machine of attention_block.h and attention_gradient_block.h on the host, a thread of a
// HostBlock.
//
// A product is computed only when it is waited for, from what shared memory and registers hold
// then, by the addresses that the PTX ISA gives for its descriptors: what is overwritten too early
// or read too late shows in the result.
#pragma once

#include "../attention_products.h"
#include "host_block.h"

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

class HostMachine {
 public:
  using Element = HostBf16;

  // tensors: as the enumerators of Tensors; begin: where addresses count from
  HostMachine(HostBlock& block, int thread_of_block, const std::vector<HostTensor>& tensors,
              int num_workers, int begin = 0)
      : block_(block), id_(thread_of_block), tensors_(tensors), num_workers_(num_workers),
        begin_(begin) {}

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
    block_.copy_later(tensors_[static_cast<int>(tensor)], number, to, column, row);
  }
  int load_index(const int* from) const { return *from; }
  float load_statistic(const float* from) const { return *from; }
  StatisticPair load_pair(const float* from) const { return {{from[0], from[1]}}; }
  Angles load_angles(const float* from) const {
    Angles angles;
    memcpy(angles.values, from, sizeof(angles));
    return angles;
  }
  void writes_to_async() { block_.fence(); }
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
  void computed(const float (&)[2]) {}
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
    block_.workspace(id_) = &value;
    block_.warp_sync(id_);
    const X theirs = *static_cast<const X*>(block_.workspace(id_ ^ with));
    block_.warp_sync(id_);
    return theirs;
  }

  float element(uint32_t address) const {
    uint16_t bits;
    memcpy(&bits, block_.for_products() + begin_ + HostBlock::swizzle(address), 2);
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
    block_.workspace(id_) = product.registers;
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
    const auto* words = static_cast<const uint32_t*>(block_.workspace(holder));
    HostBf16::unpack(words[k / 8 * 2 + half], both);
    return both[k % 2];
  }

  HostBlock& block_;
  const int id_;
  const std::vector<HostTensor>& tensors_;
  const int num_workers_, begin_;
  std::vector<Product> open_;
  std::vector<std::vector<Product>> committed_;
};

}  // namespace mmalign
