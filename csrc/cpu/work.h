// Independent work items, dealt to PyTorch's threads.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

namespace mmalign {

// Runs function(index) once for each item, the most expensive first. Every item writes its own
// results, so that they are the same whoever computes it.
template <class Function>
void share_work(const std::vector<double>& costs, const Function& function) {
  std::vector<int> order(costs.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return costs[a] > costs[b]; });
  std::atomic<size_t> next{0};
  const int64_t num_threads =
      std::min<int64_t>(torch::stable::get_num_threads(), static_cast<int64_t>(order.size()));
  torch::stable::parallel_for(0, num_threads, 1, [&](int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1)) < order.size();) function(order[i]);
  });
}

}  // namespace mmalign
