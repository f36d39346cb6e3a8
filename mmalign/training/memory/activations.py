"""Bytes that the forward pass keeps for the backward pass, from shapes alone.

It is the list of what each operation of mmalign/model keeps; tests/training/test_memory_plan.py
holds it against the tensors that the graph really keeps.
"""

from collections import Counter
from dataclasses import dataclass, field

from mmalign.config import LoraTarget, TrainConfig
from mmalign.flops import Workload
from mmalign.model.recompute import Recompute, policy_by_layer

QKV: tuple[LoraTarget, ...] = ("q_proj", "k_proj", "v_proj")
KINDS = ("residual stream", "attention", "mlp", "adapters", "image features", "loss")


@dataclass(frozen=True)
class MicroBatch:
    """What of a packed batch decides its memory."""

    tokens: int
    loss_rows: int  # with a target
    images: int


@dataclass
class Kept:
    """Tensors that are kept, each once: {(kind, name): bytes}."""

    tensors: dict[tuple[str, object], int] = field(default_factory=dict)

    def add(self, kind: str, name: object, num_bytes: int) -> None:
        self.tensors[kind, name] = num_bytes

    def by_kind(self) -> dict[str, int]:
        totals = Counter(dict.fromkeys(KINDS, 0))
        for (kind, _), num_bytes in self.tensors.items():
            totals[kind] += num_bytes
        return dict(totals)


@dataclass(frozen=True)
class Activations:
    """The accounts of one model, stage and precision."""

    workload: Workload
    itemsize: int  # of the activations: 4 for fp32, 2 for bf16
    mask_itemsize: int  # of a number in dropout's mask: a byte on a GPU, the activations' on a CPU
    prunes_rows: bool  # shortcuts.last_layer_rows
    splits_token_rows: bool  # stage 1 trains <im_start> and <im_end>

    @classmethod
    def of(cls, workload: Workload, config: TrainConfig, device_type: str) -> "Activations":
        itemsize = {"fp32": 4, "bf16": 2}[config.precision]
        data = config.data
        return cls(
            workload,
            itemsize,
            mask_itemsize=itemsize if device_type == "cpu" else 1,
            prunes_rows=config.shortcuts.last_layer_rows,
            splits_token_rows=config.stage == "pretrain"
            and data.use_im_start_end
            and data.template != "plain",
        )

    def kept(
        self, batch: MicroBatch, policy: Recompute, num_layers: int | None = None
    ) -> dict[str, int]:
        """Bytes by kind, as KINDS; num_layers as in Decoder.set_recompute."""
        workload, kept = self.workload, Kept()
        decoder, tokens = workload.decoder, batch.tokens
        if self._input_learns:
            self._stream(kept, 0, tokens)
        if workload.vision:
            rows = batch.images * workload.vision.num_patches
            width = rows * workload.projector.saved_per_row
            kept.add("image features", "features", width * self.itemsize)
        if self.splits_token_rows:
            kept.add("image features", "masks", 2 * tokens)
        policies = policy_by_layer(policy, num_layers, decoder.num_hidden_layers)
        for i, chosen in enumerate(policies):
            last = i == decoder.num_hidden_layers - 1
            rows = batch.loss_rows if last and self.prunes_rows else None
            self.layer(kept, i, chosen, tokens, rows)
        outputs = batch.loss_rows if self.prunes_rows else tokens
        kept.add("loss", "hidden", outputs * decoder.hidden_size * self.itemsize)
        if self.prunes_rows and policies[-1] != "full":
            kept.add("loss", "rows", 8 * batch.loss_rows)
        if workload.trains_embeddings:  # lm_head's gradient is formed in the forward pass, in fp32
            kept.add("loss", "lm_head", 4 * decoder.vocab_size * decoder.hidden_size)
        return kept.by_kind()

    def layer(self, kept: Kept, i: int, policy: Recompute, tokens: int, rows: int | None) -> None:
        """What layer i adds; rows: those that the last layer goes on with, None: all."""
        decoder = self.workload.decoder
        hidden, inner = decoder.hidden_size, decoder.intermediate_size
        if policy == "full":
            self._stream(kept, i, tokens, statistics=False)
            return
        self._attention(kept, i, policy != "none", tokens, rows)
        num = tokens if rows is None else rows
        self._stream(kept, i + 0.5, num)
        self._stream(kept, i + 1, num)
        if policy == "mlp":
            return
        cheap = policy == "elementwise"
        gate_up = ("gate_proj", "up_proj")
        self._product(kept, "mlp", (i, "gate_up"), num, hidden, gate_up, cheap)
        kept.add("mlp", (i, "gate_up"), num * 2 * inner * self.itemsize)
        self._product(kept, "mlp", (i, "down"), num, inner, ("down_proj",), cheap)

    def _attention(self, kept: Kept, i: int, cheap: bool, tokens: int, rows: int | None) -> None:
        decoder, learns = self.workload.decoder, i > 0 or self._input_learns
        hidden, heads_size = decoder.hidden_size, decoder.qkv_sizes[0]
        if rows is None:
            self._product(kept, "attention", (i, "qkv"), tokens, hidden, QKV, cheap, learns)
        else:  # queries of some rows, which are copied
            self._product(kept, "attention", (i, "q"), rows, hidden, QKV[:1], False, learns)
            self._product(kept, "attention", (i, "kv"), tokens, hidden, QKV[1:], cheap, learns)
        kept.add("attention", (i, "qkv"), tokens * sum(decoder.qkv_sizes) * self.itemsize)
        kept.add("attention", (i, "out"), tokens * heads_size * self.itemsize)
        kept.add("attention", (i, "logsumexp"), 4 * tokens * decoder.num_attention_heads)
        # o_proj reads the attention's result, which is kept already, or a copy of its rows
        num = tokens if rows is None else rows
        self._product(kept, "attention", (i, "o"), num, heads_size, ("o_proj",), rows is None)

    def _product(
        self,
        kept: Kept,
        kind: str,
        name: tuple,
        rows: int,
        in_features: int,
        names: tuple[LoraTarget, ...],
        cheap: bool,
        learns: bool = True,
    ) -> None:
        """The input of a product. cheap: it need not be kept itself; learns: it has a gradient."""
        workload, size = self.workload, rows * in_features
        adapted = [x for x in names if workload.adapter_rank and x in workload.lora.targets]
        drops = workload.lora.dropout > 0
        if (workload.trains_decoder or (adapted and not drops)) and not cheap:
            kept.add(kind, (*name, "input"), size * self.itemsize)
        for part in adapted:
            low = rows * workload.adapter_rank * self.itemsize
            kept.add("adapters", (*name, part, "low"), low)
            if drops:
                kept.add("adapters", (*name, part, "dropped"), size * self.itemsize)
                if learns:
                    kept.add("adapters", (*name, part, "mask"), size * self.mask_itemsize)

    def _stream(self, kept: Kept, place: float, rows: int, statistics: bool = True) -> None:
        """The residual stream at the start of layer `place`, and what the norm there found."""
        width = self.workload.decoder.hidden_size * self.itemsize
        kept.add("residual stream", place, rows * width)
        if statistics:
            kept.add("residual stream", (place, "rstd"), 4 * rows)

    @property
    def _input_learns(self) -> bool:
        """Whether the embeddings that enter the first layer have a gradient."""
        return self.workload.vision is not None or self.workload.trains_embeddings
