// The device for launchers: stream, properties, errors.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

#include "row_threads.h"

namespace mmalign {

inline void check_cuda(cudaError_t error, const char* what) {
  if (error != cudaSuccess)
    throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

// PyTorch's current stream. A CPU-only PyTorch lacks the symbol, so it is looked up at first use.
inline cudaStream_t current_stream(const torch::stable::Tensor& tensor) {
  using Lookup = AOTITorchError (*)(int32_t, void**);
  static const Lookup lookup = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* symbol = dlsym(library ? library : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream");
    if (!symbol) throw std::runtime_error("mmalign_cuda: this PyTorch has no CUDA streams");
    return reinterpret_cast<Lookup>(symbol);
  }();
  void* stream = nullptr;
  if (lookup(tensor.get_device_index(), &stream) != 0)
    throw std::runtime_error("mmalign_cuda: PyTorch gave no stream");
  return static_cast<cudaStream_t>(stream);
}

// Runs `launch(T{})` with the C++ type of a floating-point tensor; arguments were checked before.
template <class Launch>
void with_float_type(torch::headeronly::ScalarType type, Launch launch) {
  using torch::headeronly::ScalarType;
  if (type == ScalarType::BFloat16) return launch(__nv_bfloat16());
  if (type == ScalarType::Half) return launch(__half());
  if (type == ScalarType::Float) return launch(float());
  if (type == ScalarType::Double) return launch(double());
  throw std::runtime_error("mmalign_cuda: a type that the checks let pass has no kernel");
}

// The type of arithmetic and of row statistics: fp32, or fp64 for fp64.
inline torch::headeronly::ScalarType compute_dtype(const torch::stable::Tensor& x) {
  using torch::headeronly::ScalarType;
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Whether kernels may read all of them 128 bits at a time.
template <class... Pointers>
bool aligned_to_16(const Pointers*... pointers) {
  return ((reinterpret_cast<uintptr_t>(pointers) % 16 == 0) && ...);
}

// An attribute of the current device.
inline int device_attribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  check_cuda(cudaDeviceGetAttribute(&value, attribute, device), "cudaDeviceGetAttribute");
  return value;
}

inline int num_multiprocessors() { return device_attribute(cudaDevAttrMultiProcessorCount); }

// Allows a kernel this much dynamic shared memory.
template <class Kernel>
void allow_shared(Kernel kernel, size_t bytes) {
  if (opts_in(bytes))
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    static_cast<int>(bytes)),
               "shared memory");
}

template <class Kernel>
int blocks_per_multiprocessor(Kernel kernel, int num_threads, size_t shared_bytes) {
  int blocks = 0;
  check_cuda(
      cudaOccupancyMaxActiveBlocksPerMultiprocessor(&blocks, kernel, num_threads, shared_bytes),
      "occupancy");
  return blocks;
}

}  // namespace mmalign
