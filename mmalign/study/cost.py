"""What runs cost before they run: FLOPs, GPU-hours and disk, from shapes and published counts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from mmalign.config import ModelConfig, TrainConfig
from mmalign.data.loader import num_steps_of
from mmalign.errors import UserError
from mmalign.flops import Workload, required_flops
from mmalign.study.plan import Run, Study
from mmalign.system import DTYPES, GPUS
from mmalign.tokenizer import Tokenizer
from mmalign.training.build import build_dataset
from mmalign.training.memory.plan import MemoryPlan
from mmalign.training.memory.samples import AverageSample, average_sample, llava_sample
from mmalign.training.memory.table import published_workload

MFU = 0.4  # assumed where no run has been timed
# of the published files: CC3M-595K, and llava_instruct_80k by the shares of the types in 158k
NUM_SAMPLES = {"pretrain": 595_375, "finetune": 80_000}
TYPE_SHARES = {"conversation": 0.36, "detail": 0.15, "reasoning": 0.49}


@dataclass(frozen=True)
class Cost:
    flops: float  # of training
    weights: int  # bytes of exports and checkpoints while the run is not tidied
    exact: bool  # from the run's own folders and data, not from published shapes

    def hours(self, gpu: str) -> float:
        """On a GPU of this name at the assumed MFU."""
        peaks = {x.name: x.bf16_flops for x in GPUS if x.bf16_flops}
        if gpu not in peaks:
            raise UserError(f"--gpu {gpu}: expected one of {', '.join(peaks)}")
        return self.flops / (peaks[gpu] * MFU) / 3600


def cost_of(study: Study, run: Run, config: TrainConfig | None) -> Cost:
    """config: with all paths filled in, or None where some are missing."""
    exact = config is not None
    config = config or run.config
    assert config is not None
    if exact:
        workload, (count, sample) = Workload.from_config(config), _data_of(config)
    else:
        unnamed = replace(config, model=ModelConfig())
        recipe = study.parents[run.parent].pretrain or run.recipe
        workload = published_workload(unnamed, recipe)
        count, sample = _published(config, workload)
    if run.transform and run.transform.samples:
        count = min(count, run.transform.samples)
    if run.transform and run.transform.supervised_tokens:
        count = min(count, run.transform.supervised_tokens / sample.loss_tokens)
    batch = config.global_batch_size
    steps = config.num_steps or num_steps_of(max(1, round(count)), batch, config.num_epochs)
    mean = [round(sample.tokens)], round(sample.loss_tokens), round(sample.tiles)
    flops = required_flops(workload, config.shortcuts, *mean).total
    return Cost(float(flops) * steps * batch, _bytes(config, workload), exact)


def _published(config: TrainConfig, workload: Workload) -> tuple[float, AverageSample]:
    stage, types = config.stage, config.data.types
    count = NUM_SAMPLES[stage] * (sum(TYPE_SHARES.get(x, 0) for x in types) if types else 1)
    count = min(count, config.data.num_samples or count)
    return count, llava_sample(stage, workload.vision)


@lru_cache(maxsize=64)
def _data_of(config: TrainConfig) -> tuple[float, AverageSample]:
    """Of the file itself: its number of samples, and the mean of some of them."""
    dataset = build_dataset(config, Tokenizer.from_pretrained(config.model.tokenizer))
    if sample := average_sample(dataset):
        return len(dataset), sample
    return _published(config, Workload.from_config(config))


def _bytes(config: TrainConfig, workload: Workload) -> int:
    """Exports, and config.checkpoint.keep checkpoints."""
    device = "cuda" if config.precision == "bf16" else "cpu"
    plan = MemoryPlan(config, workload, 0, device)
    itemsize = DTYPES[config.precision].itemsize
    trained = sum(x.numel for x in plan.parameters if x.trained) * itemsize
    total = sum(x.numel for x in plan.parameters) * itemsize
    decoder = sum(x.numel for x in plan.parameters if x.unit == "layer") * itemsize
    checkpoints = config.checkpoint.keep * (trained + plan.fixed()["optimizer state"])
    exports = total + decoder if config.stage == "finetune" else trained  # llava/ and llama/
    return checkpoints + exports


def free_bytes(folder: Path) -> int:
    existing = next(x for x in (folder.absolute(), *folder.absolute().parents) if x.exists())
    return shutil.disk_usage(existing).free


def seconds_of(outcomes: Sequence[dict]) -> float | None:
    """Mean seconds of runs that have ended; None without any."""
    found = [sum(x["seconds"].values()) for x in outcomes if "seconds" in x]
    return sum(found) / len(found) if found else None
