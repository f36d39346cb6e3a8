"""Bytes that the forward pass saves for the backward pass, from shapes alone.

The list of what each operation of mmalign/model saves; tests/training/test_memory_plan.py compares
it with the tensors that the autograd graph really saves.
"""

from dataclasses import dataclass, field

from mmalign.config import LoraTarget, TrainConfig
from mmalign.data.templates import trains_image_tokens
from mmalign.flops import Workload
from mmalign.model.recompute import Recompute, policy_by_layer
from mmalign.system import DTYPES

QKV: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj")
KINDS = ("residual stream", "attention", "mlp", "adapters", "image features", "loss")


@dataclass(frozen=True)
class MicroBatch:
    """The sizes of a packed batch that decide its memory."""

    tokens: int
    loss_rows: int  # with a target
    image_rows: int  # patches of images


@dataclass
class Saved:
    """Saved tensors, each once: {(kind, name): bytes}."""

    tensors: dict[tuple[str, object], int] = field(default_factory=dict)

    def add(self, kind: str, name: object, num_bytes: int) -> None:
        self.tensors[kind, name] = num_bytes

    def by_kind(self) -> dict[str, int]:
        totals: dict[str, int] = dict.fromkeys(KINDS, 0)
        for (kind, _), num_bytes in self.tensors.items():
            totals[kind] += num_bytes
        return totals


