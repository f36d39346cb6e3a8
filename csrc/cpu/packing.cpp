// Rows scattered between rows of zeros: every row of the result is written once, where PyTorch
// fills all of them with zeros first. (Its gather is as fast as memory.)
#include <torch/csrc/stable/library.h>

#include <string>
#include <vector>

#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr const char* kName = "scatter_rows";
constexpr int64_t kZeros = -1;  // the source of a row that is in no position

[[noreturn]] void fail(int64_t position, const std::string& expected) {
  throw std::runtime_error(std::string(kName) + ": positions has " + std::to_string(position) +
                           expected);
}

// The index in `positions` of each row of the result.
template <class Index>
std::vector<int64_t> sources_of_rows(const Tensor& positions, int64_t num_rows) {
  std::vector<int64_t> sources(num_rows, kZeros);
  const auto* rows = static_cast<const Index*>(positions.data_ptr());
  for (int64_t i = 0; i < positions.size(0); ++i) {
    const int64_t row = rows[i];
    if (row < 0 || row >= num_rows) fail(row, ", expected 0 to " + std::to_string(num_rows - 1));
    if (sources[row] != kZeros) fail(row, " twice, and a row can be written only once");
    sources[row] = i;
  }
  return sources;
}

Tensor scatter_rows(const Tensor& packed, const Tensor& positions, int64_t num_rows) {
  Argument(kName, "packed", packed).floating().contiguous();
  Argument(kName, "positions", positions).shaped({packed.size(0)}, "packed");
  Argument(kName, "positions", positions).typed({ScalarType::Long, ScalarType::Int}).contiguous();
  const std::vector<int64_t> sources = positions.scalar_type() == ScalarType::Long
                                           ? sources_of_rows<int64_t>(positions, num_rows)
                                           : sources_of_rows<int32_t>(positions, num_rows);
  std::vector<int64_t> shape(packed.sizes().begin(), packed.sizes().end());
  shape[0] = num_rows;
  int64_t columns = 1;
  for (size_t i = 1; i < shape.size(); ++i) columns *= shape[i];
  const size_t bytes = columns * packed.element_size();
  Tensor result = torch::stable::new_empty(packed, shape);
  const auto* from = static_cast<const char*>(packed.data_ptr());
  auto* to = static_cast<char*>(result.data_ptr());
  share_rows(num_rows, columns, [&](int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      if (sources[row] == kZeros) {
        std::memset(to + row * bytes, 0, bytes);
      } else {
        std::memcpy(to + row * bytes, from + sources[row] * bytes, bytes);
      }
    }
  });
  return result;
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def("scatter_rows(Tensor packed, Tensor positions, int num_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("scatter_rows", TORCH_BOX(&mmalign::scatter_rows));
}
