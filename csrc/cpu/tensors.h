// Arguments of the CPU operations: contiguous tensors of fp32.
#pragma once

#include "../arguments.h"

namespace mmalign {

inline float* floats(const Tensor& tensor) { return static_cast<float*>(tensor.data_ptr()); }

inline const Argument& dense_floats(const Argument& argument) {
  return argument.typed({ScalarType::Float}).contiguous();
}

}  // namespace mmalign
