// Vectors of fp32 as wide as the instruction set that this file is compiled for.
#pragma once

#include <cstdint>
#include <limits>
#include <utility>

namespace mmalign {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
constexpr int kRowsPerTile = 6, kVectorsPerTile = 4;  // 24 of 32 registers hold sums
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRowsPerTile = 6, kVectorsPerTile = 2;  // 12 of 16
#else
constexpr int kLanes = 4;
constexpr int kRowsPerTile = 6, kVectorsPerTile = 2;
#endif

typedef float Vector __attribute__((vector_size(4 * kLanes)));
typedef int32_t IntVector __attribute__((vector_size(4 * kLanes)));
typedef float UnalignedVector __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

constexpr float kLog2E = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

inline Vector load(const float* at) { return *reinterpret_cast<const UnalignedVector*>(at); }
inline void store(float* at, Vector x) { *reinterpret_cast<UnalignedVector*>(at) = x; }
inline Vector broadcast(float x) { return x - Vector{}; }
inline Vector larger(Vector a, Vector b) { return a > b ? a : b; }

namespace detail {

using Lanes = std::make_integer_sequence<int, kLanes>;

template <int... kIndex>
constexpr IntVector iota(std::integer_sequence<int, kIndex...>) {
  return IntVector{kIndex...};
}

// Lane i of the result: lane kFrom of a, or lane kFrom - kLanes of b.
template <int... kFrom>
inline Vector shuffle(Vector a, Vector b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, kFrom...);
#else
  return __builtin_shuffle(a, b, IntVector{kFrom...});
#endif
}

// Exchange the off-diagonal squares of kStep lanes of two rows.
template <int kStep, int... kLane>
inline void exchange(Vector& a, Vector& b, std::integer_sequence<int, kLane...>) {
  const Vector low = shuffle<(kLane & kStep ? kLanes + kLane - kStep : kLane)...>(a, b);
  b = shuffle<(kLane & kStep ? kLanes + kLane : kLane + kStep)...>(a, b);
  a = low;
}

template <int kStep>
inline void exchange(Vector (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & kStep)) exchange<kStep>(rows[i], rows[i + kStep], Lanes{});
  }
}

template <int kStep, int... kLane>
inline Vector turn(Vector x, std::integer_sequence<int, kLane...>) {
  return shuffle<(kLane ^ kStep)...>(x, x);
}

// Combines all lanes in pairs at growing distance; every lane of the result has all of them.
template <int kStep, class Combine>
inline Vector reduce(Vector x, const Combine& combine) {
  if constexpr (kStep < kLanes) {
    return reduce<2 * kStep>(combine(x, turn<kStep>(x, Lanes{})), combine);
  }
  return x;
}

}  // namespace detail

constexpr IntVector kIota = detail::iota(detail::Lanes{});

// kLanes rows of kLanes columns, transposed in registers.
inline void transpose(Vector (&rows)[kLanes]) {
  detail::exchange<1>(rows);
  detail::exchange<2>(rows);
  if constexpr (kLanes > 4) detail::exchange<4>(rows);
  if constexpr (kLanes > 8) detail::exchange<8>(rows);
}

inline float sum(Vector x) {
  return detail::reduce<1>(x, [](Vector a, Vector b) { return a + b; })[0];
}
inline float largest(Vector x) { return detail::reduce<1>(x, larger)[0]; }

inline float dot(const float* a, const float* b, int count) {
  Vector total{};
  int i = 0;
  for (; i + kLanes <= count; i += kLanes) total += load(a + i) * load(b + i);
  float rest = 0;
  for (; i < count; ++i) rest += a[i] * b[i];
  return sum(total) + rest;
}

// 2^f for f from -0.5 to 0.5: a minimax polynomial.
inline Vector exp2_fraction(Vector f) {
  Vector y = broadcast(1.535335857e-04f);
  y = y * f + 1.339887432e-03f;
  y = y * f + 9.618437371e-03f;
  y = y * f + 5.550332471e-02f;
  y = y * f + 2.402264791e-01f;
  y = y * f + 6.931472029e-01f;
  return y * f + 1.0f;
}

// 2^x for x <= 0, to one unit in the last place; 0 below 2^-127, NaN stays NaN.
inline Vector exp2_of_negative(Vector x) {
  const Vector lowest = broadcast(-127.0f);
  x = x < lowest ? lowest : x;
  const Vector magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const Vector shifted = x + magic;
  const Vector f = x - (shifted - magic);  // -0.5 to 0.5
  const IntVector exponent = (reinterpret_cast<IntVector>(shifted) + 127) << 23;
  return exp2_fraction(f) * reinterpret_cast<Vector>(exponent);  // of -127: the bits of 0
}

// e^x for x <= 0, to one unit in the last place; 0 below 2^-127, NaN stays NaN.
inline Vector exp_of_negative(Vector x) {
  constexpr float kLog2ELow = 1.92596303e-08f;  // log2(e) - kLog2E
  const Vector magic = broadcast(12582912.0f);
  const Vector lowest = broadcast(-127.0f * kLn2);
  x = x < lowest ? lowest : x;
  const Vector shifted = x * kLog2E + magic;
  const Vector f = (x * kLog2E - (shifted - magic)) + x * kLog2ELow;  // products fused with sums
  const IntVector exponent = (reinterpret_cast<IntVector>(shifted) + 127) << 23;
  return exp2_fraction(f) * reinterpret_cast<Vector>(exponent);
}

// 1 / (1 + e^-x).
inline Vector sigmoid(Vector x) {
  const Vector e = exp_of_negative(x > Vector{} ? -x : x);
  return (x > Vector{} ? broadcast(1.0f) : e) / (1.0f + e);
}

}  // namespace mmalign
