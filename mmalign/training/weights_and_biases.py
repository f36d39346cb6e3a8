"""A run's metrics on Weights & Biases, where --wandb names a project.

wandb's own environment variables hold: WANDB_MODE=offline needs no network, and `wandb sync` sends
later what the last process of the run wrote, which has all steps. What fails there is said once and
stops nothing: metrics.jsonl has it all.
"""

import logging
import secrets
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.files import read_json, read_text, write_text

log = logging.getLogger("mmalign")
_FINISH_SECONDS = 60.0  # for the rest of the upload when a run ends


def require_wandb(config: TrainConfig) -> None:
    """Raises UserError before anything is read where --wandb asks for what is not installed."""
    if config.wandb:
        _wandb()


def _wandb() -> Any:
    try:
        wandb: Any = import_module("wandb")
        if not hasattr(wandb, "init"):  # a folder of offline runs imports as a package, too
            raise ImportError(f"{list(wandb.__path__)[0]} is a folder of runs")
    except ImportError as error:
        raise UserError(
            f"--wandb: the package wandb cannot be imported ({error}). Install it with pip install "
            "wandb, or leave the option out: metrics.jsonl has the same numbers"
        ) from error
    return wandb


class WandbRun:
    """The run of this run folder: a resumed one continues under its id."""

    def __init__(self, config: TrainConfig):
        """Reads the folder's config.json, which becomes the run's config."""
        self.run: Any = None
        self._try("start", lambda: self._start(config))

    def _start(self, config: TrainConfig) -> None:
        wandb, run_dir = _wandb(), config.run_dir
        self.run = wandb.init(
            project=config.wandb,
            name=run_dir.resolve().name,
            id=_run_id(run_dir / "wandb_run_id"),
            resume="allow",
            dir=str(run_dir),
            config=read_json(run_dir / "config.json"),
            # its copy of the console would take the place of the progress bar's terminal
            settings=wandb.Settings(console="off", finish_timeout=_FINISH_SECONDS),
        )

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Values of a step, which may come in parts; steps that the service has are left out."""
        if self.run is not None and step >= self.run.step:
            self._try("log", lambda: self.run.log(dict(values), step=step))

    def close(self, failed: bool) -> None:
        if self.run is not None:
            self._try("finish", lambda: self.run.finish(exit_code=int(failed)))

    def _try(self, what: str, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:  # whatever a service and its library can raise
            self.run = None
            log.warning(
                "Weights & Biases could not %s (%s): this run goes on without it, and "
                "metrics.jsonl has its numbers",
                *(what, error),
            )


def _run_id(path: Path) -> str:
    if not path.exists():
        write_text(path, secrets.token_hex(8))
    return read_text(path).strip()
