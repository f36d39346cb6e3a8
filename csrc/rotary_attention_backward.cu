// Rotary attention within each packed sample, backward, for Hopper.
//
//   p = exp(q k^T / sqrt(head_dim) - logsumexp)       delta = sum(grad_out * out) of a row and head
//   ds = p * (grad_out v^T - delta)                   dq = ds k / sqrt(head_dim)
//   dv = p^T grad_out                                 dk = ds^T q / sqrt(head_dim)
//
// q and k rotated, dq and dk by the inverse rotation; fp32 scores and sums; p and ds are rounded to
// the dtype of qkv for their products. No atomics, no order that depends on the schedule:
// deterministic.
//
// Three launches. The first writes a rotated copy of queries and keys, logsumexp (base 2) and delta
// by heads, and two tables of work (attention_schedule.h). Then two persistent kernels of the same
// design (attention_gradient_block.h): one owns queries and writes dq; one owns keys, loops over
// the queries of all heads of its group in a fixed order, and writes dk and dv. A thread loads
// pairs of tiles by TMA, two warpgroups own 64 rows each. The owned rows come first in the scores,
// so p and ds go directly from accumulators into the next product, as its left operand in
// registers. Each warpgroup skips pairs of tiles that the causal mask hides entirely.
//
// Why two kernels: one kernel would have 5 products instead of 7, but dq would come in parts from
// all blocks of keys, in fp32: 8HD bytes per token added in memory for each of them, in an order
// that must be fixed for determinism. At 512 to 1,024 tokens that costs more.
//
// T tokens in samples of S, H heads of D = 128, bf16: 14 HDT(S + 1) / 2 FLOPs when causal. Bytes,
// with H key heads: first 8 HDT read and 4 HDT written, then 8 HDT read and 2 HDT written for dq, 8
// HDT read and 4 HDT written for dk and dv. T = 8192, H = 32: 1.14 GB; S = 512: 120 GFLOP; S =
// 1024: 241 GFLOP.
//
// bf16 and fp16, head_dim 64 and 128; Triton computes others.
//
// Not measured on a GPU yet, so Triton is the default.
#include <algorithm>
#include <cmath>

#include "attention_arguments.h"
#include "attention_gradient.cuh"
#include "ops.h"
#include "tensor_map.h"

