"""Floating-point operations of a training step, and the peak rates of GPUs.

Counted are the matrix products of the model, with 2 FLOPs per multiply-add: nothing that padding,
recomputation or a slow algorithm adds, and no elementwise work. A product y = x W^T has up to three
passes: forward, the gradient of x, the gradient of W; a pass counts only where the stage needs it.
So a frozen decoder costs 4 FLOPs per weight and token, a trained one 6, the frozen vision tower 2,
and the projector's first layer, whose input needs no gradient, 4.

Attention counts the pairs (query, key) that attend: exactly length * (length + 1) / 2 per causal
sample, length^2 per image. The forward pass has 2 products per pair, the backward pass 5: it
recomputes the scores, as FlashAttention counts it (arXiv 2307.08691, section 4.1). lm_head counts
the supervised rows only.

model_flops, and with it MFU, counts the model as it is written: work that ShortcutConfig saves is
included, so MFU rises with the shortcuts. required_flops leaves it out. With LLaMA2-7B and CLIP
ViT-L/14 at 224 px, a stage 1 step with template v0 (330 tokens, 37 of them in the shared prefix, 22
with a target) saves 13.0%, 2.4% with last_layer_rows alone; stage 2 (550 tokens, 242 with a target)
saves 1.4%.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import get_args

from mmalign.batch import PackedBatch
from mmalign.config import (
    LoraConfig,
    LoraTarget,
    ProjectorType,
    ShortcutConfig,
    Stage,
    TrainConfig,
)
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.projector import ProjectorShape
from mmalign.system import GPUS


@dataclass(frozen=True)
class Workload:
    """The model's shapes and what of it is trained."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None  # None: text only, without tower and projector
    stage: Stage = "finetune"
    lora: LoraConfig = field(default_factory=LoraConfig)
    projector_type: ProjectorType = "linear"

    @classmethod
    def from_config(
        cls,
        config: TrainConfig,
        decoder: DecoderConfig | None = None,
        vision: VisionConfig | None = None,
    ) -> "Workload":
        """What `config` trains of a model of these shapes, without a decoder: of its folders'.

        The folders' decoder lacks the rows of image tokens that build_model appends: at most 3 of
        some 32,000, which FLOPs and memory plan do not notice.
        """
        if decoder is None:
            decoder = DecoderConfig.from_hf(config.model.decoder)
            if not config.data.text_only:
                vision = VisionConfig.from_hf(config.model.vision_tower)
        return cls(decoder, vision, config.stage, config.lora, config.model.projector_type)

    @property
    def projector(self) -> ProjectorShape | None:
        if self.vision is None:
            return None
        sizes = self.vision.hidden_size, self.decoder.hidden_size
        return ProjectorShape(*sizes, self.projector_type)

    @property
    def trains_decoder(self) -> bool:
        """Whether the decoder's own weights are trained, not only adapters or the projector."""
        return self.stage == "finetune" and self.lora.rank == 0

    @property
    def trains_embeddings(self) -> bool:
        """Whether embed_tokens and lm_head are trained."""
        adapted = self.stage == "finetune" and self.lora.rank > 0
        return self.trains_decoder or (adapted and self.lora.train_embeddings)

    @property
    def adapter_rank(self) -> int:
        return self.lora.rank if self.stage == "finetune" else 0


