"""A study file and what it asks for: parents x variants x seeds, as runs with their folders.

runs/PARENT/base-IDENTITY                 the language model as it is, evaluated
runs/PARENT/pretrain/seed_N-IDENTITY      stage 1, shared by all variants of the parent
runs/PARENT/VARIANT/seed_N-IDENTITY       stage 2 from that projector, evaluated

scripts/studies/*.toml explain every key of a study file.
"""

import dataclasses
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import Any

from mmalign.config import TrainConfig
from mmalign.data.controls import CONTROLS
from mmalign.errors import UserError
from mmalign.evaluation.tasks import resolve_tasks
from mmalign.files import read_text
from mmalign.recipes import RECIPES
from mmalign.study.contrasts import BASE, BASE_SEED, Question, parse_contrast
from mmalign.study.forgetting import parse_task
from mmalign.study.settings import with_settings
from mmalign.training.run_folder import flatten
from mmalign.validation import validate

PRETRAIN = "pretrain"  # like BASE a variant that every study has
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TABLES = {"study", "pretrain", "finetune", "parents", "variants", "questions"}


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
    control: str = ""
    """A transform of the data, by its name in mmalign/data/controls.py."""
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
    seed: int  # BASE_SEED: base
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
        found = [Run(x.name, BASE, BASE_SEED, x.decoder) for x in self.parents.values()]
        for seed in self.settings.seeds:
            for parent in self.parents.values():
                found += self._runs_of(parent, seed)
        return found

    def _runs_of(self, parent: Parent, seed: int) -> Iterator[Run]:
        variants = [x for x in self.variants.values() if not x.parents or parent.name in x.parents]
        finetunes = [self._finetune(parent, variant, seed) for variant in variants]
        pretrain = None
        if parent.pretrain and not all(x.config.data.text_only for x in finetunes):
            pretrain = self._pretrain(parent, seed)
            yield pretrain
        for run in finetunes:
            yield run if run.config.data.text_only else replace(run, pretrain=pretrain)

    def _pretrain(self, parent: Parent, seed: int) -> Run:
        where = f"[parents.{parent.name}]"
        config = self._config(parent, parent.pretrain, "pretrain", seed, where, parent.settings)
        return Run(parent.name, PRETRAIN, seed, parent.decoder, parent.pretrain, config)

    def _finetune(self, parent: Parent, variant: Variant, seed: int) -> Run:
        where, own = f"[variants.{variant.name}]", parent.finetune | variant.settings
        if variant.control:
            own = own | CONTROLS[variant.control].settings
        config = self._config(parent, variant.finetune, "finetune", seed, where, own)
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
        config = RECIPES[recipe][1]
        model = {"model.decoder": parent.decoder, "model.vision-tower": parent.vision_tower}
        given = {name: value for name, value in model.items() if value}
        evaluation = {"evaluation.data-root": self.settings.evaluation_data}
        config = with_settings(config, given | evaluation | self.stages[stage], f"[{stage}]")
        config = replace(with_settings(config, settings, where), seed=seed)
        validate(config)
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


# ---- the file ----


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """overrides: values that replace those of the file, by their dotted names.

    Raises UserError for a file that is not a study, naming table and key.
    """
    try:
        tables = tomllib.loads(read_text(path))
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: {error}") from error
    for name, value in (overrides or {}).items():
        _override(tables, name, value)
    if unknown := tables.keys() - _TABLES:
        raise UserError(f"{path}: unknown table [{min(unknown)}]; expected {', '.join(_TABLES)}")
    settings = with_settings(Settings(), tables.get("study", {}), f"{path}, [study]")
    name = settings.name or path.stem
    settings = replace(settings, name=name, output=settings.output or f"runs/{name}")
    parents = {key: _parent(key, table) for key, table in tables.get("parents", {}).items()}
    variants = {key: _variant(key, table) for key, table in tables.get("variants", {}).items()}
    stages = {stage: flatten(tables.get(stage, {})) for stage in ("pretrain", "finetune")}
    questions = [_question(table, variants) for table in tables.get("questions", [])]
    for table in (settings, *variants.values()):
        validate(table)
    study = Study(path, settings, parents, variants, questions, stages)
    _check(study)
    return study


