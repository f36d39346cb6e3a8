"""The whole configuration of a run, as frozen dataclasses; recipes.py holds the named ones.

The text under a field is its help on the command line.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, get_args

import tyro

# a switch that takes its value: --data.shuffle False
Switch = Annotated[bool, tyro.conf.FlagConversionOff]
Stage = Literal["pretrain", "finetune"]


@dataclass(frozen=True)
class ModelConfig:
    decoder: str = ""
    """Hugging Face folder of the language model (LlamaForCausalLM)."""
    vision_tower: str = ""
    """Hugging Face folder of the vision tower (CLIPVisionModel or a whole CLIP)."""
    projector: str = ""
    """Trained projector to start from: run of stage 1, .safetensors or LLaVA's mm_projector.bin."""
    tokenizer: str = ""
    """Folder or file with tokenizer.model or tokenizer.json; empty: the decoder's folder."""


LoraTarget = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
]  # in the order in which a layer has them


@dataclass(frozen=True)
class LoraConfig:
    rank: int = 0
    """Rank of the adapters; 0 trains the whole decoder."""
    alpha: float = 16.0
    """The adapter's product is scaled by alpha / rank."""
    dropout: float = 0.05
    """Dropout on the adapter's input."""
    targets: tuple[LoraTarget, ...] = get_args(LoraTarget)
    """Projections that get an adapter."""
    train_embeddings: Switch = False
    """Also train embed_tokens and lm_head in full, as the released LoRA runs did."""


@dataclass(frozen=True)
class DataConfig:
    path: str = ""
    """JSON (or JSON lines) file in LLaVA's format."""
    image_root: str = ""
    """Folder that the samples' image paths are relative to."""
    template: str = "v1"
    """Conversation template by its name in mmalign/data/templates.py, such as v1."""
    use_im_start_end: Switch = True
    """Write <im_start> and <im_end> around the image (plain ignores it)."""
    types: tuple[str, ...] = ()
    """Keep only samples of these types (conversation, detail, reasoning); empty: all."""
    num_samples: int | None = None
    """Keep only the first N samples (after the choice of types)."""
    text_only: Switch = False
    """Strip <image> and train on the text alone, without a vision tower."""
    shuffle: Switch = True
    """Draw a new order of the samples in every epoch."""
    max_length: int = 2048
    """Longest sample in tokens, counted with the image as one token."""
    on_bad_sample: Literal["error", "skip"] = "error"
    """What to do with a sample that cannot be used: stop, or leave it out, counted and listed."""
    check_images: Switch = True
    """Decode every image once before the first step (remembered beside the data's fingerprint)."""
    num_workers: int = 2
    """Worker processes that decode images and pack; 0 does it in the main process."""


@dataclass(frozen=True)
class OptimizerConfig:
    learning_rate: float = 2e-5
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    warmup_ratio: float = 0.03
    """Share of the steps with a linear warm-up; cosine to 0 follows."""
    max_grad_norm: float = 1.0
    """Clip the global gradient norm to this; 0 turns clipping off."""
    master: Literal["split", "fp32-copy", "stochastic"] = "split"
    """What is kept beside bf16 weights, which by themselves are too coarse for small updates (fp32
    ones are not). split: the lower half of an exact fp32 weight, 2 bytes each. fp32-copy: an fp32
    weight, 4 bytes. stochastic: nothing, and the weight is rounded at random, right in the mean."""
    moments: Literal["fp32", "bf16", "8bit"] = "fp32"
    """AdamW's two moments of matrices: fp32 takes 8 bytes a weight, bf16 4, 8bit 2.1 (small
    floating-point numbers, 128 neighbours share a scale). bf16 and 8bit are rounded at random."""
    update_in_backward: Switch = False
    """Update each weight as soon as its gradient is complete and free the gradient, which saves
    memory where a step is one micro-batch. Needs max_grad_norm 0 and one process."""


@dataclass(frozen=True)
class CheckpointConfig:
    every: int = 500
    """Save the full training state every N steps; 0: only at the end and on interruption."""
    keep: int = 2
    """How many of the latest checkpoints to keep."""


