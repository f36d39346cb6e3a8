"""Which shortcuts a run takes (mmalign/model/llava.py computes them), and what they spare.

Of a step's FLOPs with LLaMA2-7B and CLIP ViT-L/14 at 224 px, of samples as in tests/training/
test_shortcuts.py: stage 1 with template v0 (330 tokens, 37 of them before the image, 22 with a
target) the prefix 11.0%, rows of the last layer 2.1%; stage 2 (550 tokens, 242 with a target) rows
of the last layer 1.4%.
"""

from collections.abc import Iterable

from mmalign.config import ShortcutConfig, TrainConfig
from mmalign.data.check import CheckReport
from mmalign.flops import Flops, Workload, model_flops, projections

FEWEST_PREFIX_TOKENS = 8  # fewer save less than joining them to the attention costs


def frozen_prefix(config: TrainConfig, report: CheckReport) -> list[int]:
    """Ids of the tokens that leave the rows of every sample; empty where nothing does."""
    wanted = config.shortcuts.frozen_prefix and config.stage == "pretrain"
    if not wanted or len(report.prefix) < FEWEST_PREFIX_TOKENS:
        return []
    return report.prefix.tolist()


def needed_flops(
    workload: Workload,
    shortcuts: ShortcutConfig,
    lengths: Iterable[int],
    num_loss_tokens: int,
    num_images: int,
    prefix_length: int = 0,
) -> Flops:
    """model_flops without what the decoder never computes.

    lengths: of whole samples, the prefix included; prefix_length as in PackedBatch. What the
    prefix costs once a run is not counted.
    """
    lengths = [int(length) for length in lengths]
    needed = model_flops(workload, lengths, num_loss_tokens, num_images)
    if prefix_length:
        needed -= _of_prefix(workload, lengths, prefix_length)
    if shortcuts.last_layer_rows:
        rows = sum(lengths) - len(lengths) * prefix_length - num_loss_tokens
        needed -= _of_last_layer(workload, rows)
    return needed


def _of_prefix(workload: Workload, lengths: list[int], prefix_length: int) -> Flops:
    """All of the prefix's own rows; of the later rows' pairs with it, the gradients of k and v."""
    own = model_flops(workload, [prefix_length] * len(lengths), 0, 0)
    decoder = workload.decoder
    pairs = prefix_length * sum(length - prefix_length for length in lengths)
    constant = 2 * 2 * decoder.qkv_sizes[0] * decoder.num_hidden_layers * pairs
    return own + Flops(attention=constant)


def _of_last_layer(workload: Workload, rows: int) -> Flops:
    """Queries, output projection and MLP of so many rows, with their adapters."""
    kept = ("k_proj", "v_proj")
    shapes = {k: v for k, v in projections(workload.decoder).items() if k not in kept}
    targets = workload.lora.targets if workload.adapter_rank else ()
    adapted = workload.adapter_rank * sum(sum(shapes[name]) for name in shapes if name in targets)
    passes = 3 if workload.trains_decoder else 2
    weights = sum(out_features * in_features for out_features, in_features in shapes.values())
    return Flops(projections=2 * passes * rows * weights, adapters=2 * 3 * rows * adapted)
