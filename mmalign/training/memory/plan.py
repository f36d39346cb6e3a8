"""What a run needs of one device's memory, and the largest micro-batch that fits, from shapes.

LLaMA2-7B in bf16 on an H100 of 80 GB: tokens that fit with `elementwise`, `mlp` and `full` beside 8
bytes a weight are 8.9k, 16k and 54k, where performance estimates by hand said 8.1k, 14k and 51k;
beside 6 bytes 13k, 23k and 78k, by hand 12k, 22k and 77k; stage 1 with `none` 22k, by hand 20k. By
hand the card had 82 GB, CUDA reports 84.9; a token of `elementwise` took 3.23 MB, here 3.16, of
which 0.12 are fragmentation. `none` takes 4.4 MB in stage 2 (6.4k tokens): weight gradients read
the results of RMSNorm and SwiGLU, too.

Besides, lm_head's gradient is held in fp32 from the forward pass on (0.5 GB), and summing gradients
over micro-batches needs another one of the largest matrix. update_in_backward frees gradients only
where a step is one micro-batch; otherwise they are counted whole. DDP holds all gradients in its
buckets, and those of a step with several micro-batches once more.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from mmalign_kernels.block_quantization import BLOCK, num_blocks

from mmalign.config import TrainConfig
from mmalign.flops import Workload, adapted_projections
from mmalign.model.recompute import POLICIES, Recompute
from mmalign.model.vision_tower import VisionTower
from mmalign.training.memory.activations import Activations, Kept, MicroBatch
from mmalign.training.optimizer import moment_dtype

STEP = 128  # micro_batch_tokens are planned in multiples of it
ENOUGH_TOKENS = 8192  # matrix products are as fast as they get: rather recompute than go below
MOST_TOKENS = 16384  # a larger micro-batch gains nothing
# LLaVA's data, means; image tokens included, in stage 1 without a header that all samples share
# (shortcuts.frozen_prefix; v0's 37 tokens would be more rows of the same kind, and its constant
# keys and values, 19 MB with LLaMA2-7B, are too few to plan for)
SAMPLE_TOKENS = {"pretrain": 300, "finetune": 550}
SAMPLE_LOSS_TOKENS = {"pretrain": 22, "finetune": 242}
CONTEXT_BYTES = {"cuda": 10**9, "cpu": 0}  # CUDA's context, compiled kernels, cuBLAS's workspace
FRAGMENTED = {
    "cuda": 0.04,
    "cpu": 0.0,
}  # of activations and workspace: sizes vary from step to step
LOGITS = {"cuda": 1 << 27, "cpu": 1 << 22}  # held at a time by linear_cross_entropy


@dataclass(frozen=True)
class Matrices:
    """`count` parameters of one shape."""

    unit: str  # layer, root: what FSDP2 cuts and gathers together; replicated: never cut
    shape: tuple[int, ...]
    count: int
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape) * self.count


def parameters(workload: Workload, splits_token_rows: bool) -> Iterator[Matrices]:
    """Every parameter of the model, as Llava.set_trainable leaves it."""
    decoder, learns = workload.decoder, workload.trains_decoder
    hidden, inner, layers = (
        decoder.hidden_size,
        decoder.intermediate_size,
        decoder.num_hidden_layers,
    )
    heads, keys, _ = decoder.qkv_sizes
    tables = 1 if decoder.tie_word_embeddings else 2
    yield Matrices("root", (decoder.vocab_size, hidden), tables, workload.trains_embeddings)
    yield Matrices("root", (hidden,), 1, learns)
    for shape in (
        (heads + 2 * keys, hidden),
        (hidden, heads),
        (2 * inner, hidden),
        (hidden, inner),
    ):
        yield Matrices("layer", shape, layers, learns)
    yield Matrices("layer", (hidden,), layers, learns)
    yield Matrices("replicated", (hidden,), layers, learns)  # input_layernorm
    rank = workload.adapter_rank
    if rank:
        for rows, columns in adapted_projections(workload):
            yield Matrices("layer", (rank, columns), layers, True)
            yield Matrices("layer", (rows, rank), layers, True)
    if workload.vision:
        for shape in workload.projector.parameters.values():
            yield Matrices("root", shape, 1, True)
        with torch.device("meta"):
            tower = sum(p.numel() for p in VisionTower(workload.vision).parameters())
        yield Matrices("replicated", (tower,), 1, False)
    if splits_token_rows:
        yield Matrices("root", (2, hidden), 1, True)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device of `world_size`; capacity: of that device."""

    config: TrainConfig
    workload: Workload
    capacity: int
    device_type: str
    world_size: int = 1

    # ---- what does not depend on the micro-batch ----

    @cached_property
    def activations(self) -> Activations:
        return Activations.of(self.workload, self.config, self.device_type)

    @cached_property
    def parameters(self) -> list[Matrices]:
        return list(parameters(self.workload, self.activations.splits_token_rows))

    @property
    def itemsize(self) -> int:
        return self.activations.itemsize

    def fixed(self) -> dict[str, int]:
        """Weights, optimizer state, and what the device and sharding take besides."""
        gathered = self._gathered() if self.num_shards > 1 else 0
        return {
            "weights": sum(self._local(x) * self.itemsize for x in self.parameters),
            "optimizer state": sum(self._state(x) for x in self.parameters if x.trained),
            "gathered weights": gathered,
            "context": CONTEXT_BYTES[self.device_type],
        }

    @cached_property
    def num_shards(self) -> int:
        parallel = self.config.parallel
        if parallel.sharding == "none" or self.world_size == 1:
            return 1
        if parallel.sharding == "full":
            return self.world_size
        return parallel.shard_size or int(os.environ.get("LOCAL_WORLD_SIZE", self.world_size))

    @property
    def unshardable(self) -> tuple[int, ...] | None:
        """Shape of a matrix whose 8-bit moments cannot be cut: its rows are no whole blocks."""
        if self.num_shards == 1 or self.config.optimizer.moments != "8bit":
            return None
        cut = (x.shape for x in self.parameters if x.trained and x.unit != "replicated")
        return next((shape for shape in cut if len(shape) > 1 and shape[-1] % BLOCK), None)

    def _local(self, x: Matrices) -> int:
        return x.numel if x.unit == "replicated" else -(-x.numel // self.num_shards)

    def _state(self, x: Matrices) -> int:
        optimizer, numel = self.config.optimizer, self._local(x)
        moment = moment_dtype(x.shape, optimizer)
        scales = 4 * num_blocks(numel) if moment == torch.uint8 else 0
        kept = {"split": 2, "fp32-copy": 4, "stochastic": 0}[optimizer.master]
        master = kept * numel if self.itemsize == 2 else 0
        return master + 2 * (moment.itemsize * numel + scales)

    def _layer_bytes(self, trained_only: bool = False) -> int:
        layers = self.workload.decoder.num_hidden_layers
        counted = [x for x in self.parameters if x.trained or not trained_only]
        return sum(x.numel for x in counted if x.unit == "layer") * self.itemsize // layers

    def _gathered(self) -> int:
        parallel, layers = self.config.parallel, self.workload.decoder.num_hidden_layers
        at_once = min(layers, 1 + parallel.prefetch) if parallel.reshard_after_forward else layers
        root = sum(x.numel for x in self.parameters if x.unit == "root") * self.itemsize
        return root + at_once * self._layer_bytes()

    # ---- what does ----

    def batch(self, tokens: int) -> MicroBatch:
        """A micro-batch of that size of samples as LLaVA's are in the mean."""
        stage = self.workload.stage
        images = -(-tokens // SAMPLE_TOKENS[stage]) if self.workload.vision else 0
        rows = -(-tokens * SAMPLE_LOSS_TOKENS[stage] // SAMPLE_TOKENS[stage])
        return MicroBatch(tokens, rows, images)

    def at(self, tokens: int, policy: Recompute, num_layers: int | None = None) -> dict[str, int]:
        """All bytes by kind, with micro-batches of so many tokens."""
        batch = self.batch(tokens)
        kept = self.activations.kept(batch, policy, num_layers)
        workspace = self._workspace(batch, policy)
        lost = int(FRAGMENTED[self.device_type] * (sum(kept.values()) + workspace))
        return {
            **self.fixed(),
            "gradients": self._gradients(tokens),
            **{f"activations: {kind}": num_bytes for kind, num_bytes in kept.items()},
            "workspace": workspace,
            "fragmentation": lost,
        }

    def _gradients(self, tokens: int) -> int:
        trained = [x for x in self.parameters if x.trained]
        largest = max(math.prod(x.shape) for x in trained) * self.itemsize  # new beside the sum
        config = self.config
        step = SAMPLE_TOKENS[config.stage] * config.global_batch_size // self.world_size
        if config.optimizer.update_in_backward and step <= tokens:
            return 2 * largest
        own = sum(self._local(x) for x in trained) * self.itemsize
        if self.num_shards == 1:
            apart = self.world_size > 1 and step > tokens  # summed up beside DDP's buckets
            return own + (own if apart else largest)
        if config.parallel.reduce_once and step > tokens:  # whole ones until they are summed
            return own + sum(x.numel for x in trained) * self.itemsize
        return own + 2 * self._layer_bytes(trained_only=True)

    def _workspace(self, batch: MicroBatch, policy: Recompute) -> int:
        """The most that is held for a moment beside what is kept: at the head, or in a layer."""
        decoder, tokens = self.workload.decoder, batch.tokens
        hidden, inner = decoder.hidden_size, decoder.intermediate_size
        mlp = {"none": inner, "elementwise": 2 * inner + hidden}.get(policy, 4 * inner + hidden)
        attention = 2 * sum(decoder.qkv_sizes)  # the gradient, rotated queries and keys
        again = 0
        if policy == "full":
            kept = Kept()
            self.activations.layer(kept, 0, "none", tokens, None)
            again = sum(kept.by_kind().values())
        layer = tokens * (2 * hidden + max(mlp, attention)) * self.itemsize
        return max(self.logits(batch), again + layer)

    def logits(self, batch: MicroBatch) -> int:
        """Bytes of logits that exist at a time."""
        decoder, most = self.workload.decoder, LOGITS[self.device_type]
        if self.device_type == "cpu" and self.workload.trains_embeddings:
            most = max(most, decoder.hidden_size * decoder.vocab_size)
        return min(most, batch.loss_rows * decoder.vocab_size) * self.itemsize

    # ---- what fits ----

    def total(self, tokens: int, policy: Recompute, num_layers: int | None = None) -> int:
        return sum(self.at(tokens, policy, num_layers).values())

    def most_tokens(self, policy: Recompute, num_layers: int | None = None) -> int:
        """Largest micro-batch that fits, a multiple of STEP; 0 where none does."""
        low, high = 0, 1 << 14  # in steps
        while high - low > 1:
            middle = (low + high) // 2
            fits = self.total(middle * STEP, policy, num_layers) <= self.capacity
            low, high = (middle, high) if fits else (low, middle)
        return low * STEP

    def recommend(self) -> TrainConfig:
        """The configuration with every "auto" of micro_batch_tokens and recompute decided.

        Of the policies the one that computes least again with ENOUGH_TOKENS in a micro-batch, or
        the one that takes the largest micro-batch. Where the size is given: with this size, in as
        few layers as it takes. What does not fit at all is left to the caller, who sees the total.
        """
        config = self.config
        if config.recompute != "auto":
            return self._with_tokens(config)
        if config.micro_batch_tokens == "auto":
            wanted = min(ENOUGH_TOKENS, max(self.most_tokens(x) for x in POLICIES))
        else:
            wanted = config.micro_batch_tokens
        for policy, num_layers in self._choices():
            if self.total(wanted, policy, num_layers) <= self.capacity:
                break
        chosen = replace(config, recompute=policy, recompute_layers=num_layers)
        return self._with_tokens(chosen)

    def _choices(self) -> Iterator[tuple[Recompute, int | None]]:
        """Ways to recompute, the cheapest first."""
        yield "none", None
        yield "elementwise", None
        layers = self.workload.decoder.num_hidden_layers
        for policy in ("mlp", "full"):
            yield from ((policy, num) for num in range(1, layers))
            yield policy, None

    def _with_tokens(self, config: TrainConfig) -> TrainConfig:
        if config.micro_batch_tokens != "auto":
            return config
        most = self.most_tokens(config.recompute, config.recompute_layers)
        return replace(config, micro_batch_tokens=min(most, MOST_TOKENS))