@dataclass(frozen=True)
class ParallelConfig:
    """How the processes that torchrun starts share the work; nothing of it changes the results."""

    sharding: Literal["none", "full", "hybrid"] = "none"
    """none: every process holds the whole model (DDP). full: weights, gradients and optimizer state
    are cut over all processes (FSDP2). hybrid: cut over groups, which hold a copy each."""
    shard_size: int = 0
    """hybrid: processes in a group; 0: those of one node."""
    reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision in which sharded gradients are summed over the processes."""
    reduce_once: Switch = True
    """Sum sharded gradients once a step; until then every process holds those of the whole model.
    False: after every micro-batch, so that only its own shard stays."""
    reshard_after_forward: Switch = True
    """Free a layer's gathered weights after its forward pass and gather them again backward; False
    keeps them: fewer messages, more memory."""
    prefetch: int = 1
    """Layers whose weights are gathered ahead of the one that computes."""
    timeout_minutes: float = 20.0
    """A process that makes no progress for so long ends the run, with a report of all of them."""


@dataclass(frozen=True)
class EvaluationConfig:
    """Scores of the language model during finetuning; they change nothing of the training."""

    every: int = 0
    """Score the language model before the first step, every N steps, and at the end on all
    documents; 0: not during training."""
    data_root: str = ""
    """Folder with truthfulqa/mc_task.json and ethics/<subset>/*_test.csv."""
    tasks: tuple[str, ...] = ("truthfulqa", "ethics")
    """truthfulqa, ethics, or single tasks such as truthfulqa_mc1 or ethics_virtue."""
    limit: int | None = None
    """Documents of each task (its first ones) before the end; unset: the largest of 20, 40, 80,
    160, ... with which the whole evaluation stays under 5% of the run's arithmetic."""
    batch_tokens: int = 8192
    """Most tokens in one forward pass."""


@dataclass(frozen=True)
class ShortcutConfig:
    """Work that a step can leave out and still give the same numbers, to rounding."""

    last_layer_rows: Switch = True
    """Compute queries, output projection and MLP of the last decoder layer only for the rows that
    have a target. (LoRA's dropout then draws other masks there, of the same distribution.)"""
    frozen_prefix: Switch = True
    """Stage 1: compute keys and values of the tokens that all samples start with, before anything
    of the image, once a run. (Where they are at least 8: the header of template v0 or v1.)"""


@dataclass(frozen=True)
class TrainConfig:
    stage: tyro.conf.Suppress[Stage]
    """pretrain: the projector learns; finetune: projector and decoder learn."""
    run_dir: Path = Path("runs/run")
    """Everything that the run writes; the same command continues what it finds there."""
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    shortcuts: ShortcutConfig = field(default_factory=ShortcutConfig)
    global_batch_size: int = 32
    """Samples in one optimizer step, over all processes."""
    micro_batch_tokens: int | Literal["auto"] = 8192
    """Most tokens in one forward and backward pass of one process; auto: what the memory plan
    recommends for the device (scripts/plan_memory.py), on a CPU for the memory that is free."""
    recompute: Literal["none", "elementwise", "mlp", "full", "auto"] = "none"
    """What the backward pass computes again instead of keeping it. none: nothing. elementwise: the
    results of RMSNorm and SwiGLU. mlp: these and the MLP's first product. full: whole layers. auto:
    as little as makes the run fit, by the memory plan."""
    recompute_layers: int | None = None
    """Recompute in the first N decoder layers only; unset: in all."""
    num_epochs: float = 1.0
    """Passes over the data; ignored where num_steps is set."""
    num_steps: int | None = None
    """Optimizer steps."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of weights, activations and gradients, which add up in it over a step's micro-batches."""
    seed: int = 42
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: Switch = False
    """Also write the metrics for TensorBoard under run_dir/tensorboard."""
    peak_tflops: float | None = None
    """Dense matrix rate of one device in TFLOP/s, for mfu; unset: the published bf16 rate of a
    known GPU."""
    on_non_finite: Literal["error", "skip"] = "error"
    """A step whose loss or gradient is not finite never changes the weights: stop, or go on."""
    loss_spike_factor: float = 3.0
    """Report a loss above so many times the median of the last 50 steps, with its samples."""
    profile: str = ""
    """Steps to profile, FIRST:END as in metrics.jsonl, END not included: 10:13 is 10, 11, 12."""
    print_config: tyro.conf.FlagCreatePairsOff[bool] = False
    """Print the configuration of this command as JSON and stop."""

    @property
    def trains_image_tokens(self) -> bool:
        """Whether stage 1 trains the embeddings of <im_start> and <im_end>."""
        data = self.data
        return self.stage == "pretrain" and data.use_im_start_end and data.template != "plain"
