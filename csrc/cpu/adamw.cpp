// AdamW, a list of parameters in one pass: a block of state is made fp32, updated, narrowed and
// written while it is in the L1 cache. What is fp32 already is updated in place.
#include <torch/csrc/stable/library.h>

#include <optional>
#include <vector>

#include "adamw_block.h"
#include "rows.h"
#include "tensors.h"

namespace mmalign {

namespace {

constexpr const char* kName = "adamw_update";
constexpr int64_t kBlock = 512;     // elements: the fp32 forms of four tensors take 8 KiB
constexpr int64_t kPart = 1 << 18;  // elements that share keys, as in cpu/adamw.py
static_assert(kBlock % kQuantizedBlock == 0 && kPart % kBlock == 0 && kBlock % kTheirLanes == 0);

struct Moment {
  void* data;     // fp32; bf16; or codes, with scales
  float* scales;  // or null
};

struct Parameter {
  int64_t numel;
  void* weights;
  const void* grads;
  int16_t* remainders;  // or null
  Moment m, v;
  const int32_t* keys;  // (parts, rounded tensors, 2), in the order m, v, weights
};

struct Call {
  AdamwSettings settings;
  bool narrow_weights, narrow_grads, narrow_moments;
  std::vector<Parameter> parameters;
};

// Elements `begin` to `begin + count` in fp32: themselves, or a copy in `buffer`.
float* read_weights(const Call& call, const Parameter& x, int64_t begin, int64_t count,
                    float* buffer) {
  if (!call.narrow_weights) return static_cast<float*>(x.weights) + begin;
  const auto* weights = static_cast<const uint16_t*>(x.weights) + begin;
  if (x.remainders) {
    join_block(weights, x.remainders + begin, count, buffer);
  } else {
    widen_block(weights, count, buffer);
  }
  return buffer;
}

const float* read_grads(const Call& call, const Parameter& x, int64_t begin, int64_t count,
                        float* buffer) {
  if (!call.narrow_grads) return static_cast<const float*>(x.grads) + begin;
  widen_block(static_cast<const uint16_t*>(x.grads) + begin, count, buffer);
  return buffer;
}

template <bool kFirst>
float* read_moment(const Call& call, const Moment& x, int64_t begin, int64_t count, float* buffer) {
  if (!call.narrow_moments) return static_cast<float*>(x.data) + begin;
  if (x.scales) {
    const auto* codes = static_cast<const uint8_t*>(x.data) + begin;
    decode_block<kFirst>(codes, x.scales + begin / kQuantizedBlock, count, buffer);
  } else {
    widen_block(static_cast<const uint16_t*>(x.data) + begin, count, buffer);
  }
  return buffer;
}

template <bool kFirst>
void write_moment(const float* from, const Moment& x, int64_t begin, int64_t count,
                  const Draws& draws) {
  if (x.scales) {
    auto* codes = static_cast<uint8_t*>(x.data) + begin;
    encode_block<kFirst>(from, count, draws, codes, x.scales + begin / kQuantizedBlock);
  } else {
    round_block(from, count, draws, static_cast<uint16_t*>(x.data) + begin);
  }
}

int num_rounded(const Call& call, bool splits) {
  return 2 * call.narrow_moments + (call.narrow_weights && !splits);
}

void update(const Call& call, const Parameter& x, int64_t begin) {
  float weights[kBlock], grads[kBlock], first_moments[kBlock], second_moments[kBlock];
  const int64_t count = std::min(kBlock, x.numel - begin);
  const AdamwBlock block{read_weights(call, x, begin, count, weights),
                         read_grads(call, x, begin, count, grads),
                         read_moment<true>(call, x.m, begin, count, first_moments),
                         read_moment<false>(call, x.v, begin, count, second_moments)};
  const int64_t left_over = begin + count == x.numel ? x.numel % kTheirLanes : 0;
  update_block(call.settings, block, count - left_over, count);

  const int rounded = num_rounded(call, x.remainders);
  const int32_t* keys = x.keys + 2 * rounded * (begin / kPart);
  const auto draws = [&](int index) {
    const auto high = static_cast<uint32_t>(keys[2 * index]);
    return Draws{(high << 16) + static_cast<uint32_t>(keys[2 * index + 1]),
                 static_cast<uint32_t>(begin % kPart)};
  };
  if (call.narrow_moments) {
    write_moment<true>(block.m, x.m, begin, count, draws(0));
    write_moment<false>(block.v, x.v, begin, count, draws(1));
  }
  if (!call.narrow_weights) return;
  auto* to = static_cast<uint16_t*>(x.weights) + begin;
  if (x.remainders) {
    split_block(block.p, count, to, x.remainders + begin);
  } else {
    round_block(block.p, count, draws(rounded - 1), to);
  }
}

// Blocks of all parameters are dealt to the threads: many are small.
void update_all(const Call& call) {
  std::vector<int64_t> first_blocks{0};
  for (const Parameter& x : call.parameters) {
    first_blocks.push_back(first_blocks.back() + ceil_div(x.numel, kBlock));
  }
  share_rows(first_blocks.back(), kBlock, [&](int64_t first, int64_t last) {
    size_t i = 0;
    for (int64_t block = first; block < last; ++block) {
      while (block >= first_blocks[i + 1]) ++i;
      update(call, call.parameters[i], (block - first_blocks[i]) * kBlock);
    }
  });
}

using Tensors = std::vector<Tensor>;

// The data of tensor i of a list; null where the list is empty.
void* data(const char* name, const Tensors& tensors, size_t i, int64_t numel, ScalarType type) {
  if (tensors.empty()) return nullptr;
  const Argument argument(kName, name, tensors.at(i), static_cast<int64_t>(i));
  argument.typed({type}).contiguous().sized(numel, "params");
  return tensors[i].data_ptr();
}

// keys (parts of all parameters, rounded tensors, 2): int32 in [0, 2^16); equal ones round alike.
void adamw_update(Tensors params, Tensors grads, Tensors exp_avgs, Tensors exp_avg_sqs,
                  Tensors remainders, Tensors exp_avg_scales, Tensors exp_avg_sq_scales,
                  const std::optional<Tensor>& grad_scale, const Tensor& keys, int64_t step,
                  double learning_rate, double beta1, double beta2, double eps,
                  double weight_decay) {
  Call call{};
  call.settings = adamw_settings(step, learning_rate, beta1, beta2, eps, weight_decay);
  if (grad_scale) {
    dense_floats(Argument(kName, "grad_scale", *grad_scale).rank(0));
    const float scale = *floats(*grad_scale);
    if (!(scale > 0)) return;  // 0 or NaN: the step is skipped
    call.settings.divisor = 1 / scale;
  }
  const ScalarType weight = params[0].scalar_type(), grad = grads[0].scalar_type();
  const ScalarType moment = exp_avgs[0].scalar_type();
  call.narrow_weights = weight != ScalarType::Float;
  call.narrow_grads = grad != ScalarType::Float;
  call.narrow_moments = moment != ScalarType::Float;
  const int64_t keys_of_part = 2 * num_rounded(call, !remainders.empty());
  Argument(kName, "keys", keys).typed({ScalarType::Int}).contiguous();
  const auto* next_keys = static_cast<const int32_t*>(keys.data_ptr());
  for (size_t i = 0; i < params.size(); ++i) {
    const int64_t numel = params[i].numel(), blocks = ceil_div<int64_t>(numel, kQuantizedBlock);
    const auto scales = [&](const char* name, const Tensors& tensors) {
      return static_cast<float*>(data(name, tensors, i, blocks, ScalarType::Float));
    };
    call.parameters.push_back(
        {numel,
         data("params", params, i, numel, weight),
         data("grads", grads, i, numel, grad),
         static_cast<int16_t*>(data("remainders", remainders, i, numel, ScalarType::Short)),
         {data("exp_avgs", exp_avgs, i, numel, moment), scales("exp_avg_scales", exp_avg_scales)},
         {data("exp_avg_sqs", exp_avg_sqs, i, numel, moment),
          scales("exp_avg_sq_scales", exp_avg_sq_scales)},
         next_keys});
    next_keys += keys_of_part * ceil_div(numel, kPart);
  }
  Argument(kName, "keys", keys)
      .sized(next_keys - static_cast<const int32_t*>(keys.data_ptr()), "params");
  update_all(call);
}

}  // namespace

}  // namespace mmalign

STABLE_TORCH_LIBRARY_FRAGMENT(mmalign_cpu, library) {
  library.def(
      "adamw_update(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs,"
      " Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] remainders, Tensor(e!)[] exp_avg_scales,"
      " Tensor(f!)[] exp_avg_sq_scales, Tensor? grad_scale, Tensor keys, int step,"
      " float learning_rate, float beta1, float beta2, float eps, float weight_decay) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(mmalign_cpu, CPU, library) {
  library.impl("adamw_update", TORCH_BOX(&mmalign::adamw_update));
}
