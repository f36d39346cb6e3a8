"""Named runs: one per row of the paper's recipe, and those of the toy world.

Sources: the paper's released scripts and checkpoints (global batch, steps and trained parameters
are those of the released trainer states). The command line gives the paths of weights and data;
the tiny recipes make their own.
"""

from dataclasses import replace

from mmalign.config import DataConfig, LoraConfig, ModelConfig, OptimizerConfig, TrainConfig

# ---- stage 1: the projector trains on 595k image-caption pairs ----

PRETRAIN_7B = TrainConfig(
    stage="pretrain",
    data=DataConfig(template="v0"),
    optimizer=OptimizerConfig(learning_rate=2e-3),
    global_batch_size=128,
    micro_batch_tokens=16384,
    recompute="auto",
)

# ---- stage 2: projector and decoder train on 80k visual instructions ----

# 8 bytes per weight, so that a whole 7B model trains on one 80 GB GPU with gradient clipping:
# weight, gradient and both moments in bf16 with stochastic rounding. For an exact fp32 master in
# the same memory: --optimizer.master split --optimizer.moments 8bit.
FINETUNE_7B = TrainConfig(
    stage="finetune",
    data=DataConfig(template="llava_llama_2"),
    optimizer=OptimizerConfig(learning_rate=2e-5, master="stochastic", moments="bf16"),
    global_batch_size=32,
    micro_batch_tokens=8192,
    recompute="auto",
)

# ---- LLaVA 1.5: scripts/v1_5 of its repository; CLIP ViT-L/14 at 336 px, Vicuna-7B-v1.5 ----

_LLAVA_15_MODEL = ModelConfig(projector_type="mlp2x_gelu")
_LLAVA_15_DATA = DataConfig(
    use_im_start_end=False, image_aspect_ratio="pad", on_long_sample="truncate"
)
PRETRAIN_LLAVA_15 = replace(
    PRETRAIN_7B,
    model=_LLAVA_15_MODEL,
    data=replace(_LLAVA_15_DATA, template="plain", image_aspect_ratio="square"),
    optimizer=OptimizerConfig(learning_rate=1e-3),
    global_batch_size=256,
)
FINETUNE_LLAVA_15 = replace(
    FINETUNE_7B,
    model=_LLAVA_15_MODEL,
    data=replace(_LLAVA_15_DATA, template="v1"),
    global_batch_size=128,
)

# ---- the toy world: both stages in about a minute on two CPU cores ----

_TOY_MODEL = ModelConfig(decoder="toy-world", vision_tower="toy-world")
_TOY_DATA = DataConfig(path="toy-world", image_root="toy-world", num_workers=0)

TINY_PRETRAIN = TrainConfig(
    stage="pretrain",
    model=_TOY_MODEL,
    data=replace(_TOY_DATA, template="plain"),
    optimizer=OptimizerConfig(learning_rate=5e-3),
    global_batch_size=32,
    micro_batch_tokens=4096,
    num_steps=500,
    precision="fp32",
)
TINY_FINETUNE = TrainConfig(
    stage="finetune",
    model=_TOY_MODEL,
    data=replace(_TOY_DATA, template="v1"),
    optimizer=OptimizerConfig(learning_rate=3e-4),
    global_batch_size=16,
    micro_batch_tokens=4096,
    num_steps=400,
    precision="fp32",
)


def _with_data(config: TrainConfig, **changes) -> TrainConfig:
    return replace(config, data=replace(config.data, **changes))


def _with_lora(config: TrainConfig, **changes) -> TrainConfig:
    # adapter state is small, so keep it exact
    exact = replace(config.optimizer, master="split", moments="fp32")
    lora = LoraConfig(rank=64, alpha=16.0, dropout=0.05, **changes)
    return replace(config, lora=lora, optimizer=exact)


FINETUNE_V1 = _with_data(FINETUNE_7B, template="v1")

RECIPES: dict[str, tuple[str, TrainConfig]] = {
    "tiny-pretrain": ("stage 1 on the toy world", TINY_PRETRAIN),
    "tiny-finetune": ("stage 2 on the toy world", TINY_FINETUNE),
    "tiny-finetune-text-only": (
        "stage 2 on the toy world's text alone",
        _with_data(TINY_FINETUNE, text_only=True),
    ),
    "pretrain-7b": (
        "stage 1, LLaMA2-7B, template v0 as in the paper's README",
        PRETRAIN_7B,
    ),
    "pretrain-7b-plain": (
        "stage 1, LLaMA2-7B, bare captions as in the paper's scripts (v0_plain)",
        _with_data(PRETRAIN_7B, template="plain"),
    ),
    "finetune-7b": ("stage 2, LLaMA2-7B, 80k instructions, 2500 steps of 32", FINETUNE_7B),
    "finetune-7b-chat": (
        "stage 2, LLaMA2-7B-chat (stage 1: pretrain-7b with its weights)",
        FINETUNE_7B,
    ),
    "finetune-7b-lora": ("stage 2 with LoRA, rank 64, alpha 16", _with_lora(FINETUNE_7B)),
    "finetune-7b-lora-released": (
        "stage 2 with LoRA as released: embeddings and lm_head train too",
        _with_lora(FINETUNE_7B, train_embeddings=True),
    ),
    "finetune-7b-150k": (
        "stage 2, the earlier variant: 150k instructions, 3 epochs, template v0",
        replace(_with_data(FINETUNE_7B, template="v0"), num_epochs=3.0),
    ),
    "finetune-7b-batch-128": (
        "stage 2 with LLaVA's own global batch of 128",
        replace(FINETUNE_7B, global_batch_size=128),
    ),
    "finetune-7b-text-only": (
        "ablation: the same conversations without images, no tower, template llama_2",
        _with_data(FINETUNE_7B, text_only=True, template="llama_2"),
    ),
    "finetune-7b-conversation": (
        "ablation: conversations only",
        _with_data(FINETUNE_7B, types=("conversation",)),
    ),
    "finetune-7b-detail": (
        "ablation: detailed descriptions only",
        _with_data(FINETUNE_7B, types=("detail",)),
    ),
    "finetune-7b-reasoning": (
        "ablation: complex reasoning only",
        _with_data(FINETUNE_7B, types=("reasoning",)),
    ),
    "pretrain-llama-7b": ("stage 1, LLaMA-7B or Vicuna-7B", PRETRAIN_7B),
    "finetune-llama-7b": ("stage 2, LLaMA-7B, template v1", FINETUNE_V1),
    "finetune-vicuna-7b": ("stage 2, Vicuna-7B, template v1", FINETUNE_V1),
    "pretrain-llava-1.5-7b": ("stage 1 of LLaVA 1.5: 558k captions", PRETRAIN_LLAVA_15),
    "finetune-llava-1.5-7b": ("stage 2 of LLaVA 1.5: 665k instructions", FINETUNE_LLAVA_15),
    "pretrain-open-llama-3b": ("stage 1, OpenLLaMA-3B v2 (head_dim 100)", PRETRAIN_7B),
    "finetune-open-llama-3b": ("stage 2, OpenLLaMA-3B v2, template v1", FINETUNE_V1),
    "finetune-open-llama-3b-lora": (
        "stage 2 with LoRA, OpenLLaMA-3B v2, template v1",
        _with_lora(FINETUNE_V1),
    ),
}
