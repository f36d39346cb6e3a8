"""A study: parents x variants x seeds, as runs with their folders.

runs/PARENT/base-IDENTITY                 the language model as it is, evaluated
runs/PARENT/VARIANT-IDENTITY              the same of a published model made from it
runs/PARENT/pretrain/seed_N-IDENTITY      stage 1, shared by all variants of the parent
runs/PARENT/VARIANT/seed_N-IDENTITY       stage 2 from that projector, evaluated

scripts/studies/*.toml explain every key of a study file.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path

from mmalign.config import TrainConfig
from mmalign.data.controls import CONTROLS
from mmalign.errors import UserError
from mmalign.evaluation.pictures import Control
from mmalign.evaluation.tasks import TASKS, resolve_tasks
from mmalign.recipes import RECIPES
from mmalign.study.contrasts import BASE, BASE_SEED, Question
from mmalign.study.settings import with_settings
from mmalign.training.unused import refuse_unused
from mmalign.validation import validate

PRETRAIN = "pretrain"  # like BASE a variant that every study has


@dataclass(frozen=True)
class Settings:
    """The table [study]."""

    name: str = ""
    output: str = ""
    """Folder of report and scores."""
    runs: str = ""
    """Folder of the runs; studies that share one share equal runs. Unset: OUTPUT/runs."""
    seeds: tuple[int, ...] = (0,)
    tasks: tuple[str, ...] = ("truthfulqa", "ethics")
    """As evaluate.py takes them; those about pictures are for models that see."""
    controls: tuple[Control, ...] = ("blind",)
    """Ask about pictures again without them (blind), or with exchanged ones (mismatched)."""
    corruptions: tuple[str, ...] = ()
    """Ask again about corrupted pictures: NAME:SEVERITIES, as evaluate.py takes them."""
    evaluation_data: str = ""
    limit: int | None = None
    """Only the first N documents of each task."""
    visual_questions: str = ""
    """Questions about images in LLaVA's format, asked with their own image, another and none."""
    visual_questions_images: str = ""
    forgetting: tuple[str, ...] = ()
    """Tasks of lm-evaluation-harness with their shots, such as gsm8k:8."""
    keep: str = "all"
    """all, or scores: exports and checkpoints are deleted when their scores are complete."""


@dataclass(frozen=True)
class Parent:
    name: str
    decoder: str = ""
    vision_tower: str = ""
    pretrain: str = ""
    """Recipe of stage 1; unset: stage 2 starts from finetune.model.projector."""
    settings: dict = dataclasses.field(default_factory=dict)  # of stage 1
    finetune: dict = dataclasses.field(default_factory=dict)  # settings of stage 2, all variants


@dataclass(frozen=True)
class Variant:
    name: str
    finetune: str = ""
    """Recipe of stage 2."""
    model: str = ""
    """Instead of a recipe: the folder of a published model, which is scored as it is."""
    control: str = ""
    """A transform of the data, by its name in mmalign/data/controls."""
    control_data: str = ""
    """The second file of a control that needs one."""
    samples: int | None = None
    """Train on so many samples: subsets of one order per seed, so that they are nested."""
    supervised_tokens: int | None = None
    """As samples, but so many tokens with a target."""
    parents: tuple[str, ...] = ()
    """Only of these parents; unset: of all."""
    settings: dict = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Transform:
    """How the data of a run is made from the file that its settings name."""

    control: str
    second: str
    samples: int | None
    supervised_tokens: int | None


@dataclass(frozen=True)
class Run:
    """One folder: a model that is trained, evaluated, or both."""

    parent: str
    variant: str
    seed: int  # BASE_SEED: not trained here
    decoder: str
    recipe: str = ""
    config: TrainConfig | None = None  # of its training, data.path before the transform
    transform: Transform | None = None
    pretrain: "Run | None" = None  # whose projector it starts from

    @property
    def name(self) -> str:
        """parent/variant/seed_N, unique in a study."""
        return f"{self.parent}/{self.variant}" + ("" if self.seed < 0 else f"/seed_{self.seed}")

    @property
    def sees_pictures(self) -> bool:
        return self.config is not None and not self.config.data.text_only

    @property
    def is_evaluated(self) -> bool:
        return self.variant != PRETRAIN


