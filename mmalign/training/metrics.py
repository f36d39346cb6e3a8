"""metrics.jsonl (one object a step), the progress bar, and TensorBoard where asked for."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from mmalign.training.telemetry import progress


class Metrics:
    """Written by the main process. A continued run drops the lines after its checkpoint."""

    def __init__(
        self, run_dir: Path, name: str, first_step: int, num_steps: int, tensorboard: bool
    ):
        path = run_dir / "metrics.jsonl"
        kept = keep_lines(path, first_step)
        self.earlier_losses = [record["loss"] for record in kept if "loss" in record]
        self.file = open(path, "a", buffering=1)  # line by line: a killed run keeps what it printed
        self.bar = tqdm(
            total=num_steps,
            initial=first_step,
            desc=name,
            unit="step",
            mininterval=0.5 if sys.stderr.isatty() else 10.0,
            dynamic_ncols=True,
        )
        self.tensorboard = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)

    def log(self, record: dict) -> None:
        self.file.write(json.dumps(record) + "\n")
        self.bar.set_postfix_str(progress(record), refresh=False)
        self.bar.update(record["step"] - self.bar.n)
        if self.tensorboard:
            for key, value in record.items():
                if key != "step" and not isinstance(value, list):
                    self.tensorboard.add_scalar(key, value, record["step"])

    def close(self) -> None:
        self.file.close()
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()


def read_metrics(path: Path) -> list[dict]:
    """The complete lines of a metrics.jsonl; a line torn by a kill can only be the last."""
    records = []
    for line in path.read_text().splitlines():
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def keep_lines(path: Path, last_step: int) -> list[dict]:
    """Drops the lines of steps after `last_step`, which a continued run writes again."""
    if not path.exists():
        return []
    kept = [record for record in read_metrics(path) if record["step"] <= last_step]
    torn = path.with_suffix(".tmp")
    torn.write_text("".join(json.dumps(record) + "\n" for record in kept))
    torn.replace(path)  # a kill leaves the old lines or the new ones
    return kept
