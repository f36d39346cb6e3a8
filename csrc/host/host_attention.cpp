// The attention kernel of rotary_attention.cu on the host, thread by thread, and its table of work.
#include <cstdio>

#include "../attention_block.h"
#include "attention_machine.h"

using namespace mmalign;

#define EXPORT extern "C" __attribute__((visibility("default")))

static std::vector<ScheduledSample> table_of(const int* cu_seqlens, int num_samples,
                                             int num_heads) {
  std::vector<ScheduledSample> table(num_samples + 1);
  for (int sample = num_samples - 1; sample >= 0; --sample)
    schedule_sample(cu_seqlens, num_samples, sample, num_heads, table.data());
  return table;
}

// items (num_items, 5): first row and length of the sample, tile, head, tiles of keys. Returns
// num_items; items may be null.
EXPORT int host_attention_items(const int* cu_seqlens, int num_samples, int num_heads,
                                int num_key_heads, int head_dim, int causal, int* items) {
  const AttentionShape shape = {num_heads, num_key_heads, head_dim};
  const auto table = table_of(cu_seqlens, num_samples, num_heads);
  int place = 0;
  for (int item = 0;; ++item) {
    const AttentionWork work =
        work_of_item(table.data(), num_samples, shape, causal != 0, item, place);
    if (work.num_key_tiles == 0) return item;
    const int fields[] = {work.first_row, work.length, work.tile, work.head, work.num_key_tiles};
    if (items) memcpy(items + 5 * item, fields, sizeof(fields));
  }
}

template <int kHeadDim>
static std::vector<uint16_t> rotated_keys(const uint16_t* qkv, const AttentionCall& call) {
  const int num_keys = call.shape.num_key_heads, all = call.shape.num_heads + 2 * num_keys;
  std::vector<uint16_t> rotated(int64_t{call.num_tokens} * num_keys * kHeadDim);
  for (int64_t token = 0; token < call.num_tokens; ++token)
    for (int head = 0; head < num_keys; ++head)
      for (int column = 0; column < kHeadDim / 2; column += 8) {
        const uint16_t* from =
            qkv + (token * all + call.shape.num_heads + head) * kHeadDim + column;
        uint16_t* to = rotated.data() + (token * num_keys + head) * kHeadDim + column;
        const int64_t angle = int64_t{call.position_ids[token]} * (kHeadDim / 2) + column;
        Chunk x, y;
        Angles cos, sin;
        memcpy(&x, from, 16), memcpy(&y, from + kHeadDim / 2, 16);
        memcpy(&cos, call.cos + angle, 32), memcpy(&sin, call.sin + angle, 32);
        rotate_chunks<HostBf16>(x, y, cos, sin);
        memcpy(to, &x, 16), memcpy(to + kHeadDim / 2, &y, 16);
      }
  return rotated;
}

template <int kHeadDim>
static void run_worker(AttentionCall call, const std::vector<HostTensor>& tensors, int worker,
                       int num_workers, uint32_t seed) {
  using Shared = AttentionShared<kHeadDim>;
  int next_item = worker;
  call.counter = &next_item;
  HostBlock block(3 * kWarpgroup, Shared::kBytes, seed + worker);
  for (int i = 0; i < Shared::kBarriers; ++i) block.add_barrier(Shared::arrivals(i));
  block.run([&](int thread) {
    HostMachine machine(block, thread, tensors, num_workers);
    if (thread >= kWarpgroup)
      attend_to_all<kHeadDim>(machine, call);
    else if (thread >= 32)
      rotate_queries<kHeadDim>(machine, call, thread / 32 - 1);
    else if (thread == 0)
      fetch<kHeadDim>(machine, call);
  });
}

template <int kHeadDim>
static void attention(const uint16_t* qkv, AttentionCall call, int num_workers, uint32_t seed) {
  const std::vector<uint16_t> rotated = rotated_keys<kHeadDim>(qkv, call);
  const int key_columns = call.shape.num_key_heads * kHeadDim;
  const int columns = call.shape.num_heads * kHeadDim + 2 * key_columns;
  const std::vector<HostTensor> tensors = {
      {qkv, call.num_tokens, columns, kKeyRows},
      {rotated.data(), call.num_tokens, key_columns, kKeyRows}};
  for (int worker = 0; worker < num_workers; ++worker)
    run_worker<kHeadDim>(call, tensors, worker, num_workers, seed);
}

// qkv and out are bits of bf16. Returns 0, or 1 where threads waited for each other.
EXPORT int host_attention(const uint16_t* qkv, const float* cos, const float* sin,
                          const int* position_ids, const int* cu_seqlens, int num_tokens,
                          int num_samples, int num_heads, int num_key_heads, int head_dim,
                          int causal, int num_workers, uint32_t seed, uint16_t* out,
                          float* logsumexp) {
  const auto table = table_of(cu_seqlens, num_samples, num_heads);
  const auto scale = static_cast<float>(1.4426950408889634 / std::sqrt(double(head_dim)));
  const AttentionShape shape = {num_heads, num_key_heads, head_dim};
  const AttentionCall call = {table.data(), cos,     sin,        position_ids, out,  logsumexp,
                              nullptr,      shape,   num_tokens, num_samples,  scale, causal != 0};
  try {
    head_dim == 64 ? attention<64>(qkv, call, num_workers, seed)
                   : attention<128>(qkv, call, num_workers, seed);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "host_attention: %s\n", error.what());
    return 1;
  }
  return 0;
}
