// What lets one header serve kernels and the host library that the tests load.
#pragma once

#include <cstdint>
#include <cstring>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline
#endif

namespace mmalign {

// The same bits, read as another type of that size.
template <class To, class From>
HOST_DEVICE To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From), "bits_as: sizes differ");
  To to;
  memcpy(&to, &from, sizeof(To));
  return to;
}

template <class T>
HOST_DEVICE T ceil_div(T x, T y) {
  return (x + y - 1) / y;
}

}  // namespace mmalign
