"""Short runs on the small world, and what they leave behind."""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from mmalign.command import StopSignal
from mmalign.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from mmalign.distributed import DistributedContext
from mmalign.files import read_json_lines
from mmalign.flops import Workload
from mmalign.model.llava import Llava
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset, resolve
from mmalign.training.loop import TrainingLoop, build_loop

CPU = DistributedContext(0, 1, torch.device("cpu"))


def small_config(world, run_dir: Path, stage: str = "finetune", **changes) -> TrainConfig:
    """Settings of a run on the small world; `data` and `optimizer` take dicts of fields."""
    data = DataConfig(
        path=str(world.pretrain_json if stage == "pretrain" else world.finetune_json),
        image_root=str(world.images),
        template="v1",
        shuffle=False,
        num_workers=0,
    )
    optimizer = OptimizerConfig(learning_rate=1e-2, warmup_ratio=0.2)
    model = ModelConfig(
        decoder=str(world.decoder),
        vision_tower=str(world.vision_tower),
        projector=str(world.projector),
    )
    return TrainConfig(
        stage=stage,
        run_dir=run_dir,
        model=replace(model, **changes.pop("model", {})),
        data=replace(data, **changes.pop("data", {})),
        optimizer=replace(optimizer, **changes.pop("optimizer", {})),
        **{
            "global_batch_size": 8,
            "micro_batch_tokens": 4096,
            "num_steps": 6,
            "precision": "fp32",
            "device": "cpu",
            **changes,
        },
    )


def small_loop(config: TrainConfig) -> TrainingLoop:
    """The loop that train(config) runs in one process."""
    config = resolve(config)
    tokenizer = Tokenizer.from_pretrained(config.model.tokenizer)
    dataset = build_dataset(config, tokenizer)
    return build_loop(config, CPU, tokenizer, dataset, StopSignal())


def workload_of(model: Llava, config: TrainConfig) -> Workload:
    vision = model.vision_tower.config if model.vision_tower else None
    return Workload.from_config(config, model.decoder.config, vision)


def losses(run_dir: Path) -> list[float]:
    return [record["loss"] for record in read_json_lines(run_dir / "metrics.jsonl")]


def exported_weights(run_dir: Path) -> dict[str, torch.Tensor]:
    files = sorted((run_dir / "export").rglob("*.safetensors"))
    return {
        f"{file.relative_to(run_dir)}:{name}": tensor
        for file in files
        for name, tensor in load_file(file).items()
    }
