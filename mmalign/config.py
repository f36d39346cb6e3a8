"""The whole configuration of a run, as frozen dataclasses; recipes.py holds the named ones.

The line under a field is its help on the command line; scripts/README.md explains the long ones.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args

import tyro

# a switch that takes its value: --data.shuffle False
Switch = Annotated[bool, tyro.conf.FlagConversionOff]
Stage = Literal["pretrain", "finetune"]
Recompute = Literal["none", "elementwise", "mlp", "full"]  # model/recompute.py
ProjectorType = Literal["linear", "mlp2x_gelu"]  # model/projector.py


@dataclass(frozen=True)
class ModelConfig:
    decoder: str = ""
    """Hugging Face folder of the language model (Llama, Mistral, Qwen2 or Qwen3)."""
    vision_tower: str = ""
    """Hugging Face folder of the vision tower (CLIP or SigLIP, alone or whole)."""
    projector_type: ProjectorType = "linear"
    """linear (LLaVA 1.0), or two layers with GELU between them (LLaVA 1.5)."""
    projector: str = ""
    """Trained projector to start from: a stage 1 run, .safetensors or LLaVA's mm_projector.bin."""
    tokenizer: str = ""
    """Folder or file with tokenizer.model or tokenizer.json; unset: the decoder's folder."""


