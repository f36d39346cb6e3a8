// Checks of an operation's arguments, from what the host knows. Every message names the operation,
// the argument, what came and what was expected. Shapes and dtypes are checked before devices, so a
// machine without a GPU can test all of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace mmalign {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape_text(const int64_t* sizes, size_t rank) {
  std::ostringstream text;
  text << '(';
  for (size_t i = 0; i < rank; ++i) text << (i ? ", " : "") << sizes[i];
  text << (rank == 1 ? ",)" : ")");
  return text.str();
}

class Argument {
 public:
  // index: of the tensor in the list `name`. Texts are put together in fail, not before: an
  // optimizer's step checks thousands of tensors.
  Argument(const char* operation, const char* name, const Tensor& tensor, int64_t index = -1)
      : operation_(operation), name_(name), tensor_(tensor), index_(index) {}

  const Argument& rank(int64_t expected) const {
    if (tensor_.dim() != expected)
      fail("has shape ", shape(), ", expected ", expected, " dimensions");
    return *this;
  }

  // `beside` has the same index, if any.
  const Argument& shaped(const int64_t* expected, size_t rank, const char* beside) const {
    const auto sizes = tensor_.sizes();
    if (sizes.size() != rank || !std::equal(expected, expected + rank, sizes.begin()))
      fail("has shape ", shape(), ", expected ", shape_text(expected, rank), " beside ", beside,
           index());
    return *this;
  }
  const Argument& shaped(std::initializer_list<int64_t> expected, const char* beside) const {
    return shaped(expected.begin(), expected.size(), beside);
  }

  // Any shape of this many elements.
  const Argument& sized(int64_t expected, const char* beside) const {
    if (tensor_.numel() != expected)
      fail("has ", tensor_.numel(), " elements, expected ", expected, " beside ", beside, index());
    return *this;
  }

  const Argument& typed(std::initializer_list<ScalarType> expected) const {
    for (const ScalarType type : expected)
      if (tensor_.scalar_type() == type) return *this;
    std::ostringstream text;
    for (const ScalarType type : expected) text << (text.tellp() ? " or " : "") << type;
    fail("is ", tensor_.scalar_type(), ", expected ", text.str());
  }

  const Argument& floating() const {
    return typed({ScalarType::BFloat16, ScalarType::Half, ScalarType::Float, ScalarType::Double});
  }

  const Argument& contiguous() const {
    if (!tensor_.is_contiguous()) fail("of shape ", shape(), " is not contiguous");
    return *this;
  }

  const Argument& aligned(size_t bytes) const {
    if (reinterpret_cast<uintptr_t>(tensor_.data_ptr()) % bytes)
      fail("does not start at a multiple of ", bytes, " bytes");
    return *this;
  }

  // A size that a launch or an instruction counts in 32 bits.
  const Argument& below_2_31(const char* what, int64_t size) const {
    if (size > std::numeric_limits<int32_t>::max())
      fail("has ", size, " ", what, ", the kernel takes less than 2^31");
    return *this;
  }

  const Argument& on_gpu() const {
    if (!tensor_.is_cuda()) fail("is not on a CUDA device");
    return *this;
  }

  const Argument& beside(const Argument& other) const {
    if (tensor_.is_cuda() != other.tensor_.is_cuda() ||
        tensor_.get_device_index() != other.tensor_.get_device_index())
      fail("is on another device than ", other.name_, other.index());
    return *this;
  }

 private:
  std::string shape() const {
    const auto sizes = tensor_.sizes();
    return shape_text(sizes.data(), sizes.size());
  }

  std::string index() const {
    return index_ < 0 ? std::string() : "[" + std::to_string(index_) + "]";
  }

  template <class... Words>
  [[noreturn]] void fail(const Words&... words) const {
    std::ostringstream text;
    text << operation_ << ": " << name_ << index() << ' ';
    ((text << words), ...);
    throw std::runtime_error(text.str());
  }

  const char* operation_;
  const char* name_;
  const Tensor& tensor_;
  int64_t index_;
};

}  // namespace mmalign
