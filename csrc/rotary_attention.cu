// Rotary attention within each packed sample, forward, for Hopper.
//
//   q, k rotated by their positions (columns i and i + head_dim / 2), rounded to their dtype
//   out = softmax(q k^T / sqrt(head_dim)) v, causal or not; logsumexp of every row's scores
//
// fp32 scores, sums and out; exp(score - peak) is rounded to the dtype of v for its product.
//
// Two launches. The first writes a rotated copy of the keys and the table of work
// (attention_schedule.h). The second is persistent, one block per multiprocessor: one thread draws
// items from a counter and loads tiles of 128 queries, keys and values by TMA; three warps rotate
// the next item's queries in shared memory; two warpgroups own 64 queries each and multiply, one
// while the other computes its softmax (named barriers), and each computes a softmax while its
// previous product with values is in flight. The assignment of items to workers changes no bit of
// the result.
//
// Why keys are rotated in a separate pass: a tile of 128 keys of 128 columns would need 64 KiB of
// angles, as much as the keys and values themselves, and again for each of the length / 256 tiles
// of queries that read it. 8.4 MFLOP per tile take at least 2,048 cycles of a multiprocessor, so
// keys and values need 32 bytes per cycle from L2, which delivers about 24 (5.5 TB/s). The pass
// costs 16 KiB of memory traffic per token for 32 heads at any length. A query belongs to one item:
// its angles are loaded once, 16 KiB per token for 32 heads, from L2, while the matrix units work.
//
// T tokens in samples of S, H heads of D = 128, bf16: 4HDT(S + 1) / 2 FLOPs when causal, 4HDTS when
// not. Bytes to and from memory: rotating keys 4 HDT, then 6 HDT read, 2 HDT written, 4HT
// logsumexp. T = 8192, H = 32: 403 MB; S = 512: 34 GFLOP; S = 1024: 69 GFLOP. Memory limits samples
// of up to about 1,000 tokens, and the copy of the keys is a third of it. Tiles on the diagonal are
// computed whole: 64 keys too many per query, besides the S / 2 that it attends to.
//
// bf16 and fp16, head_dim 64 and 128. Others (100: a head's 200 bytes are not a multiple of TMA's
// 16) are rejected; Triton computes them. out and logsumexp have Triton's layout, so either
// backward pass takes them (rotary_attention_backward.cu, triton/rotary_attention.py).
//
// Not measured on a GPU yet, so Triton is the default.
#include <cmath>

#include "attention_arguments.h"
#include "attention_hopper.cuh"
#include "device.h"
#include "ops.h"
#include "tensor_map.h"

namespace mmalign {
namespace {

struct Forward {
  const Tensor &qkv, &cu_seqlens;
  AttentionCall call;
};

template <class T, int kHeadDim>
void launch(const Forward& forward, AttentionCall call) {
  const Tensor& qkv = forward.qkv;
  const uint64_t rows = qkv.size(0), columns = qkv.size(1), key_heads = call.shape.num_key_heads;
  const cudaStream_t stream = current_stream(qkv);
  const Tensor rotated =
      torch::stable::new_empty(qkv, {qkv.size(0), static_cast<int64_t>(key_heads * kHeadDim)});
  const int64_t entry = sizeof(ScheduledSample) / sizeof(int);
  const Tensor workspace = torch::stable::new_empty(qkv, {(call.num_samples + 2) * entry},
                                               ScalarType::Int);
  auto* table = static_cast<ScheduledSample*>(workspace.data_ptr());
  call.table = table;
  call.counter = &table[call.num_samples + 1].first_item;

  const dim3 grid(ceil_div<uint64_t>(rows, kRotateThreads / (kHeadDim / 16)),
                  ceil_div<int>(key_heads, kHeadsPerThread));
  rotate_keys_kernel<T, kHeadDim><<<grid, kRotateThreads, 0, stream>>>(
      static_cast<const T*>(qkv.data_ptr()), static_cast<T*>(rotated.data_ptr()),
      static_cast<const int*>(forward.cu_seqlens.data_ptr()), table, call);
  check_cuda(cudaGetLastError(), "rotate_keys");

  const std::array<cuuint32_t, 2> box{kBoxColumns, kKeyRows};
  const auto projection = tensor_map<2>(qkv.scalar_type(), qkv.data_ptr(), {columns, rows},
                                        {columns * sizeof(T)}, box);
  const auto keys =
      tensor_map<2>(qkv.scalar_type(), rotated.data_ptr(), {key_heads * kHeadDim, rows},
                    {key_heads * kHeadDim * sizeof(T)}, box);
  const auto kernel = rotary_attention_kernel<T, kHeadDim>;
  constexpr int kShared = AttentionShared<kHeadDim>::kBytes + kPatternBytes;
  allow_shared(kernel, kShared);
  const int64_t items = most_items(call.num_tokens, call.num_samples, call.shape.num_heads);
  const int blocks = static_cast<int>(std::min<int64_t>(items, num_multiprocessors()));
  kernel<<<blocks, kAttentionThreads, kShared, stream>>>(projection, keys, call);
  check_cuda(cudaGetLastError(), "rotary_attention");
}

constexpr const char* kName = "rotary_attention_fwd";

}  // namespace

std::tuple<Tensor, Tensor> rotary_attention_fwd(const Tensor& qkv, const Tensor& cos,
                                                const Tensor& sin, const Tensor& position_ids,
                                                const Tensor& cu_seqlens,
                                                int64_t num_attention_heads,
                                                int64_t num_key_value_heads, bool causal) {
  const int64_t head_dim = check_attention_shapes(kName, qkv, cos, sin, position_ids, cu_seqlens,
                                                  num_attention_heads, num_key_value_heads);
  check_attention_device(kName, qkv, cos, sin, position_ids, cu_seqlens);
  const torch::stable::accelerator::DeviceGuard guard(qkv.get_device_index());
  check_hopper(kName);
  const Tensor out = torch::stable::new_empty(qkv, {qkv.size(0), num_attention_heads * head_dim});
  const Tensor logsumexp =
      torch::stable::new_empty(qkv, {qkv.size(0), num_attention_heads}, ScalarType::Float);
  if (qkv.size(0) == 0) return {out, logsumexp};

  Forward forward{qkv, cu_seqlens, {}};
  AttentionCall& call = forward.call;
  call.cos = static_cast<const float*>(cos.data_ptr());
  call.sin = static_cast<const float*>(sin.data_ptr());
  call.position_ids = static_cast<const int*>(position_ids.data_ptr());
  call.out = out.data_ptr();
  call.logsumexp = static_cast<float*>(logsumexp.data_ptr());
  call.shape = {static_cast<int>(num_attention_heads), static_cast<int>(num_key_value_heads),
                static_cast<int>(head_dim)};
  call.num_tokens = static_cast<int>(qkv.size(0));
  call.num_samples = static_cast<int>(cu_seqlens.size(0)) - 1;
  call.scale = static_cast<float>(1.4426950408889634 / std::sqrt(static_cast<double>(head_dim)));
  call.causal = causal;
  const bool is_half = qkv.scalar_type() == ScalarType::Half;
  if (head_dim == 64)
    is_half ? launch<__half, 64>(forward, call) : launch<__nv_bfloat16, 64>(forward, call);
  else
    is_half ? launch<__half, 128>(forward, call) : launch<__nv_bfloat16, 128>(forward, call);
  return {out, logsumexp};
}

}  // namespace mmalign
