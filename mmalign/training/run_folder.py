"""config.json of a run folder: settings and versions, and whether a command matches them."""

import dataclasses
import json
import socket
import sys
import time
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.files import read_json, write_text
from mmalign.system import versions
from mmalign.validation import RANGES

# fields that may differ when a run resumes
FREE_FIELDS = (
    "run_dir",
    "device",
    "tensorboard",
    "wandb",
    "peak_tflops",
    "profile",
    "micro_batch_tokens",  # changes rounding only, and helps when memory runs out
    "recompute",  # as above
    "recompute_layers",
    "on_non_finite",  # its error message proposes the change
    "loss_spike_factor",
    "print_config",
    "checkpoint.every",
    "checkpoint.keep",
    "shortcuts.frozen_prefix",  # changes rounding only
    "parallel.sharding",  # checkpoints do not depend on how many processes wrote them
    "parallel.shard_size",
    "parallel.timeout_minutes",
    "evaluation.every",  # training does not depend on it
    "evaluation.batch_tokens",  # changes rounding only
    "data.num_workers",
    "data.check_images",
    # what lies under these paths is compared by its content: inputs.py
    "model.decoder",
    "model.vision_tower",
    "model.projector",
    "model.tokenizer",
    "data.path",
    "data.image_root",
    "evaluation.data_root",
)
# what a run writes, and its report
FILES = ("config.json", "inputs.json", "data_check.npz", "*_samples.txt", "metrics.jsonl")
FILES += ("report.md", "*.png", "export/projector.safetensors")
FOLDERS = ("checkpoints", "evaluation", "evaluation/*", "profile", "tensorboard")
FOLDERS += ("export", "export/llama", "export/llava", "export/adapter")
_RESTORE = "Restore a copy of it, or use another --run-dir."


def config_json(config: TrainConfig, **extra) -> str:
    """extra: further top-level entries."""
    return json.dumps(dataclasses.asdict(config) | extra, indent=2, default=str)


def write_config(config: TrainConfig) -> None:
    """Writes config.json of a new run; in a folder that has one, checks that it is the same run."""
    path = config.run_dir / "config.json"
    if path.exists():
        _check_same_run(_read(path), config, path)
        return
    if any((config.run_dir / "checkpoints").glob("step_*")):
        raise UserError(
            f"{config.run_dir} has checkpoints but no config.json, so whether they are of this run "
            f"cannot be told. {_RESTORE}"
        )
    config.run_dir.mkdir(parents=True, exist_ok=True)
    write_text(path, config_json(config, command=sys.argv, versions=versions()))


def with_first_decision(config: TrainConfig) -> TrainConfig:
    """micro_batch_tokens "auto" as the run in run_dir resolved it when it first started.

    Free memory differs from start to start, and another size would change the rounding.
    """
    path = config.run_dir / "config.json"
    if config.micro_batch_tokens != "auto" or not path.exists():
        return config
    decided = _read(path).get("micro_batch_tokens")
    if type(decided) is not int or decided not in RANGES["micro_batch_tokens"]:
        raise UserError(f"{path}: micro_batch_tokens is {decided!r}, expected a number. {_RESTORE}")
    return dataclasses.replace(config, micro_batch_tokens=decided)


def _read(path: Path) -> dict:
    try:
        return read_json(path)
    except UserError as error:
        raise UserError(f"{error}. {_RESTORE}") from error


def check_shared(run_dir: Path, ranks: DistributedContext, patience: float = 60.0) -> None:
    """Raises UserError on all ranks if one of them does not see the files of the main process.

    patience: seconds that a network file system may take to show a new file on other nodes.
    """
    if ranks.world_size == 1:
        return
    mark = run_dir / f"seen_from_{ranks.broadcast_from_main(socket.gethostname())}"
    if ranks.is_main:
        mark.touch()
    ranks.barrier()
    end = time.monotonic() + patience
    while not (seen := mark.exists()) and time.monotonic() < end:
        time.sleep(0.2)
    missing = ranks.gather_to_main(
        None if seen else f"process {ranks.rank} on {socket.gethostname()}"
    )
    blind = ranks.broadcast_from_main([name for name in missing if name])
    if ranks.is_main:
        mark.unlink()
    if blind:
        raise UserError(
            f"--run-dir {run_dir}: what process 0 writes there is not seen by {', '.join(blind)}. "
            "Use a folder on a disk that all nodes share"
        )


def flatten(tree: dict, prefix: str = "") -> dict[str, object]:
    """{"data": {"path": x}} -> {"data.path": x}."""
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _check_same_run(saved: dict, config: TrainConfig, path: Path) -> None:
    now, default = (
        flatten(json.loads(config_json(x))) for x in (config, TrainConfig(stage=config.stage))
    )
    before = default | flatten(saved)  # an option that is newer than the run had its default
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if name not in FREE_FIELDS and before.get(name) != value
    ]
    if changed:
        raise UserError(
            f"{path.parent} contains a run with another configuration: {'; '.join(changed)}. "
            "Rerun the command that started it, or use another --run-dir."
        )
