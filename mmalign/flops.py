"""How many floating-point operations a training step needs, and which share of a device's peak.

Counted are the products that the mathematics asks for, two operations a multiply-add: nothing that
padding, recomputation or a slow algorithm adds, and no elementwise work. A product y = x W^T has up
to three passes: forward, the gradient of x, the gradient of W; a pass counts only where the stage
needs it. So a frozen decoder costs 4 operations a weight and token, a trained one 6, the frozen
vision tower 2; the projector, whose input needs no gradient, 4.

Attention counts the pairs (query, key) that see each other: exactly length * (length + 1) / 2 of a
causal sample, length^2 of an image. Forward has 2 products a pair, the backward 5: the scores are
computed again, as FlashAttention counts it (arXiv 2307.08691, section 4.1). lm_head counts the
supervised rows only.

What a run spares with its shortcuts (ShortcutConfig) is counted all the same: tokens of a frozen
prefix, rows without a target in the last layer, the tower on images whose features are at hand. So
MFU says how fast the model as it is written learns, and rises with each of them;
mmalign/training/shortcuts.py counts what they spare.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, get_args

from mmalign.config import LoraConfig, LoraTarget, Stage, TrainConfig
from mmalign.model.config import DecoderConfig, VisionConfig
from mmalign.model.projector import ProjectorShape

if TYPE_CHECKING:
    from mmalign.batch import PackedBatch
    from mmalign.data.loader import Step
    from mmalign.model.llava import Llava


@dataclass(frozen=True)
class Workload:
    """The model's shapes and what of it learns."""

    decoder: DecoderConfig
    vision: VisionConfig | None = None  # None: text only, without tower and projector
    stage: Stage = "finetune"
    lora: LoraConfig = field(default_factory=LoraConfig)

    @classmethod
    def of(cls, model: "Llava", config: TrainConfig) -> "Workload":
        """What `config` trains of `model`."""
        vision = None if model.vision_tower is None else model.vision_tower.config
        return cls(model.decoder.config, vision, config.stage, config.lora)

    @property
    def projector(self) -> ProjectorShape | None:
        if self.vision is None:
            return None
        return ProjectorShape(self.vision.hidden_size, self.decoder.hidden_size)

    @property
    def trains_decoder(self) -> bool:
        """Whether the decoder's own weights learn, not only adapters or the projector."""
        return self.stage == "finetune" and self.lora.rank == 0

    @property
    def trains_embeddings(self) -> bool:
        """Whether embed_tokens and lm_head learn."""
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
    layers, heads_size = decoder.num_hidden_layers, decoder.qkv_sizes[0]
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    tower = tower_flops(workload.vision, num_images) if workload.vision else Flops()
    return tower + Flops(
        projections=2 * tokens * layers * sum(n * k for n, k in projections(decoder).values()),
        adapters=2 * tokens * layers * _adapter_weights(workload),
        attention=4 * heads_size * layers * pairs,
        lm_head=2 * num_loss_tokens * decoder.hidden_size * decoder.vocab_size,
        projector=_projector_flops(workload, num_images, backward=False),
    )


def batch_flops(workload: Workload, batch: "PackedBatch") -> Flops:
    """Training FLOPs of one PackedBatch on the CPU (on a GPU, reading cu_seqlens waits for it)."""
    lengths = (batch.cu_seqlens.diff() + batch.prefix_length).tolist()
    return model_flops(workload, lengths, batch.num_loss_tokens, num_images(workload, batch))


def num_images(workload: Workload, batch: "PackedBatch") -> int:
    """Of the batch, those among them whose features are at hand."""
    return len(batch.image_positions) // workload.vision.num_patches if workload.vision else 0


def step_flops(workload: Workload, step: "Step") -> Flops:
    """Training FLOPs of an optimizer step of one process: of its own micro-batches."""
    return sum((batch_flops(workload, batch) for batch in step.batches), Flops())


def projections(decoder: DecoderConfig) -> dict[LoraTarget, tuple[int, int]]:
    """(out_features, in_features) of the seven projections of a layer, as LoRA adapts them."""
    hidden, inner = decoder.hidden_size, decoder.intermediate_size
    qkv = [(size, hidden) for size in decoder.qkv_sizes]
    mlp = [(inner, hidden), (inner, hidden), (hidden, inner)]
    shapes = [*qkv, (hidden, decoder.qkv_sizes[0]), *mlp]
    return dict(zip(get_args(LoraTarget), shapes, strict=True))


def adapted_projections(workload: Workload) -> list[tuple[int, int]]:
    """(out_features, in_features) of a layer's projections that have an adapter."""
    targets = workload.lora.targets if workload.adapter_rank else ()
    return [shape for name, shape in projections(workload.decoder).items() if name in targets]


def _adapter_weights(workload: Workload) -> int:
    """Numbers in the adapters of one layer."""
    return workload.adapter_rank * sum(n + k for n, k in adapted_projections(workload))


def _first_layer_skips(workload: Workload, tokens: int) -> Flops:
    """Gradients of x that nobody asks for: the first layer's input, where nothing below learns."""
    if workload.vision or workload.trains_embeddings or workload.adapter_rank == 0:
        return Flops()
    hidden, qkv_sizes = workload.decoder.hidden_size, workload.decoder.qkv_sizes
    num_adapted = len({"q_proj", "k_proj", "v_proj"} & set(workload.lora.targets))
    return Flops(
        projections=2 * tokens * hidden * sum(qkv_sizes),
        adapters=2 * tokens * hidden * workload.adapter_rank * num_adapted,
    )


def _projector_flops(workload: Workload, num_images: int, backward: bool) -> int:
    if workload.vision is None:
        return 0
    return workload.projector.flops(num_images * workload.vision.num_patches, backward)


def tower_flops(vision: VisionConfig, num_images: int) -> Flops:
    """CLIP up to the second-to-last layer's output: the last layer is never computed."""
    hidden, seqlen, layers = vision.hidden_size, vision.seqlen, vision.num_layers_used
    weights = layers * (4 * hidden**2 + 2 * hidden * vision.intermediate_size)
    patches = vision.num_patches * 3 * vision.patch_size**2 * hidden
    return Flops(
        tower=2 * num_images * (seqlen * weights + patches),
        tower_attention=4 * num_images * layers * hidden * seqlen**2,
    )


# Published dense bf16 rates (half of what a data sheet gives with sparsity), FLOP/s: NVIDIA's data
# sheets of H100, H200, B200 (HGX), A100, L40S; the white papers of GA102 and Ada for the others,
# with fp32 accumulation. The first pattern that is found in the device's name holds.
_PEAKS = (
    (r"\bH100 PCIe", 756e12),
    (r"\bH[12]00 NVL", 835.5e12),
    (r"\bG?H[128]00\b", 989.4e12),
    (r"\bB200\b", 2250e12),
    (r"\bA[18]00\b", 312e12),
    (r"\bL40S\b", 362e12),
    (r"\bRTX A6000\b", 154.8e12),
    (r"\bRTX 4090\b", 165.2e12),
    (r"\bRTX 3090\b(?! Ti)", 71e12),
)


def peak_bf16_flops(device_name: str) -> float | None:
    """Published dense bf16 FLOP/s of a device as torch.cuda.get_device_name calls it, or None."""
    return next((peak for name, peak in _PEAKS if re.search(name, device_name)), None)