namespace mmalign {
namespace {

constexpr const char* kName = "rotary_attention_bwd";

struct Backward {
  const Tensor &grad_out, &qkv, &out, &logsumexp, &cu_seqlens;
  GradientCall call;
};

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// A map whose boxes are 64 rows of 64 columns.
CUtensorMap map_of(const Tensor& tensor) {
  const auto rows = static_cast<cuuint64_t>(tensor.size(0));
  const auto columns = static_cast<cuuint64_t>(tensor.size(1));
  return tensor_map<2>(tensor.scalar_type(), tensor.data_ptr(), {columns, rows}, {columns * 2},
                       {kBoxColumns, kGradientRows});
}

template <Gradient kOf, class T, int kHeadDim>
void launch_gradient(const Backward& backward, const Tensor& rotated, ScheduledSample* table,
                     cudaStream_t stream) {
  GradientCall call = backward.call;
  call.table = table;
  call.counter = &table[call.num_samples + 1].first_item;
  const auto kernel = rotary_gradient_kernel<kOf, T, kHeadDim>;
  constexpr int kShared = GradientShared<kHeadDim>::kBytes + kPatternBytes;
  allow_shared(kernel, kShared);
  const int heads = kOf == Gradient::kQueries ? call.shape.num_heads : call.shape.num_key_heads;
  const int64_t items = most_items(call.num_tokens, call.num_samples, heads);
  const int blocks = static_cast<int>(std::min<int64_t>(items, num_multiprocessors()));
  kernel<<<blocks, kAttentionThreads, kShared, stream>>>(map_of(backward.qkv), map_of(rotated),
                                                         map_of(backward.grad_out), call);
  check_cuda(cudaGetLastError(), kName);
}

template <class T, int kHeadDim>
void launch(Backward backward) {
  const Tensor& qkv = backward.qkv;
  GradientCall& call = backward.call;
  const cudaStream_t stream = current_stream(qkv);
  const int64_t rows = qkv.size(0), heads = call.shape.num_heads;
  const int64_t num_rotated = heads + call.shape.num_key_heads;
  const int64_t entries = call.num_samples + 2;
  const Tensor rotated = torch::stable::new_empty(qkv, {rows, num_rotated * kHeadDim});
  const Tensor statistics = torch::stable::new_empty(qkv, {2, heads, rows}, ScalarType::Float);
  const Tensor tables = torch::stable::new_empty(
      qkv, {2, entries, static_cast<int64_t>(sizeof(ScheduledSample) / sizeof(int))},
      ScalarType::Int);
  auto* query_table = data<ScheduledSample>(tables);
  ScheduledSample* key_table = query_table + entries;
  call.statistics = data<const float>(statistics);

  const Preparation<T> preparation = {data<const T>(qkv),
                                      data<const T>(backward.out),
                                      data<const T>(backward.grad_out),
                                      data<const float>(backward.logsumexp),
                                      data<const int>(backward.cu_seqlens),
                                      data<T>(rotated),
                                      data<float>(statistics),
                                      query_table,
                                      key_table};
  const dim3 grid(ceil_div<int64_t>(rows, kRotateThreads / (kHeadDim / 16)),
                  ceil_div<int64_t>(num_rotated, kHeadsOfPreparation));
  prepare_gradient_kernel<T, kHeadDim><<<grid, kRotateThreads, 0, stream>>>(preparation, call);
  check_cuda(cudaGetLastError(), "prepare_gradient");
  launch_gradient<Gradient::kQueries, T, kHeadDim>(backward, rotated, query_table, stream);
  launch_gradient<Gradient::kKeys, T, kHeadDim>(backward, rotated, key_table, stream);
}

// What the forward pass left, beside qkv.
void check_output(const char* argument, const Tensor& tensor, const Tensor& qkv, int64_t columns) {
  Argument(kName, argument, tensor).shaped({qkv.size(0), columns}, "qkv");
  Argument(kName, argument, tensor).typed({qkv.scalar_type()}).contiguous();
}

// Returns head_dim.
int64_t check_backward(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                       const Tensor& logsumexp, const Tensor& cos, const Tensor& sin,
                       const Tensor& position_ids, const Tensor& cu_seqlens, int64_t num_heads,
                       int64_t num_key_heads) {
  const int64_t head_dim = check_attention_shapes(kName, qkv, cos, sin, position_ids, cu_seqlens,
                                                  num_heads, num_key_heads);
  check_output("grad_out", grad_out, qkv, num_heads * head_dim);
  check_output("out", out, qkv, num_heads * head_dim);
  Argument(kName, "logsumexp", logsumexp).shaped({qkv.size(0), num_heads}, "qkv");
  Argument(kName, "logsumexp", logsumexp).typed({ScalarType::Float}).contiguous();
  check_attention_device(kName, qkv, cos, sin, position_ids, cu_seqlens);
  const Argument first(kName, "qkv", qkv);
  Argument(kName, "grad_out", grad_out).beside(first).aligned(kVectorBytes);
  Argument(kName, "out", out).beside(first).aligned(kVectorBytes);
  Argument(kName, "logsumexp", logsumexp).beside(first);
  return head_dim;
}

}  // namespace

Tensor rotary_attention_bwd(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                            const Tensor& logsumexp, const Tensor& cos, const Tensor& sin,
                            const Tensor& position_ids, const Tensor& cu_seqlens,
                            int64_t num_attention_heads, int64_t num_key_value_heads,
                            bool causal) {
  const int64_t head_dim =
      check_backward(grad_out, qkv, out, logsumexp, cos, sin, position_ids, cu_seqlens,
                     num_attention_heads, num_key_value_heads);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  check_hopper(kName);
  const Tensor grad = torch::stable::new_empty(qkv, {qkv.size(0), qkv.size(1)});
  if (qkv.size(0) == 0) return grad;

  Backward backward{grad_out, qkv, out, logsumexp, cu_seqlens, {}};
  GradientCall& call = backward.call;
  call.cos = data<const float>(cos);
  call.sin = data<const float>(sin);
  call.position_ids = data<const int>(position_ids);
  call.grad = grad.data_ptr();
  call.shape = {static_cast<int>(num_attention_heads), static_cast<int>(num_key_value_heads),
                static_cast<int>(head_dim)};
  call.num_tokens = static_cast<int>(qkv.size(0));
  call.num_samples = static_cast<int>(cu_seqlens.size(0)) - 1;
  call.root = static_cast<float>(1 / std::sqrt(static_cast<double>(head_dim)));
  call.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(head_dim)));
  call.causal = causal;
  const bool is_half = qkv.scalar_type() == ScalarType::Half;
  if (head_dim == 64)
    is_half ? launch<__half, 64>(backward) : launch<__nv_bfloat16, 64>(backward);
  else
    is_half ? launch<__half, 128>(backward) : launch<__nv_bfloat16, 128>(backward);
  return grad;
}

}  // namespace mmalign
