"""metrics.jsonl (one object per step), the progress bar, and TensorBoard on request."""

import json
import sys
from pathlib import Path

from tqdm import tqdm

from mmalign.files import read_json_lines, write_json_lines


class Metrics:
    """Written by the main process; a context manager that closes its files.

    A resumed run drops the lines after its checkpoint, since it runs these steps again.
    """

    def __init__(
        self, run_dir: Path, name: str, first_step: int, num_steps: int, tensorboard: bool
    ):
        """name: of the progress bar; first_step: optimizer steps before this process's first."""
        self.path = run_dir / "metrics.jsonl"
        kept = _keep_lines(self.path, first_step)
        self.earlier_losses = [record["loss"] for record in kept if "loss" in record]
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

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *exception) -> None:
        self.bar.close()
        if self.tensorboard:
            self.tensorboard.close()

    def log(self, record: dict) -> None:
        with open(self.path, "a") as file:  # at once: a killed run keeps what it printed
            file.write(json.dumps(record) + "\n")
        self.bar.set_postfix_str(progress(record), refresh=False)
        self.bar.update(record["step"] - self.bar.n)
        if self.tensorboard:
            for key, value in record.items():
                if key != "step" and not isinstance(value, list):
                    self.tensorboard.add_scalar(key, value, record["step"])


def _keep_lines(path: Path, last_step: int) -> list[dict]:
    """Drops the lines of steps after `last_step`, and returns the others."""
    if not path.exists():
        return []
    kept = [record for record in read_json_lines(path, ["step"]) if record["step"] <= last_step]
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
