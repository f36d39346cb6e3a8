// mmalign_cpu::*, through PyTorch's stable ABI: on the CPU. One library per instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <tuple>

#include "prefix_attention.h"
#include "rotary_attention.h"
#include "tensors.h"

namespace mmalign {

namespace {

const int32_t* integers(const Tensor& tensor) {
  return static_cast<const int32_t*>(tensor.data_ptr());
}

void check_samples(const char* operation, const Tensor& cu_seqlens, int64_t num_tokens) {
  const int32_t* bounds = integers(cu_seqlens);
  const int64_t last = cu_seqlens.size(0) - 1;
  bool increases = bounds[0] == 0 && bounds[last] == num_tokens;
  for (int64_t i = 0; i < last; ++i) increases = increases && bounds[i] <= bounds[i + 1];
  if (!increases) {
    throw std::runtime_error(std::string(operation) + ": cu_seqlens must increase from 0 to " +
                             std::to_string(num_tokens));
  }
}

void check_positions(const char* operation, const Tensor& position_ids, int64_t num_positions) {
  const int32_t* positions = integers(position_ids);
  for (int64_t i = 0; i < position_ids.size(0); ++i) {
    if (positions[i] < 0 || positions[i] >= num_positions) {
      throw std::runtime_error(std::string(operation) + ": position_ids has " +
                               std::to_string(positions[i]) + ", expected 0 to " +
                               std::to_string(num_positions - 1) + ", the rows of cos");
    }
  }
}

Attention read(const char* operation, const Tensor& qkv, const std::optional<Tensor>& cos,
               const std::optional<Tensor>& sin, const std::optional<Tensor>& position_ids,
               const Tensor& cu_seqlens, int64_t num_heads, int64_t num_key_value_heads,
               bool causal) {
  Argument(operation, "qkv", qkv).rank(2).typed({ScalarType::Float}).contiguous();
  Argument(operation, "cu_seqlens", cu_seqlens).rank(1).typed({ScalarType::Int}).contiguous();
  check_samples(operation, cu_seqlens, qkv.size(0));
  Attention call{};
  call.qkv = floats(qkv);
  call.cu_seqlens = integers(cu_seqlens);
  call.num_samples = static_cast<int>(cu_seqlens.size(0) - 1);
  call.num_heads = static_cast<int>(num_heads);
  call.num_key_value_heads = static_cast<int>(num_key_value_heads);
  call.head_dim = static_cast<int>(qkv.size(1) / (num_heads + 2 * num_key_value_heads));
  call.causal = causal;
  if (cos) {
    Argument(operation, "cos", *cos).rank(2).typed({ScalarType::Float}).contiguous();
    const int64_t num_positions = cos->size(0);
    Argument(operation, "cos", *cos).shaped({num_positions, call.head_dim / 2}, "qkv");
    Argument(operation, "sin", *sin).shaped({num_positions, call.head_dim / 2}, "cos");
    Argument(operation, "sin", *sin).typed({ScalarType::Float}).contiguous();
    Argument(operation, "position_ids", *position_ids).shaped({qkv.size(0)}, "qkv");
    Argument(operation, "position_ids", *position_ids).typed({ScalarType::Int}).contiguous();
    check_positions(operation, *position_ids, num_positions);
    call.cos = floats(*cos);
    call.sin = floats(*sin);
    call.position_ids = integers(*position_ids);
  }
  return call;
}

std::tuple<Tensor, Tensor> attention_fwd(const Tensor& qkv, const std::optional<Tensor>& cos,
                                         const std::optional<Tensor>& sin,
                                         const std::optional<Tensor>& position_ids,
                                         const Tensor& cu_seqlens, int64_t num_heads,
                                         int64_t num_key_value_heads, bool causal) {
  const Attention call = read("attention_fwd", qkv, cos, sin, position_ids, cu_seqlens, num_heads,
                              num_key_value_heads, causal);
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), num_heads * call.head_dim});
  Tensor logsumexp = torch::stable::new_empty(qkv, {qkv.size(0), num_heads});
  rotary_attention_forward(call, static_cast<float*>(out.data_ptr()),
                           static_cast<float*>(logsumexp.data_ptr()));
  return {out, logsumexp};
}

