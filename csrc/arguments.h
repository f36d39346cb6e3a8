// Checks of an operation's arguments, from what the host knows. Every message names the operation,
// the argument, what came and what was expected. Shapes and dtypes are checked before devices, so a
// machine without a GPU can test all of them.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <initializer_list>
#include <limits>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
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
  Argument(const char* operation, std::string name, const Tensor& tensor)
      : operation_(operation), name_(std::move(name)), tensor_(tensor) {}

  const Argument& rank(int64_t expected) const {
    if (tensor_.dim() != expected)
      fail("has shape ", shape(), ", expected ", expected, " dimensions");
    return *this;
  }

  const Argument& shaped(const std::vector<int64_t>& expected, const char* beside) const {
    const auto sizes = tensor_.sizes();
    bool same = sizes.size() == expected.size();
    for (size_t i = 0; same && i < expected.size(); ++i) same = sizes[i] == expected[i];
    if (!same)
      fail("has shape ", shape(), ", expected ", shape_text(expected.data(), expected.size()),
           " beside ", beside);
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
      fail("is on another device than ", other.name_);
    return *this;
  }

 private:
  std::string shape() const {
    const auto sizes = tensor_.sizes();
    return shape_text(sizes.data(), sizes.size());
  }

  template <class... Words>
  [[noreturn]] void fail(const Words&... words) const {
    std::ostringstream text;
    text << operation_ << ": " << name_ << ' ';
    ((text << words), ...);
    throw std::runtime_error(text.str());
  }

  const char* operation_;
  std::string name_;
  const Tensor& tensor_;
};

}  // namespace mmalign
