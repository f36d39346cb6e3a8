"""The memory that a run needs on one device, and the largest micro-batch that fits, from shapes.

Counted besides weights, optimizer state and activations: lm_head's gradient, which is held in fp32
from the forward pass on (0.5 GB for LLaMA2-7B); a second gradient of the largest matrix while
micro-batches accumulate; with DDP all gradients once more in its buckets, if a step has several
micro-batches. update_in_backward frees gradients only where a step is one micro-batch.

LLaMA2-7B in bf16 on an 80 GB H100 with 8 bytes per weight: 8.9k, 16k and 54k tokens fit with
`elementwise`, `mlp` and `full`; stage 1 with `none` fits 22k. A token takes 3.16 MB with
`elementwise` and 4.4 MB with `none`, where weight gradients also read the results of RMSNorm and
SwiGLU.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from mmalign_kernels.adamw import BLOCK
from mmalign_kernels.reference import linear_cross_entropy as reference_head
from mmalign_kernels.triton import launch

from mmalign.config import TrainConfig
from mmalign.flops import Workload, adapted_projections
from mmalign.model.recompute import POLICIES, Recompute
from mmalign.model.vision_tower import VisionTower
from mmalign.training.memory.activations import Activations, MicroBatch, Saved
from mmalign.training.memory.samples import AverageSample, llava_sample
from mmalign.training.optimizer import AdamW

STEP = 128  # micro_batch_tokens are planned in multiples of it
ENOUGH_TOKENS = 8192  # matrix products reach full speed: rather recompute than go below
MAX_TOKENS = 16384  # a larger micro-batch gains nothing
CONTEXT_BYTES = {"cuda": 10**9, "cpu": 0}  # CUDA's context, compiled kernels, cuBLAS's workspace
# fraction of activations and workspace, whose sizes vary from step to step
FRAGMENTATION = {"cuda": 0.04, "cpu": 0.0}
MAX_LOGITS = {
    "cuda": launch.LOGITS_PER_CHUNK,
    "cpu": reference_head.LOGITS_PER_CHUNK,
}  # that linear_cross_entropy holds


@dataclass(frozen=True)
class Matrices:
    """`count` parameters of one shape."""

    unit: str  # FSDP unit: layer or root; replicated: never sharded
    shape: tuple[int, ...]
    count: int
    trained: bool

    @property
    def numel(self) -> int:
        return math.prod(self.shape) * self.count


def parameters(workload: Workload, trains_image_tokens: bool) -> Iterator[Matrices]:
    """Every parameter of the model, in the stage of the workload."""
    decoder, trained = workload.decoder, workload.trains_decoder
    hidden, intermediate = decoder.hidden_size, decoder.intermediate_size
    layers, (q_size, kv_size, _) = decoder.num_hidden_layers, decoder.qkv_sizes
    tables = 1 if decoder.tie_word_embeddings else 2
    yield Matrices("root", (decoder.vocab_size, hidden), tables, workload.trains_embeddings)
    yield Matrices("root", (hidden,), 1, trained)
    attention = (q_size + 2 * kv_size, hidden), (hidden, q_size)
    mlp = (2 * intermediate, hidden), (hidden, intermediate)
    for shape in (*attention, *mlp):
        yield Matrices("layer", shape, layers, trained)
    yield Matrices("layer", (hidden,), layers, trained)
    if decoder.kind.qkv_bias:
        yield Matrices("layer", (q_size + 2 * kv_size,), layers, trained)
    if decoder.kind.qk_norm:
        yield Matrices("layer", (decoder.head_dim,), 2 * layers, trained)
    yield Matrices("replicated", (hidden,), layers, trained)  # input_layernorm
    rank = workload.adapter_rank
    if rank:
        for rows, columns in adapted_projections(workload):
            yield Matrices("layer", (rank, columns), layers, True)
            yield Matrices("layer", (rows, rank), layers, True)
    if workload.vision and workload.projector:
        for shape in workload.projector.parameters.values():
            yield Matrices("root", shape, 1, True)
        with torch.device("meta"):
            tower = sum(p.numel() for p in VisionTower(workload.vision).parameters())
        yield Matrices("replicated", (tower,), 1, False)
        if workload.vision.grids:  # image_newline
            yield Matrices("root", (hidden,), 1, trained)
    if trains_image_tokens:
        yield Matrices("root", (2, hidden), 1, True)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes on one device of `world_size`.

    capacity: of that device; given_sample: of the run's data, None: llava_sample.
    """

    config: TrainConfig
    workload: Workload
    capacity: int
    device_type: str
    world_size: int = 1
    given_sample: AverageSample | None = None

    # ---- independent of the micro-batch ----

    @cached_property
    def activations(self) -> Activations:
        return Activations.from_config(self.workload, self.config, self.device_type)

    @cached_property
    def parameters(self) -> list[Matrices]:
        return list(parameters(self.workload, self.activations.trains_image_tokens))

    @property
    def itemsize(self) -> int:
        return self.activations.itemsize

    def fixed(self) -> dict[str, int]:
        """Weights, optimizer state, weights gathered by FSDP2, and the device's context."""
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
        """Shape of a matrix whose 8-bit moments cannot be sharded, or None.

        Its row length is not a multiple of BLOCK.
        """
        if self.num_shards == 1 or self.config.optimizer.moments != "8bit":
            return None
        sharded = (x.shape for x in self.parameters if x.trained and x.unit != "replicated")
        return next((shape for shape in sharded if len(shape) > 1 and shape[-1] % BLOCK), None)

    def _local(self, x: Matrices) -> int:
        return x.numel if x.unit == "replicated" else -(-x.numel // self.num_shards)

    def _state(self, x: Matrices) -> int:
        optimizer = self.config.optimizer
        return AdamW.state_bytes(self._local(x), len(x.shape), self.itemsize, optimizer)

    def _layer_bytes(self, trained_only: bool = False) -> int:
        layers = self.workload.decoder.num_hidden_layers
        counted = [x for x in self.parameters if x.trained or not trained_only]
        return sum(x.numel for x in counted if x.unit == "layer") * self.itemsize // layers

    def _gathered(self) -> int:
        """The root unit, the layer that computes and the one that is gathered ahead."""
        root = sum(x.numel for x in self.parameters if x.unit == "root") * self.itemsize
        return root + min(2, self.workload.decoder.num_hidden_layers) * self._layer_bytes()

    # ---- dependent on the micro-batch ----

    def batch(self, tokens: int) -> MicroBatch:
        """A micro-batch of this size made of average samples."""
        sample = self.sample
        kinds = (sample.loss_tokens, sample.image_tokens)
        return MicroBatch(tokens, *(math.ceil(x * tokens / sample.tokens) for x in kinds))

    @property
    def sample(self) -> AverageSample:
        return self.given_sample or llava_sample(self.workload.stage, self.workload.vision)

    def at(self, tokens: int, policy: Recompute, num_layers: int | None = None) -> dict[str, int]:
        """All bytes by kind, with micro-batches of so many tokens."""
        batch = self.batch(tokens)
        saved = self.activations.saved(batch, policy, num_layers)
        workspace = self._workspace(batch, policy)
        fragmentation = int(FRAGMENTATION[self.device_type] * (sum(saved.values()) + workspace))
        return {
            **self.fixed(),
            "gradients": self._gradients(tokens),
            **{f"activations: {kind}": num_bytes for kind, num_bytes in saved.items()},
            "workspace": workspace,
            "fragmentation": fragmentation,
        }

    def _gradients(self, tokens: int) -> int:
        trained = [x for x in self.parameters if x.trained]
        largest = (
            max(math.prod(x.shape) for x in trained) * self.itemsize
        )  # accumulates into the sum
        config = self.config
        step = self.sample.tokens * config.global_batch_size / self.world_size
        if config.optimizer.update_in_backward and step <= tokens:
            return 2 * largest
        own = sum(self._local(x) for x in trained) * self.itemsize
        if self.num_shards == 1:
            apart = self.world_size > 1 and step > tokens  # accumulated beside DDP's buckets
            return own + (own if apart else largest)
        if step > tokens:  # unsharded ones until they are reduced, once per step
            return own + sum(x.numel for x in trained) * self.itemsize
        return own + 2 * self._layer_bytes(trained_only=True)

    def _workspace(self, batch: MicroBatch, policy: Recompute) -> int:
        """The largest temporary memory beside what is saved: at lm_head, or in a layer."""
        decoder, tokens = self.workload.decoder, batch.tokens
        hidden, size = decoder.hidden_size, decoder.intermediate_size
        mlp = {"none": size, "elementwise": 2 * size + hidden}.get(policy, 4 * size + hidden)
        # the gradient, rotated queries and keys; of normed ones also what is copied
        attention = (3 if decoder.kind.qk_norm else 2) * sum(decoder.qkv_sizes)
        recomputed = 0
        if policy == "full":
            saved = Saved()
            self.activations.layer(saved, 0, "none", tokens, None)
            recomputed = sum(saved.by_kind().values())
        layer = tokens * (2 * hidden + max(mlp, attention)) * self.itemsize
        return max(self.logits(batch), recomputed + layer)

    def logits(self, batch: MicroBatch) -> int:
        """Bytes of logits that exist at a time."""
        decoder, most = self.workload.decoder, MAX_LOGITS[self.device_type]
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
        """The configuration with "auto" of micro_batch_tokens and recompute resolved.

        The policy is the one that recomputes least with ENOUGH_TOKENS in a micro-batch, or else the
        one with the largest micro-batch. Where the size is given: with this size, and in as few
        layers as possible. A configuration that does not fit is returned, too: see `total`.
        """
        config, tokens = self.config, self.config.micro_batch_tokens
        policy, num_layers = config.recompute, config.recompute_layers
        if policy == "auto":
            wanted = tokens
            if wanted == "auto":
                wanted = min(ENOUGH_TOKENS, max(self.most_tokens(x) for x in POLICIES))
            policy, num_layers = self._least_recompute(wanted)
        if tokens == "auto":
            tokens = min(self.most_tokens(policy, num_layers), MAX_TOKENS)
        return replace(
            config, micro_batch_tokens=tokens, recompute=policy, recompute_layers=num_layers
        )

    def _least_recompute(self, tokens: int) -> tuple[Recompute, int | None]:
        """The cheapest policy that fits, and in how many layers; "full" where none fits."""
        layers = self.workload.decoder.num_hidden_layers
        for policy in POLICIES:
            partly = range(1, layers) if policy in ("mlp", "full") else ()
            for num_layers in (*partly, None):
                if self.total(tokens, policy, num_layers) <= self.capacity:
                    return policy, num_layers
        return "full", None
