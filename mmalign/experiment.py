"""The whole experiment: pretrain, finetune, evaluate base and tuned language model, report."""

from dataclasses import dataclass, replace
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.evaluation.items import is_finished
from mmalign.evaluation.report import write_report
from mmalign.evaluation.visual_questions import score_run
from mmalign.recipes import RECIPES
from mmalign.toy_world import toy_world
from mmalign.training.loop import train
from mmalign.validation import validate


@dataclass(frozen=True)
class Experiment:
    pretrain: str
    """Recipe of stage 1."""
    finetune: str
    """Recipe of stage 2."""
    output: Path
    """Folder for both runs, both evaluations and report.md."""
    decoder: str = ""
    """Hugging Face folder of the base language model."""
    vision_tower: str = ""
    """Hugging Face folder of the vision tower."""
    pretrain_data: str = ""
    """Image-caption pairs in LLaVA's format."""
    pretrain_images: str = ""
    finetune_data: str = ""
    """Visual instructions in LLaVA's format."""
    finetune_images: str = ""
    evaluation_data: str = ""
    """Folder with truthfulqa/ and ethics/."""
    limit: int | None = None
    """Evaluate only on the first N documents of each task."""
    batch_tokens: int = 8192
    """Maximum tokens in one forward pass of the evaluation."""
    evaluate_every: int = 0
    """Also score the language model every N steps of stage 2, for the figure of score against step;
    0: only before and after."""


PAPER = Experiment(pretrain="pretrain-7b", finetune="finetune-7b", output=Path("runs/paper"))
TINY = Experiment(
    pretrain="tiny-pretrain",
    finetune="tiny-finetune",
    output=Path("runs/tiny"),
    evaluate_every=300,
)


def run_experiment(experiment: Experiment) -> Path:
    """Runs whatever is not finished yet and returns the path of report.md."""
    for settings in (experiment, *_stages(experiment)):  # all before hours of the first
        validate(settings)
    if experiment.pretrain.startswith("tiny"):
        experiment = _in_toy_world(experiment)
    output = experiment.output
    pretrain, finetune = _stages(experiment)
    train(pretrain)
    train(finetune)
    evaluations = {
        "base": _evaluate(experiment, experiment.decoder, output / "evaluation_base"),
        "tuned": _evaluate(experiment, finetune.run_dir, output / "evaluation_tuned"),
    }
    visual = None
    if experiment.finetune.startswith("tiny"):
        world = toy_world()
        visual = score_run(finetune, world.heldout_json, world.image_root)
    return write_report(
        output / "report.md",
        stages={"pretrain": pretrain.run_dir, "finetune": finetune.run_dir},
        evaluations=evaluations,
        visual=visual,
    )


def _in_toy_world(experiment: Experiment) -> Experiment:
    world = toy_world()
    return replace(
        experiment,
        decoder=str(world.decoder),
        vision_tower=str(world.vision_tower),
        pretrain_data=str(world.pretrain_json),
        pretrain_images=str(world.image_root),
        finetune_data=str(world.finetune_json),
        finetune_images=str(world.image_root),
        evaluation_data=str(world.evaluation),
    )


def _stages(experiment: Experiment) -> tuple[TrainConfig, TrainConfig]:
    pretrain, finetune = (_recipe(name) for name in (experiment.pretrain, experiment.finetune))
    pretrain = replace(
        pretrain,
        run_dir=experiment.output / "pretrain",
        model=replace(
            pretrain.model, decoder=experiment.decoder, vision_tower=experiment.vision_tower
        ),
        data=replace(
            pretrain.data, path=experiment.pretrain_data, image_root=experiment.pretrain_images
        ),
    )
    finetune = replace(
        finetune,
        run_dir=experiment.output / "finetune",
        model=replace(pretrain.model, projector=str(pretrain.run_dir)),
        data=replace(
            finetune.data, path=experiment.finetune_data, image_root=experiment.finetune_images
        ),
        evaluation=replace(
            finetune.evaluation,
            every=experiment.evaluate_every,
            data_root=experiment.evaluation_data,
            batch_tokens=experiment.batch_tokens,
        ),
    )
    return pretrain, finetune


def _recipe(name: str) -> TrainConfig:
    if name not in RECIPES:
        raise UserError(f"unknown recipe {name!r}; expected one of {', '.join(RECIPES)}")
    return RECIPES[name][1]


def _evaluate(experiment: Experiment, model: str | Path, output: Path) -> Path:
    if is_finished(output):
        print(f"{output} is finished; delete it to evaluate again")
        return output
    evaluate_model(
        model,
        tasks=["truthfulqa", "ethics"],
        data_root=Path(experiment.evaluation_data),
        output=output,
        limit=experiment.limit,
        batch_tokens=experiment.batch_tokens,
        overwrite=True,  # damaged ones
    )
    return output