@dataclass(frozen=True)
class Study:
    path: Path
    settings: Settings
    parents: dict[str, Parent]
    variants: dict[str, Variant]
    questions: list[Question]
    stages: dict[str, dict]  # settings of all runs of a stage, by stage

    @property
    def output(self) -> Path:
        return Path(self.settings.output)

    @property
    def runs_folder(self) -> Path:
        return Path(self.settings.runs) if self.settings.runs else self.output / "runs"

    @cached_property
    def runs(self) -> list[Run]:
        """What others start from comes before them, and one seed of all before the next."""
        found = []
        for parent in self.parents.values():
            found.append(Run(parent.name, BASE, BASE_SEED, parent.decoder))
            published = [x for x in self._variants_of(parent) if x.model]
            found += [Run(parent.name, x.name, BASE_SEED, x.model) for x in published]
        for seed in self.settings.seeds:
            for parent in self.parents.values():
                found += self._runs_of(parent, seed)
        return found

    def _runs_of(self, parent: Parent, seed: int) -> Iterator[Run]:
        variants = [x for x in self._variants_of(parent) if not x.model]
        finetunes = [self._finetune(parent, variant, seed) for variant in variants]
        pretrain = None
        if parent.pretrain and any(run.sees_pictures for run in finetunes):
            pretrain = self._pretrain(parent, seed)
            yield pretrain
        for run in finetunes:
            yield replace(run, pretrain=pretrain) if run.sees_pictures else run

    def _variants_of(self, parent: Parent) -> list[Variant]:
        return [x for x in self.variants.values() if not x.parents or parent.name in x.parents]

    def _pretrain(self, parent: Parent, seed: int) -> Run:
        where = f"[parents.{parent.name}]"
        config = self._config(parent, parent.pretrain, "pretrain", seed, where, parent.settings)
        return Run(parent.name, PRETRAIN, seed, parent.decoder, parent.pretrain, config)

    def _finetune(self, parent: Parent, variant: Variant, seed: int) -> Run:
        where, own = f"[variants.{variant.name}]", parent.finetune | variant.settings
        if variant.control:
            own = {**own, **CONTROLS[variant.control].settings}
        config = self._config(parent, variant.finetune, "finetune", seed, where, own)
        refuse_unused(config, variant.settings, where)
        wanted = (variant.control, variant.control_data, variant.samples, variant.supervised_tokens)
        transform = Transform(*wanted) if any(wanted) else None
        return Run(
            *(parent.name, variant.name, seed, parent.decoder),
            *(variant.finetune, config, transform),
        )

    def _config(
        self, parent: Parent, recipe: str, stage: str, seed: int, where: str, settings: dict
    ) -> TrainConfig:
        if recipe not in RECIPES or RECIPES[recipe][1].stage != stage:
            known = ", ".join(name for name, (_, x) in RECIPES.items() if x.stage == stage)
            raise UserError(f"{where}: {stage} is {recipe!r}; expected one of {known}")
        for name in (*self.stages[stage], *settings):
            if name.replace("_", "-") in ("seed", "run-dir"):
                raise UserError(f"{where}: {name} is given by [study], as seeds and output")
            if name.replace("_", "-") in ("stage", "print-config"):
                raise UserError(f"{where}: {name} is not for a study's runs. Leave it out")
        config = RECIPES[recipe][1]
        model = {"model.decoder": parent.decoder, "model.vision-tower": parent.vision_tower}
        given = {name: value for name, value in model.items() if value}
        scored = resolve_tasks(self.settings.tasks)
        evaluation = {
            "evaluation.data-root": self.settings.evaluation_data,
            "evaluation.tasks": [x for x in scored if TASKS[x].kind == "loglikelihood"],
        }
        config = with_settings(config, given | evaluation | self.stages[stage], f"[{stage}]")
        config = replace(with_settings(config, settings, where), seed=seed)
        validate(config)
        refuse_unused(config, {"num-epochs", "num_epochs"} & {*self.stages[stage]}, f"[{stage}]")
        return config

    def chosen(self, only: Sequence[str], seeds: Sequence[int]) -> list[Run]:
        """Runs by the names of variants, parents, or PARENT/VARIANT (with * and ?), and by seed."""
        for name in only:
            if not any(_is_named(run, name) for run in self.runs):
                known = ", ".join([*self.parents, BASE, PRETRAIN, *self.variants])
                raise UserError(f"--only {name}: no run has this name; expected one of {known}")
        if unknown := set(seeds) - set(self.settings.seeds):
            raise UserError(
                f"--seeds {min(unknown)}: the study's seeds are "
                f"{', '.join(map(str, self.settings.seeds))}"
            )
        return [
            run
            for run in self.runs
            if (not only or any(_is_named(run, name) for name in only))
            and (not seeds or run.seed < 0 or run.seed in seeds)
        ]

    def dependants(self, pretrain: Run) -> list[Run]:
        return [run for run in self.runs if run.pretrain == pretrain]


def _is_named(run: Run, name: str) -> bool:
    names = (run.parent, run.variant, f"{run.parent}/{run.variant}", run.name)
    return any(fnmatch(known, name) for known in names)
