// Descriptions of tensors for TMA. The driver makes them; its function is looked up at first use,
// so the library needs no driver to load.
#pragma once

#include <cuda.h>
#include <cudaTypedefs.h>

#include <array>
#include <stdexcept>
#include <string>

#include "device.h"
#include "matrix_layout.h"

namespace mmalign {

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult found = cudaDriverEntryPointSymbolNotFound;
    check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000,
                                                cudaEnableDefault, &found),
               "cuTensorMapEncodeTiled");
    if (found != cudaDriverEntryPointSuccess || !function)
      throw std::runtime_error("mmalign_cuda: the driver has no cuTensorMapEncodeTiled; it needs "
                               "one for CUDA 12.0 or later");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return encoder;
}

// A tensor of 16-bit elements and the box that a copy moves, rows of at most 128 bytes, swizzled.
// Innermost dimension first. strides: bytes of all dimensions but the innermost, multiples of 16.
template <size_t kRank>
CUtensorMap tensor_map(torch::headeronly::ScalarType type, const void* data,
                       const std::array<cuuint64_t, kRank>& sizes,
                       const std::array<cuuint64_t, kRank - 1>& strides,
                       const std::array<cuuint32_t, kRank>& box) {
  const bool is_half = type == torch::headeronly::ScalarType::Half;
  std::array<cuuint32_t, kRank> steps;
  steps.fill(1);
  CUtensorMap map;
  const CUresult result = tensor_map_encoder()(
      &map, is_half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, kRank,
      const_cast<void*>(data), sizes.data(), strides.data(), box.data(), steps.data(),
      CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
      CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS)
    throw std::runtime_error("mmalign_cuda: cuTensorMapEncodeTiled: error " +
                             std::to_string(result));
  return map;
}

}  // namespace mmalign
