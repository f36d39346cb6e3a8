"""metrics.jsonl (one object per step) and the progress bar; on request TensorBoard, wandb."""

import errno
import json
import logging
import os
from pathlib import Path

from mmalign.command import progress_bar
from mmalign.config import TrainConfig
from mmalign.files import read_steps, write_json_lines
from mmalign.training.weights_and_biases import WandbRun

log = logging.getLogger("mmalign")


class Metrics:
    """Written by the main process; a context manager that closes its files.

    A resumed run drops the lines after its checkpoint, since it runs these steps again.
    """

    def __init__(self, config: TrainConfig, first_step: int, num_steps: int):
        """first_step: optimizer steps before this process's first."""
        path = config.run_dir / "metrics.jsonl"
        kept = _keep_lines(path, first_step)
        self.earlier_losses = [record["loss"] for record in kept]
        self.file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by __exit__)
        self.last: dict = {}  # the record that was written last, from this byte of the file on
        self.begin = 0
        self.bar = progress_bar(
            total=num_steps, initial=first_step, desc=config.stage, unit="step", mininterval=0.5
        )
        self.tensorboard = None
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            folder = config.run_dir / "tensorboard"
            self.tensorboard = SummaryWriter(folder, purge_step=first_step + 1)
        self.wandb = WandbRun(config) if config.wandb else None
        if self.wandb:
            for record in kept:  # a process that was killed may not have sent its last ones
                self.wandb.log(record["step"], _numbers(record))

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, kind, error, trace) -> None:
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()
        if self.wandb:
            self.wandb.close(failed=kind is not None)

    def log(self, record: dict) -> None:
        self.begin, self.last = self.file.tell(), record
        self._write(record)
        self.bar.set_postfix_str(progress(record), refresh=False)
        self.bar.update(record["step"] - self.bar.n)
        self._show(record["step"], _numbers(record))

    def amend(self, fields: dict[str, float]) -> None:
        """Adds fields to the line that was written last."""
        self.file.truncate(self.begin)
        try:
            self._write(self.last | fields)
        except OSError:  # a full disk, but the line as it was fits
            self.file.truncate(self.begin)
            self._write(self.last)
            raise
        self._show(self.last["step"], fields)

    def _show(self, step: int, values: dict[str, float]) -> None:
        if self.tensorboard:
            for key, value in values.items():
                self.tensorboard.add_scalar(key, value, step)
        if self.wandb:
            self.wandb.log(step, values)

    def _write(self, record: dict) -> None:
        line = (json.dumps(record) + "\n").encode()
        if self.file.write(line) < len(line):  # the disk took a part of it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), self.file.name)


def _numbers(record: dict) -> dict[str, float]:
    return {key: x for key, x in record.items() if key != "step" and not isinstance(x, list)}


def _keep_lines(path: Path, last_step: int) -> list[dict]:
    """Drops the lines of steps after `last_step`, and returns the others; names damaged lines."""
    if not path.exists():
        return []
    records, damaged = read_steps(path)
    for problem in damaged:
        log.warning("%s. It is left out; the checkpoints do not depend on it", problem)
    kept = [record for record in records if record["step"] <= last_step]
    write_json_lines(path, kept)
    return kept


def progress(record: dict) -> str:
    """The part of a step's record that the progress bar shows."""
    parts = [
        f"loss {record['loss']:.4f}",
        f"{record['tokens_per_second']:,.0f} tokens/s",
        f"{record['samples_per_second']:,.1f} samples/s",
        f"{record['tflops_per_second']:,.3g} TFLOP/s",
    ]
    if "mfu" in record:
        parts.append(f"mfu {record['mfu']:.1%}")
    parts.append(f"data wait {record['data_wait_share']:.0%}")
    parts.append(f"{record['memory_peak_bytes'] / 2**30:.1f} GiB")
    if "power_watts" in record:
        parts.append(f"{record['power_watts']:.0f} W")
    if record.get("throttle_reasons"):
        parts.append(f"throttled: {', '.join(record['throttle_reasons'])}")
    return "  ".join(parts)
