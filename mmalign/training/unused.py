"""Settings that a user gives although nothing in the run would read them."""

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from mmalign.config import TrainConfig
from mmalign.data.templates import find_template
from mmalign.errors import UserError

log = logging.getLogger("mmalign")


@dataclass(frozen=True)
class _Switch:
    """A setting that turns others off."""

    name: str
    is_off: Callable[[TrainConfig], bool]
    others: tuple[str, ...]
    why: str
    remedy: str = ""


_PICTURES = ("model.vision-tower", "model.projector", "model.projector-type", "data.image-root")
_PICTURES += ("data.follow-links", "data.image-aspect-ratio", "data.check-images")
_LORA = ("lora.alpha", "lora.dropout", "lora.targets", "lora.train-embeddings")
_EVALUATION = ("evaluation.data-root", "evaluation.tasks", "evaluation.limit")
_SWITCHES = (
    _Switch(
        "data.text-only",
        lambda config: config.data.text_only,
        (*_PICTURES, "data.use-im-start-end"),
        "the run trains on text alone (data.text-only)",
        ", or name a recipe with pictures",
    ),
    _Switch(
        "data.template",
        lambda config: not find_template(config.data.template).writes_image_tokens,
        ("data.use-im-start-end",),
        "the template writes no <im_start> and <im_end> (data.template)",
    ),
    _Switch(
        "lora.rank",
        lambda config: config.lora.rank == 0,
        _LORA,
        "the run trains without adapters (lora.rank is 0)",
        ", or set --lora.rank",
    ),
    _Switch(
        "evaluation.every",
        lambda config: config.evaluation.every == 0,
        (*_EVALUATION, "evaluation.batch-tokens"),
        "nothing is evaluated during training (evaluation.every is 0)",
        ", or set --evaluation.every",
    ),
    _Switch(
        "num-steps",
        lambda config: config.num_steps is not None,
        ("num-epochs",),
        "the number of steps is given (num-steps)",
        ", or add --num-steps None",
    ),
    _Switch(
        "parallel.sharding",
        lambda config: config.parallel.sharding != "hybrid",
        ("parallel.shard-size",),
        "only --parallel.sharding hybrid has groups",
    ),
)


def refuse_unused(config: TrainConfig, given: Iterable[str], where: str = "") -> None:
    """UserError for a setting among `given` (their names) that another one turns off.

    The user did not write a recipe's settings; where the switch is among `given`, too, the log
    says what is not used. where: the table of a study file; empty: the names are options.
    """
    given = {name.replace("_", "-") for name in given}
    lead, dashes = (f"{where}: ", "") if where else ("", "--")
    for switch in _SWITCHES:
        names = [dashes + name for name in switch.others if name in given]
        if not names or not switch.is_off(config):
            continue
        sentence = f"{lead}{' and '.join(names)} would have no effect: {switch.why}"
        if switch.name not in given:
            remedy = "" if where else switch.remedy  # which names options
            raise UserError(f"{sentence}. Leave it out{remedy}")
        log.warning("%s", sentence)


def options_in(arguments: Iterable[str]) -> list[str]:
    """Names of the options of a command line."""
    options = (x.partition("=")[0] for x in arguments if x.startswith("--"))
    return [x.removeprefix("--") for x in options]
