// Arguments that the operations of rotary attention share, checked.
#pragma once

#include "arguments.h"
#include "attention_schedule.h"
#include "common.cuh"
#include "device.h"

namespace mmalign {

// Returns head_dim.
inline int64_t check_attention_shapes(const char* name, const Tensor& qkv, const Tensor& cos,
                                      const Tensor& sin, const Tensor& position_ids,
                                      const Tensor& cu_seqlens, int64_t num_heads,
                                      int64_t num_key_heads) {
  Argument(name, "qkv", qkv).rank(2).typed({ScalarType::BFloat16, ScalarType::Half}).contiguous();
  Argument(name, "qkv", qkv).below_2_31("rows", qkv.size(0)).below_2_31("columns", qkv.size(1));
  const std::string operation = name;
  if (num_heads < 1 || num_key_heads < 1 || num_heads % num_key_heads)
    throw std::runtime_error(operation + ": " + std::to_string(num_heads) +
                             " heads do not share " + std::to_string(num_key_heads) +
                             " key heads");
  const int64_t all_heads = num_heads + 2 * num_key_heads, head_dim = qkv.size(1) / all_heads;
  if (head_dim * all_heads != qkv.size(1) || (head_dim != 64 && head_dim != 128))
    throw std::runtime_error(operation + ": qkv has " + std::to_string(qkv.size(1)) +
                             " columns for " + std::to_string(all_heads) +
                             " heads, expected 64 or 128 for each; MMALIGN_BACKEND=triton computes "
                             "any head_dim");
  Argument(name, "cos", cos).rank(2).shaped({cos.size(0), head_dim / 2}, "qkv");
  Argument(name, "cos", cos).typed({ScalarType::Float}).contiguous();
  Argument(name, "sin", sin).shaped({cos.size(0), head_dim / 2}, "cos");
  Argument(name, "sin", sin).typed({ScalarType::Float}).contiguous();
  Argument(name, "position_ids", position_ids).shaped({qkv.size(0)}, "qkv");
  Argument(name, "position_ids", position_ids).typed({ScalarType::Int}).contiguous();
  Argument(name, "cu_seqlens", cu_seqlens).rank(1).typed({ScalarType::Int}).contiguous();
  Argument(name, "qkv", qkv).below_2_31(
      "items", most_items(qkv.size(0), cu_seqlens.size(0), num_heads));
  return head_dim;
}

// The device and the alignment; that there is a sample where there are rows.
inline void check_attention_device(const char* name, const Tensor& qkv, const Tensor& cos,
                                   const Tensor& sin, const Tensor& position_ids,
                                   const Tensor& cu_seqlens) {
  const Argument first(name, "qkv", qkv);
  first.on_gpu().aligned(kVectorBytes);
  Argument(name, "cos", cos).beside(first).aligned(kVectorBytes);
  Argument(name, "sin", sin).beside(first).aligned(kVectorBytes);
  Argument(name, "position_ids", position_ids).beside(first);
  Argument(name, "cu_seqlens", cu_seqlens).beside(first);
  if (qkv.size(0) && cu_seqlens.size(0) < 2)
    throw std::runtime_error(std::string(name) +
                             ": cu_seqlens has no sample for the rows of qkv");
}

// Of the current device.
inline void check_hopper(const char* name) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major != 9)
    throw std::runtime_error(std::string(name) + ": needs a Hopper GPU (compute capability 9.0), "
                             "this one has " + std::to_string(major) +
                             "; MMALIGN_BACKEND=triton runs on it");
}

}  // namespace mmalign
