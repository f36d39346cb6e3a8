// The kernels of rotary_attention_backward.cu on the host, thread by thread.
#include <cstdio>

#include "../attention_gradient_block.h"
#include "attention_machine.h"

using namespace mmalign;

#define EXPORT extern "C" __attribute__((visibility("default")))

// What prepare_gradient_kernel leaves: queries and keys rotated, and the statistics of queries.
struct Prepared {
  std::vector<uint16_t> rotated;
  std::vector<float> statistics;
};

template <int kHeadDim>
static Prepared prepare(const uint16_t* qkv, const uint16_t* out, const uint16_t* grad_out,
                        const float* logsumexp, const GradientCall& call) {
  const int num_heads = call.shape.num_heads, num_rotated = num_heads + call.shape.num_key_heads;
  Prepared prepared = {std::vector<uint16_t>(int64_t{call.num_tokens} * num_rotated * kHeadDim),
                       std::vector<float>(2 * num_heads * call.num_tokens)};
  for (int64_t token = 0; token < call.num_tokens; ++token)
    for (int head = 0; head < num_rotated; ++head) {
      const uint16_t* from = qkv + token * call.columns() + head * kHeadDim;
      uint16_t* to = prepared.rotated.data() + (token * num_rotated + head) * kHeadDim;
      float delta = 0;
      for (int column = 0; column < kHeadDim / 2; column += 8) {
        const int64_t angle = int64_t{call.position_ids[token]} * (kHeadDim / 2) + column;
        Chunk x, y;
        Angles cos, sin;
        memcpy(&x, from + column, 16), memcpy(&y, from + column + kHeadDim / 2, 16);
        memcpy(&cos, call.cos + angle, 32), memcpy(&sin, call.sin + angle, 32);
        rotate_chunks<HostBf16>(x, y, cos, sin);
        memcpy(to + column, &x, 16), memcpy(to + column + kHeadDim / 2, &y, 16);
        if (head >= num_heads) continue;
        for (const int half : {0, kHeadDim / 2}) {
          const int64_t at = (token * num_heads + head) * kHeadDim + column + half;
          memcpy(&x, out + at, 16), memcpy(&y, grad_out + at, 16);
          delta += dot<HostBf16>(x, y);
        }
      }
      if (head >= num_heads) continue;
      prepared.statistics[head * call.num_tokens + token] =
          logsumexp[token * num_heads + head] * kLog2E;
      prepared.statistics[(num_heads + head) * call.num_tokens + token] = delta;
    }
  return prepared;
}

template <Gradient kOf, int kHeadDim>
static void run(GradientCall call, const int* cu_seqlens, const std::vector<HostTensor>& tensors,
                int num_workers, uint32_t seed) {
  using Shared = GradientShared<kHeadDim>;
  const bool queries = kOf == Gradient::kQueries;
  std::vector<ScheduledSample> table(call.num_samples + 1);
  for (int sample = 0; sample < call.num_samples; ++sample)
    schedule_sample(cu_seqlens, call.num_samples, sample,
                    queries ? call.shape.num_heads : call.shape.num_key_heads, table.data());
  call.table = table.data();
  for (int worker = 0; worker < num_workers; ++worker) {
    int next_item = worker;
    call.counter = &next_item;
    HostBlock block(3 * kWarpgroup, Shared::kBytes, seed + worker);
    for (int i = 0; i < Shared::kBarriers; ++i) block.add_barrier(Shared::arrivals(kOf, i));
    block.run([&](int thread) {
      HostMachine machine(block, thread, tensors, num_workers);
      if (thread >= kWarpgroup)
        compute_gradients<kOf, kHeadDim>(machine, call);
      else if (thread == 0)
        fetch_pairs<kOf, kHeadDim>(machine, call);
      else if (!queries && thread / 32 == 1)
        bring_statistics<kHeadDim>(machine, call);
    });
  }
}

template <int kHeadDim>
static void backward(const uint16_t* qkv, const uint16_t* out, const uint16_t* grad_out,
                     const float* logsumexp, const int* cu_seqlens, GradientCall call,
                     int num_workers, uint32_t seed) {
  const Prepared prepared = prepare<kHeadDim>(qkv, out, grad_out, logsumexp, call);
  call.statistics = prepared.statistics.data();
  const int columns = static_cast<int>(call.columns()), rows = call.num_tokens;
  const int values = call.shape.num_key_heads * kHeadDim, heads = call.shape.num_heads * kHeadDim;
  const std::vector<HostTensor> tensors = {
      {qkv, rows, columns, kGradientRows},
      {prepared.rotated.data(), rows, columns - values, kGradientRows},
      {grad_out, rows, heads, kGradientRows}};
  run<Gradient::kQueries, kHeadDim>(call, cu_seqlens, tensors, num_workers, seed);
  run<Gradient::kKeys, kHeadDim>(call, cu_seqlens, tensors, num_workers, seed);
}

// qkv, out, grad_out and grad are bits of bf16. Returns 0, or 1 where all threads wait.
EXPORT int host_attention_backward(const uint16_t* qkv, const uint16_t* out,
                                   const uint16_t* grad_out, const float* logsumexp,
                                   const float* cos, const float* sin, const int* position_ids,
                                   const int* cu_seqlens, int num_tokens, int num_samples,
                                   int num_heads, int num_key_heads, int head_dim, int causal,
                                   int num_workers, uint32_t seed, uint16_t* grad) {
  GradientCall call = {};
  call.cos = cos;
  call.sin = sin;
  call.position_ids = position_ids;
  call.grad = grad;
  call.shape = {num_heads, num_key_heads, head_dim};
  call.num_tokens = num_tokens;
  call.num_samples = num_samples;
  call.root = static_cast<float>(1 / std::sqrt(double(head_dim)));
  call.scale = kLog2E * call.root;
  call.causal = causal != 0;
  const auto function = head_dim == 64 ? backward<64> : backward<128>;
  try {
    function(qkv, out, grad_out, logsumexp, cu_seqlens, call, num_workers, seed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "host_attention_backward: %s\n", error.what());
    return 1;
  }
  return 0;
}