def parse_overrides(arguments: Sequence[str]) -> dict[str, Any]:
    """["--study.limit", "5"] -> {"study.limit": 5}; a value is TOML, or else text."""
    found, rest = {}, list(arguments)
    while rest:
        name, equals, value = rest.pop(0).partition("=")
        if not name.startswith("--") or "." not in name:
            raise UserError(
                f"unknown argument {name!r}; see --help. Keys of the study: --table.key"
            )
        if not equals and not rest:
            raise UserError(f"{name} needs a value")
        found[name[2:]] = _value(value if equals else rest.pop(0))
    return found


def _value(text: str) -> Any:
    try:
        value = tomllib.loads(f"x = {text}")["x"]
    except tomllib.TOMLDecodeError:
        return text
    return value if isinstance(value, (bool, int, float, list, str)) else text


def _override(tables: dict, name: str, value: Any) -> None:
    first, *path = name.split(".")
    tables = tables.setdefault(first, {})
    if first in ("parents", "variants") and path[0] not in tables:
        known = ", ".join(tables)
        raise UserError(f"--{name}: the study has no {first} {path[0]!r}; it has {known}")
    for key in path[:-1]:
        tables = tables.setdefault(key, {})
    tables[path[-1]] = value


def _parent(name: str, table: dict) -> Parent:
    return _named(Parent, name, table, f"[parents.{name}]")


def _variant(name: str, table: dict) -> Variant:
    where = f"[variants.{name}]"
    variant = _named(Variant, name, table, where)
    if variant.control and variant.control not in CONTROLS:
        known = ", ".join(CONTROLS)
        raise UserError(f"{where}: control is {variant.control!r}; expected one of {known}")
    if bool(variant.control_data) != bool(variant.control and CONTROLS[variant.control].second):
        what = "is not used by" if variant.control_data else "is missing: it is needed by"
        raise UserError(f"{where}: control-data {what} control {variant.control!r}")
    return variant


def _named(kind: type, name: str, table: dict, where: str) -> Any:
    """Keys of its own are fields of `kind`, the others settings of the run."""
    if not _NAME.fullmatch(name) or name in (BASE, PRETRAIN):
        raise UserError(
            f"{where}: expected a name of letters, digits, _ and -, not {BASE} or {PRETRAIN}"
        )
    own = {field.name for field in dataclasses.fields(kind)} - {"name", "settings"}
    given = {key: table[key] for key in table if key.replace("-", "_") in own}
    settings = flatten({key: value for key, value in table.items() if key not in given})
    if kind is Parent and isinstance(given.get("finetune"), dict):
        given["finetune"] = flatten(given["finetune"])
    return with_settings(kind(name, settings=settings), given, where)


def _question(table: dict, variants: Mapping[str, Variant]) -> Question:
    """primary = true puts it into the family of that name; others are secondary."""
    where, given = f"question {table.get('name', '')!r}", dict(table)
    primary = given.pop("primary", False)
    given.setdefault("family", "primary" if primary else "secondary")
    question = with_settings(Question("", "", ""), given, where)
    contrast = parse_contrast(question)
    if unknown := {name for name, _ in contrast.variants} - {BASE, *variants}:
        raise UserError(f"{where}: the study has no variant {min(unknown)!r}")
    if not contrast.metrics and not question.metrics:
        raise UserError(f"{where}: expected metrics = [...], such as truthfulqa_mc2")
    return question


def _check(study: Study) -> None:
    settings, where = study.settings, study.path
    resolve_tasks(settings.tasks)
    for task in settings.forgetting:
        parse_task(task)
    if settings.keep not in ("all", "scores"):
        raise UserError(f"{where}, [study]: keep is {settings.keep!r}; expected all or scores")
    if not study.parents or not study.variants:
        raise UserError(f"{where}: expected at least one [parents.NAME] and one [variants.NAME]")
    if len(set(settings.seeds)) < len(settings.seeds) or not settings.seeds:
        raise UserError(f"{where}, [study]: seeds are {settings.seeds}; expected distinct ones")
    for variant in study.variants.values():
        if unknown := set(variant.parents) - study.parents.keys():
            raise UserError(f"[variants.{variant.name}]: unknown parent {min(unknown)!r}")
    assert study.runs  # reads every setting