LoraTarget = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # in the order in which a layer has them


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the adapters; 0 trains the whole decoder."""
    alpha: float = 16.0
    """The adapter's output is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)
    """Projections that get an adapter."""
    train_embeddings: Switch = False
    """Also train embed_tokens and lm_head in full, as the released LoRA runs did."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """JSON, JSON lines (or gzip of them), Parquet or a folder of Hugging Face datasets, in LLaVA,
    ShareGPT, messages or Alpaca form; or mix.toml, which names several."""
    image_root: str | tuple[str, ...] = ""
    """Folders, zip or tar files that image paths are relative to; PREFIX=ROOT for PREFIX/ alone."""
    follow_links: Switch = False
    """Open images behind links that leave image_root; without it they are refused."""
    template: str = "v1"
    """Conversation template by its name in mmalign/data/templates.py, such as v1."""
    use_im_start_end: Switch = True
    """Write <im_start> and <im_end> around the image (template plain ignores it)."""
    types: tuple[str, ...] = ()
    """Keep only samples of these types (conversation, detail, reasoning); empty: all."""
    num_samples: int | None = None
    """Keep only the first N samples, after the selection by type."""
    text_only: Switch = False
    """Strip <image> and train on the text alone, without a vision tower."""
    shuffle: Switch = True
    """Shuffle the samples anew in every epoch."""
    max_length: int = 2048
    """Longest sample in tokens, counted with the image as one token; see on_long_sample."""
    on_long_sample: Literal["error", "skip", "truncate"] = "error"
    """A longer one is a bad sample (error), is left out (skip), or is cut (truncate) as LLaVA cuts
    it: to max_length tokens with every patch counted."""
    image_aspect_ratio: Literal["square", "pad"] = "square"
    """The vision tower's own preprocessing, or before it, as in LLaVA 1.5, padding to a square."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """A sample that cannot be used stops the run (error) or is left out and listed (skip)."""
    check_images: Annotated[bool | Literal["sample"], tyro.conf.FlagConversionOff] = True
    """Decode every image (True), one in a hundred (sample) or none (False) before the first step;
    the others only have to be there. The result is remembered in run_dir."""
    num_workers: int | Literal["auto"] = "auto"
    """Worker processes that decode images and pack samples; 0: a thread does it; auto: 0 for text
    or on a CPU, on a GPU up to 8 of the cores that the model leaves."""

    @property
    def image_roots(self) -> tuple[str, ...]:
        root = self.image_root
        return tuple(x for x in ([root] if isinstance(root, str) else root) if x)


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 2e-5
    """Peak learning rate."""
    beta1: float = 0.9
    """AdamW's decay rate of the first moment."""
    beta2: float = 0.999
    """AdamW's decay rate of the second moment."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    warmup_ratio: float = 0.03
    """Fraction of the steps with linear warm-up; cosine decay to 0 follows."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0: no clipping."""
    master: Literal["split", "fp32-copy", "stochastic"] = "split"
    """What is kept beside bf16 weights: 2 bytes each, 4, or none with stochastic rounding."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """Precision of AdamW's two moments of matrices: 8, 4 or 2.1 bytes per weight."""
    update_in_backward: Switch = False
    """Update each weight in the backward pass; needs max_grad_norm 0 and one process."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Save the full training state every N steps; 0: only at the end and on interruption."""
    keep: int = 2
    """Number of checkpoints to keep, the latest ones."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work; results do not depend on it."""

    sharding: Literal["none", "full", "hybrid"] = "none"
    """none: DDP. full: FSDP2 over all processes. hybrid: FSDP2 in groups that are replicas."""
    shard_size: int = 0
    """hybrid: processes per group; 0: those of one node."""
    timeout_minutes: float = 20.0
    """End the run, with a report of every rank, when a rank makes no progress for this long."""

    def is_sharded(self, world_size: int) -> bool:
        """Whether parameters are FSDP2 shards; one process holds everything."""
        return self.sharding != "none" and world_size > 1


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of the language model during finetuning; training does not change."""

    every: int = 0
    """Evaluate before the first step, every N steps and, in full, at the end; 0: never."""
    data_root: str = ""
    """Folder with truthfulqa/mc_task.json and ethics/<subset>/*_test.csv."""
    tasks: tuple[str, ...] = ("truthfulqa", "ethics")
    """truthfulqa, ethics, or single tasks such as truthfulqa_mc1 or ethics_virtue."""
    limit: int | None = None
    """First N documents per task before the end; unset: as many as cost under 5% of the run."""
    batch_tokens: int = 8192
    """Most tokens per forward pass."""


@dataclass(frozen=True)
class ShortcutConfig:
    """Work that a step can leave out with the same result up to rounding."""

    last_layer_rows: Switch = True
    """In the last decoder layer, compute only the rows that have a target."""
    frozen_prefix: Switch = True
    """Stage 1: compute keys and values of the header that all samples share once per run."""


class MicroBatching(NamedTuple):
    """What the memory plan decides where the configuration says "auto"."""

    tokens: int  # most of a micro-batch
    recompute: Recompute
    recompute_layers: int | None


@dataclass(frozen=True)
class TrainConfig:
    stage: tyro.conf.Suppress[Stage]
    """pretrain: the projector is trained; finetune: projector and decoder."""
    run_dir: Path = Path("runs/run")
    """Folder for everything that the run writes; the same command resumes from it."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    shortcuts: ShortcutConfig = field(default_factory=ShortcutConfig)
    global_batch_size: int = 32
    """Samples per optimizer step, over all processes."""
    micro_batch_tokens: int | Literal["auto"] = 8192
    """Most tokens per forward and backward pass of one process; auto: what fits in memory."""
    recompute: Literal[Recompute, "auto"] = "none"
    """Activation checkpointing: what the backward pass recomputes; auto: as little as fits."""
    recompute_layers: tyro.conf.Suppress[int | None] = None
    """First N decoder layers that recompute, None: all; the memory plan decides it with auto."""
    num_epochs: float = 1.0
    """Passes over the data; ignored where num_steps is set."""
    num_steps: int | None = None
    """Optimizer steps."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of weights, activations and gradients, also while micro-batches accumulate."""
    seed: int = 42
    """Seeds the order of samples, dropout, new weights and stochastic rounding."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU if there is one."""
    tensorboard: Switch = False
    """Also write the metrics for TensorBoard under run_dir/tensorboard."""
    wandb: str = ""
    """Also log the metrics to this project of Weights & Biases; empty: not."""
    peak_tflops: float | None = None
    """Dense peak of one device in TFLOP/s, for mfu; unset: the published bf16 peak of the GPU."""
    on_non_finite: Literal["error", "skip"] = "error"
    """A non-finite loss or gradient never changes the weights; the run stops or skips the step."""
    loss_spike_factor: float = 3.0
    """Warn when the loss exceeds this multiple of the median of the last 50 steps."""
    profile: str = ""
    """Steps to profile, FIRST:END as in metrics.jsonl, END not included: 10:13 is 10, 11, 12."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the configuration of this command as JSON and exit."""

    @property
    def micro_batching(self) -> MicroBatching:
        """Of a configuration that plan_run has resolved: without "auto"."""
        assert self.micro_batch_tokens != "auto" and self.recompute != "auto"
        return MicroBatching(self.micro_batch_tokens, self.recompute, self.recompute_layers)