@dataclass(frozen=True)
class Flops:
    """Floating-point operations by part of the model."""

    projections: int = 0  # qkv_proj, o_proj, gate_up_proj, down_proj of the decoder
    adapters: int = 0  # LoRA
    attention: int = 0  # of the decoder
    lm_head: int = 0
    projector: int = 0
    tower: int = 0  # matrix products of the vision tower
    tower_attention: int = 0

    def __add__(self, other: "Flops") -> "Flops":
        return Flops(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def __sub__(self, other: "Flops") -> "Flops":
        return Flops(
            **{f.name: getattr(self, f.name) - getattr(other, f.name) for f in fields(self)}
        )

    @property
    def total(self) -> int:
        return sum(getattr(self, f.name) for f in fields(self))


def model_flops(
    workload: Workload, lengths: Iterable[int], num_loss_tokens: int, num_images: int
) -> Flops:
    """Forward and backward pass of one packed batch, and of any batches with these sums.

    lengths: tokens of each sample, image tokens included (they decide the attention);
    num_loss_tokens: rows with a target. For a PackedBatch use batch_flops, for a Step step_flops.
    """
    lengths = [int(length) for length in lengths]
    forward = forward_flops(workload, lengths, num_loss_tokens, num_images)
    base = 3 if workload.trains_decoder else 2
    skipped = _first_layer_skips(workload, sum(lengths))
    return Flops(
        projections=base * forward.projections - skipped.projections,
        adapters=3 * forward.adapters - skipped.adapters,
        attention=forward.attention * 7 // 2,
        lm_head=forward.lm_head * (3 if workload.trains_embeddings else 2),
        projector=_projector_flops(workload, num_images, backward=True),
        tower=forward.tower,
        tower_attention=forward.tower_attention,
    )


def forward_flops(
    workload: Workload, lengths: Iterable[int], num_loss_tokens: int, num_images: int
) -> Flops:
    """The forward pass alone; arguments as in model_flops."""
    lengths = [int(length) for length in lengths]
    decoder, tokens = workload.decoder, sum(lengths)
    layers, q_size = decoder.num_hidden_layers, decoder.qkv_sizes[0]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    tower = tower_flops(workload.vision, num_images) if workload.vision else Flops()
    return tower + Flops(
        projections=2 * tokens * layers * sum(n * k for n, k in projections(decoder).values()),
        adapters=2 * tokens * layers * _adapter_weights(workload),
        attention=4 * q_size * layers * pairs,
        lm_head=2 * num_loss_tokens * decoder.hidden_size * decoder.vocab_size,
        projector=_projector_flops(workload, num_images, backward=False),
    )


def batch_flops(workload: Workload, batch: PackedBatch) -> Flops:
    """Training FLOPs of one PackedBatch on the CPU (on a GPU, reading cu_seqlens synchronises)."""
    lengths = (batch.cu_seqlens.diff() + batch.prefix_length).tolist()
    return model_flops(workload, lengths, batch.num_loss_tokens, num_images(workload, batch))


def num_images(workload: Workload, batch: PackedBatch) -> int:
    """That the tower sees; of tiles the projector is counted as if no row of them were left out."""
    return len(batch.pixel_values) if workload.vision else 0


def step_flops(workload: Workload, batches: Iterable[PackedBatch]) -> Flops:
    """Training FLOPs of the micro-batches of one rank's step."""
    return sum((batch_flops(workload, batch) for batch in batches), Flops())


def required_flops(
    workload: Workload,
    shortcuts: ShortcutConfig,
    lengths: Iterable[int],
    num_loss_tokens: int,
    num_images: int,
    prefix_length: int = 0,
) -> Flops:
    """model_flops without what the shortcuts save.

    lengths: of whole samples, the prefix included; prefix_length: as in PackedBatch. The one
    forward pass per run that computes the prefix is not counted.
    """
    lengths = [int(length) for length in lengths]
    required = model_flops(workload, lengths, num_loss_tokens, num_images)
    if prefix_length:
        required -= _saved_by_prefix(workload, lengths, prefix_length)
    if shortcuts.last_layer_rows:
        rows = sum(lengths) - len(lengths) * prefix_length - num_loss_tokens
        required -= _saved_in_last_layer(workload, rows)
    return required


def _saved_by_prefix(workload: Workload, lengths: list[int], prefix_length: int) -> Flops:
    """All of the prefix's rows; and, of later rows' attention to it, the gradients of k and v."""
    own = model_flops(workload, [prefix_length] * len(lengths), 0, 0)
    decoder = workload.decoder
    pairs = prefix_length * sum(length - prefix_length for length in lengths)
    constant = 2 * 2 * decoder.qkv_sizes[0] * decoder.num_hidden_layers * pairs
    return own + Flops(attention=constant)


def _saved_in_last_layer(workload: Workload, rows: int) -> Flops:
    """Queries, output projection and MLP of so many rows, with their adapters."""
    computed = ("k_proj", "v_proj")
    shapes = {k: v for k, v in projections(workload.decoder).items() if k not in computed}
    targets = workload.lora.targets if workload.adapter_rank else ()
    adapted = workload.adapter_rank * sum(sum(shapes[name]) for name in shapes if name in targets)
    passes = 3 if workload.trains_decoder else 2
    weights = sum(out_features * in_features for out_features, in_features in shapes.values())
    return Flops(projections=2 * passes * rows * weights, adapters=2 * 3 * rows * adapted)


def projections(decoder: DecoderConfig) -> dict[LoraTarget, tuple[int, int]]:
    """(out_features, in_features) of the seven projections of a layer, as LoRA adapts them."""
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    qkv = [(size, hidden) for size in decoder.qkv_sizes]
    mlp = [(intermediate, hidden), (intermediate, hidden), (hidden, intermediate)]
    shapes = [*qkv, (hidden, decoder.qkv_sizes[0]), *mlp]
    return dict(zip(get_args(LoraTarget), shapes, strict=True))


def adapted_projections(workload: Workload) -> list[tuple[int, int]]:
    """(out_features, in_features) of a layer's projections that have an adapter."""
    targets = workload.lora.targets if workload.adapter_rank else ()
    return [shape for name, shape in projections(workload.decoder).items() if name in targets]


def _adapter_weights(workload: Workload) -> int:
    """Number of adapter weights in one layer."""
    return workload.adapter_rank * sum(n + k for n, k in adapted_projections(workload))


def _first_layer_skips(workload: Workload, tokens: int) -> Flops:
    """The gradient of the first layer's input, which is not needed where nothing below learns."""
    if workload.vision or workload.trains_embeddings or workload.adapter_rank == 0:
        return Flops()
    hidden, qkv_sizes = workload.decoder.hidden_size, workload.decoder.qkv_sizes
    num_adapted = len({"q_proj", "k_proj", "v_proj"} & set(workload.lora.targets))
    return Flops(
        projections=2 * tokens * hidden * sum(qkv_sizes),
        adapters=2 * tokens * hidden * workload.adapter_rank * num_adapted,
    )


def _projector_flops(workload: Workload, num_images: int, backward: bool) -> int:
    if workload.vision is None or workload.projector is None:
        return 0
    return workload.projector.flops(num_images * workload.vision.num_patches, backward)


def tower_flops(vision: VisionConfig, num_images: int) -> Flops:
    """Up to the layer that the projector reads; the layers after it are never computed."""
    hidden, seqlen, layers = vision.hidden_size, vision.seqlen, vision.num_layers_used
    weights = layers * (4 * hidden**2 + 2 * hidden * vision.intermediate_size)
    patches = vision.num_patches * 3 * vision.patch_size**2 * hidden
    return Flops(
        tower=2 * num_images * (seqlen * weights + patches),
        tower_attention=4 * num_images * layers * hidden * seqlen**2,
    )


def peak_bf16_flops(device_name: str) -> float | None:
    """Published dense bf16 FLOP/s of a device as torch.cuda.get_device_name calls it, or None."""
    found = (gpu.bf16_flops for gpu in GPUS if re.search(gpu.pattern, device_name))
    return next(found, None)
