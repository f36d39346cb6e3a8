#pragma once

#include "attention_samples.h"

namespace mmalign {

// A KV cache, and the spans of it that each segment (a sample of Attention) attends to.
struct PrefixCache {
  float *keys, *values;  // (capacity, key_value_heads, head_dim), keys rotated
  const int32_t *span_begins, *span_ends;  // (num_spans,)
  const int32_t* cu_spans;                 // (num_segments + 1,)
};

// Writes the new keys and values into the cache, and out (total_tokens, heads * head_dim).
void prefix_attention(const Attention& call, const PrefixCache& cache, float* out);

}  // namespace mmalign