Tensor attention_bwd(const Tensor& grad_out, const Tensor& qkv, const Tensor& out,
                     const Tensor& logsumexp, const std::optional<Tensor>& cos,
                     const std::optional<Tensor>& sin, const std::optional<Tensor>& position_ids,
                     const Tensor& cu_seqlens, int64_t num_heads, int64_t num_key_value_heads,
                     bool causal) {
  constexpr const char* kName = "attention_bwd";
  const Attention call =
      read(kName, qkv, cos, sin, position_ids, cu_seqlens, num_heads, num_key_value_heads, causal);
  const int64_t columns = num_heads * call.head_dim;
  for (const auto& [name, tensor] : {std::pair{"grad_out", &grad_out}, {"out", &out}}) {
    Argument(kName, name, *tensor).shaped({qkv.size(0), columns}, "qkv");
    Argument(kName, name, *tensor).typed({ScalarType::Float}).contiguous();
  }
  Argument(kName, "logsumexp", logsumexp).shaped({qkv.size(0), num_heads}, "qkv");
  Argument(kName, "logsumexp", logsumexp).typed({ScalarType::Float}).contiguous();
  Tensor grad_qkv = torch::stable::empty_like(qkv);
  rotary_attention_backward(call, floats(grad_out), floats(out), floats(logsumexp),
                            static_cast<float*>(grad_qkv.data_ptr()));
  return grad_qkv;
}

Tensor prefix_attention_update(const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                               const Tensor& position_ids, const Tensor& cu_seqlens,
                               const Tensor& span_begins, const Tensor& span_ends,
                               const Tensor& cu_spans, Tensor keys, Tensor values,
                               int64_t num_heads) {
  constexpr const char* kName = "prefix_attention_update";
  Argument(kName, "keys", keys).rank(3).typed({ScalarType::Float}).contiguous();
  Argument(kName, "values", values).shaped({keys.size(0), keys.size(1), keys.size(2)}, "keys");
  Argument(kName, "values", values).typed({ScalarType::Float}).contiguous();
  const Attention call =
      read(kName, qkv, cos, sin, position_ids, cu_seqlens, num_heads, keys.size(1), true);
  Argument(kName, "cu_spans", cu_spans).shaped({cu_seqlens.size(0)}, "cu_seqlens");
  Argument(kName, "span_ends", span_ends).shaped({span_begins.size(0)}, "span_begins");
  for (const Tensor* tensor : {&cu_spans, &span_begins, &span_ends}) {
    Argument(kName, "spans", *tensor).typed({ScalarType::Int}).contiguous();
  }
  PrefixCache cache{};
  cache.keys = static_cast<float*>(keys.data_ptr());
  cache.values = static_cast<float*>(values.data_ptr());
  cache.span_begins = integers(span_begins);
  cache.span_ends = integers(span_ends);
  cache.cu_spans = integers(cu_spans);
  Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), num_heads * call.head_dim});
  prefix_attention(call, cache, static_cast<float*>(out.data_ptr()));
  return out;
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY(mmalign_cpu, library) {
  library.def(
      "attention_fwd(Tensor qkv, Tensor? cos, Tensor? sin, Tensor? position_ids, Tensor cu_seqlens,"
      " int num_attention_heads, int num_key_value_heads, bool causal) -> (Tensor, Tensor)");
  library.def(
      "attention_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor logsumexp, Tensor? cos,"
      " Tensor? sin, Tensor? position_ids, Tensor cu_seqlens, int num_attention_heads,"
      " int num_key_value_heads, bool causal) -> Tensor");
  library.def(
      "prefix_attention_update(Tensor qkv, Tensor cos, Tensor sin, Tensor position_ids,"
      " Tensor cu_seqlens, Tensor span_begins, Tensor span_ends, Tensor cu_spans, Tensor(a!) keys,"
      " Tensor(b!) values, int num_attention_heads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("attention_fwd", TORCH_BOX(&mmalign::attention_fwd));
  library.impl("attention_bwd", TORCH_BOX(&mmalign::attention_bwd));
  library.impl("prefix_attention_update", TORCH_BOX(&mmalign::prefix_attention_update));
}