@dataclass(frozen=True)
class Activations:
    """Of one model, stage and precision."""

    workload: Workload
    itemsize: int  # of the activations: 4 for fp32, 2 for bf16
    mask_itemsize: int  # of a number in dropout's mask: a byte on a GPU, the activations' on a CPU
    last_layer_rows: bool  # as in ShortcutConfig
    trains_image_tokens: bool  # stage 1 trains <im_start> and <im_end>

    @classmethod
    def from_config(
        cls, workload: Workload, config: TrainConfig, device_type: str
    ) -> "Activations":
        itemsize = DTYPES[config.precision].itemsize
        return cls(
            workload,
            itemsize,
            mask_itemsize=itemsize if device_type == "cpu" else 1,
            last_layer_rows=config.shortcuts.last_layer_rows,
            trains_image_tokens=trains_image_tokens(config),
        )

    def saved(
        self, batch: MicroBatch, policy: Recompute, num_layers: int | None = None
    ) -> dict[str, int]:
        """Bytes by kind, as KINDS; num_layers as in Decoder.set_recompute."""
        workload, saved = self.workload, Saved()
        decoder, tokens = workload.decoder, batch.tokens
        if self._input_needs_gradient:
            self._stream(saved, 0, tokens)
        if workload.vision and workload.projector:
            size = batch.image_rows * workload.projector.saved_per_row
            saved.add("image features", "features", size * self.itemsize)
            if workload.vision.grids and workload.trains_embeddings:
                saved.add("image features", "newlines", tokens)  # where they are
        if self.trains_image_tokens:
            saved.add("image features", "masks", 2 * tokens)
        policies = policy_by_layer(policy, num_layers, decoder.num_hidden_layers)
        for i, chosen in enumerate(policies):
            last = i == decoder.num_hidden_layers - 1
            rows = batch.loss_rows if last and self.last_layer_rows else None
            self.layer(saved, i, chosen, tokens, rows)
        outputs = batch.loss_rows if self.last_layer_rows else tokens
        saved.add("loss", "hidden", outputs * decoder.hidden_size * self.itemsize)
        if self.last_layer_rows and policies[-1] != "full":
            saved.add("loss", "rows", 8 * batch.loss_rows)
        if workload.trains_embeddings:  # lm_head's gradient is formed in the forward pass, in fp32
            saved.add("loss", "lm_head", 4 * decoder.vocab_size * decoder.hidden_size)
        return saved.by_kind()

    def layer(self, saved: Saved, i: int, policy: Recompute, tokens: int, rows: int | None) -> None:
        """What layer i adds; rows: those that the last layer goes on with, None: all."""
        decoder = self.workload.decoder
        hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
        if policy == "full":
            self._stream(saved, i, tokens, statistics=False)
            return
        self._attention(saved, i, policy != "none", tokens, rows)
        num = tokens if rows is None else rows
        self._stream(saved, i + 0.5, num)
        self._stream(saved, i + 1, num)
        if policy == "mlp":
            return
        recomputed = policy == "elementwise"
        gate_up = ("gate_proj", "up_proj")
        self._product(saved, "mlp", (i, "gate_up"), num, hidden, gate_up, recomputed)
        saved.add("mlp", (i, "gate_up"), num * 2 * intermediate * self.itemsize)
        self._product(saved, "mlp", (i, "down"), num, intermediate, ("down_proj",), recomputed)

    def _attention(
        self, saved: Saved, i: int, recomputed: bool, tokens: int, rows: int | None
    ) -> None:
        decoder, needs_gradient = self.workload.decoder, i > 0 or self._input_needs_gradient
        hidden, q_size = decoder.hidden_size, decoder.qkv_sizes[0]
        if rows is None:
            self._product(
                saved, "attention", (i, "qkv"), tokens, hidden, QKV, recomputed, needs_gradient
            )
        else:  # queries of some rows, which are copied
            self._product(
                saved, "attention", (i, "q"), rows, hidden, QKV[:1], False, needs_gradient
            )
            self._product(
                saved, "attention", (i, "kv"), tokens, hidden, QKV[1:], recomputed, needs_gradient
            )
        saved.add("attention", (i, "qkv"), tokens * sum(decoder.qkv_sizes) * self.itemsize)
        if decoder.kind.qk_norm:  # copies of queries and keys, and what the norms found
            q_and_k = sum(decoder.qkv_sizes[:2])
            saved.add("attention", (i, "q and k"), tokens * q_and_k * self.itemsize)
            heads = q_and_k // decoder.head_dim
            saved.add("attention", (i, "q and k rstd"), 4 * tokens * heads)
        saved.add("attention", (i, "out"), tokens * q_size * self.itemsize)
        saved.add("attention", (i, "logsumexp"), 4 * tokens * decoder.num_attention_heads)
        # o_proj reads the attention's result, which is saved already, or a copy of its rows
        num = tokens if rows is None else rows
        self._product(saved, "attention", (i, "o"), num, q_size, ("o_proj",), rows is None)

    def _product(
        self,
        saved: Saved,
        kind: str,
        name: tuple,
        rows: int,
        in_features: int,
        names: tuple[LoraTarget, ...],
        recomputed: bool,
        needs_gradient: bool = True,
    ) -> None:
        """The input of a product; recomputed: not saved itself; needs_gradient: it has one."""
        workload, size = self.workload, rows * in_features
        adapted = [x for x in names if workload.adapter_rank and x in workload.lora.targets]
        drops = workload.lora.dropout > 0
        if (workload.trains_decoder or (adapted and not drops)) and not recomputed:
            saved.add(kind, (*name, "input"), size * self.itemsize)
        for part in adapted:
            low = rows * workload.adapter_rank * self.itemsize
            saved.add("adapters", (*name, part, "low"), low)
            if drops:
                saved.add("adapters", (*name, part, "dropped"), size * self.itemsize)
                if needs_gradient:
                    saved.add("adapters", (*name, part, "mask"), size * self.mask_itemsize)

    def _stream(self, saved: Saved, place: float, rows: int, statistics: bool = True) -> None:
        """The residual stream at the start of layer `place`, and what the norm there found."""
        width = self.workload.decoder.hidden_size * self.itemsize
        saved.add("residual stream", place, rows * width)
        if statistics:
            saved.add("residual stream", (place, "rstd"), 4 * rows)

    @property
    def _input_needs_gradient(self) -> bool:
        """Whether the embeddings that enter the first layer have a gradient."""
        return self.workload.vision is not None or self.workload.trains_embeddings
