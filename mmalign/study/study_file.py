"""Reads a study file: TOML tables, and values for their keys from the command line."""

import dataclasses
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmalign.data.controls import CONTROLS
from mmalign.errors import UserError
from mmalign.evaluation.corruptions import parse_corruptions
from mmalign.evaluation.document_scores import MEANS
from mmalign.evaluation.report.beside import DEFINITIONS
from mmalign.evaluation.tasks import TASKS, picture_tasks, resolve_tasks
from mmalign.files import read_toml
from mmalign.study.contrasts import BASE, Question, parse_contrast
from mmalign.study.forgetting import parse_task
from mmalign.study.pictures import metric_names
from mmalign.study.plan import PRETRAIN, Parent, Settings, Study, Variant
from mmalign.study.scores import VISUAL, VISUAL_KINDS
from mmalign.study.settings import with_settings
from mmalign.training.run_folder import flatten
from mmalign.validation import validate

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TABLES = {"study", "pretrain", "finetune", "parents", "variants", "questions"}


def read_study(path: Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """overrides: values that replace those of the file, by their dotted names.

    Raises UserError for a file that is not a study, naming table and key.
    """
    tables = read_toml(path)
    for name, value in (overrides or {}).items():
        _override(tables, name, value)
    _require_tables(path, tables)
    if unknown := tables.keys() - _TABLES:
        raise UserError(
            f"{path}: unknown table [{min(unknown)}]; expected {', '.join(sorted(_TABLES))}"
        )
    settings = with_settings(Settings(), tables.get("study", {}), f"{path}, [study]")
    name = settings.name or path.stem
    settings = replace(settings, name=name, output=settings.output or f"runs/{name}")
    parents = {key: _parent(key, table) for key, table in tables.get("parents", {}).items()}
    variants = {key: _variant(key, table) for key, table in tables.get("variants", {}).items()}
    stages = {stage: flatten(tables.get(stage, {})) for stage in ("pretrain", "finetune")}
    questions = [_question(table, variants) for table in tables.get("questions", [])]
    for table in (settings, *variants.values()):
        validate(table)
    _refuse_unused(path, settings, tables.get("study", {}))
    study = Study(path, settings, parents, variants, questions, stages)
    _check(study)
    return study


def _refuse_unused(path: Path, settings: Settings, given: dict) -> None:
    """UserError for keys of [study] that another one would have to be there for."""
    needs = {"visual-questions-images": ("visual-questions", settings.visual_questions)}
    pictures = ("a task about pictures in tasks", picture_tasks(settings.tasks))
    needs |= {"controls": pictures, "corruptions": pictures}
    for name, (needed, found) in needs.items():
        if not found and (given.get(name) or given.get(name.replace("-", "_"))):
            raise UserError(
                f"{path}, [study]: {name} has no effect without {needed}. Leave it out, or add that"
            )


def _require_tables(path: Path, tables: dict) -> None:
    for name, value in tables.items():
        if name == "questions":
            form, entries = "[[questions]]", value if isinstance(value, list) else [None]
        elif name in ("parents", "variants"):
            form, entries = f"[{name}.NAME]", value.values() if isinstance(value, dict) else [None]
        else:
            form, entries = f"[{name}]", [value]
        if not all(isinstance(entry, dict) for entry in entries):
            raise UserError(f"{path}: {name} is {str(value)[:80]!r}; expected tables {form}")


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
    except (ValueError, RecursionError):  # not TOML
        return text
    return value if isinstance(value, (bool, int, float, list, str)) else text


def _override(tables: dict, name: str, value: Any) -> None:
    first, *path = name.split(".")
    tables = tables.setdefault(first, {})
    if not isinstance(tables, dict):
        raise UserError(f"--{name}: {first} is not a table, so it has no keys to set")
    if first in ("parents", "variants") and path[0] not in tables:
        known = ", ".join(tables)
        raise UserError(f"--{name}: the study has no {first} {path[0]!r}; it has {known}")
    for key in path[:-1]:
        tables = tables.setdefault(key, {})
        if not isinstance(tables, dict):
            raise UserError(f"--{name}: {key} is not a table, so it has no keys to set")
    tables[path[-1]] = value


def _parent(name: str, table: dict) -> Parent:
    return _named(Parent, name, table, f"[parents.{name}]")


def _variant(name: str, table: dict) -> Variant:
    where = f"[variants.{name}]"
    variant = _named(Variant, name, table, where)
    trains = {"finetune": variant.finetune, "control": variant.control, **variant.settings}
    trains |= {"samples": variant.samples, "supervised-tokens": variant.supervised_tokens}
    if variant.model and any(given := [name for name, value in trains.items() if value]):
        raise UserError(f"{where}: {given[0]} is for training, but model is scored as it is")
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
    if not isinstance(primary := given.pop("primary", False), bool):
        raise UserError(f"{where}: primary is {primary!r}; expected true or false")
    given.setdefault("family", "primary" if primary else "secondary")
    question = with_settings(Question("", "", ""), given, where)
    contrast = parse_contrast(question)
    if question.margin and not contrast.equivalence:
        raise UserError(f"{where}: margin is for a contrast with ~, not {question.contrast!r}")
    if question.amounts and not question.contrast.strip().startswith("slope"):
        raise UserError(f"{where}: amounts are for a slope, not {question.contrast!r}")
    if unknown := {name for name, _ in contrast.variants} - {BASE, *variants}:
        raise UserError(f"{where}: the study has no variant {min(unknown)!r}")
    if not contrast.metrics and not question.metrics:
        raise UserError(f"{where}: expected metrics = [...], such as truthfulqa_mc2")
    return question


def _check_questions(study: Study) -> None:
    """Before hours of runs: a question about what no run would have."""
    names = [question.name for question in study.questions]
    if not all(names) or len(set(names)) < len(names):
        raise UserError(f"{study.path}: questions are called {names}; expected a name for each")
    settings = study.settings
    tasks = [TASKS[name] for name in resolve_tasks(settings.tasks)]
    known = {metric.row for task in tasks for metric in task.metrics}
    known |= {f"{task.name}_{kind}" for task in tasks for kind in (*DEFINITIONS, "yes_rate")}
    known |= {mean for mean, members in MEANS.items() if set(members) <= known}
    known |= metric_names(settings.tasks, settings.controls, settings.corruptions)
    if settings.visual_questions:
        known |= {VISUAL, *(f"{VISUAL}_{x}" for x in VISUAL_KINDS)}
    forgotten = tuple(f"{parse_task(name)[0]}_" for name in settings.forgetting)
    for question in study.questions:
        contrast = parse_contrast(question)
        if unknown := set(contrast.parents or ()) - study.parents.keys():
            raise UserError(f"question {question.name!r}: unknown parent {min(unknown)!r}")
        for metric in contrast.metrics or question.metrics:
            if metric not in known and not metric.startswith(forgotten):
                close = get_close_matches(metric, known, n=3)
                hint = f"; did you mean {' or '.join(close)}?" if close else ""
                raise UserError(
                    f"question {question.name!r}: no metric {metric!r} of the study's tasks{hint}"
                )


def _check(study: Study) -> None:
    settings, where = study.settings, study.path
    if set(resolve_tasks(settings.tasks)) == set(picture_tasks(settings.tasks)):
        raise UserError(f"{where}, [study]: expected at least one task without pictures")
    parse_corruptions(settings.corruptions)
    for task in settings.forgetting:
        parse_task(task)
    if settings.keep not in ("all", "scores"):
        raise UserError(f"{where}, [study]: keep is {settings.keep!r}; expected all or scores")
    if settings.name.startswith(".") or "/" in settings.name:
        raise UserError(f"{where}, [study]: name is {settings.name!r}; expected one without a /")
    if study.stages["pretrain"] and not any(x.pretrain for x in study.parents.values()):
        raise UserError(
            f"{where}: [pretrain] has no effect: no parent has pretrain = RECIPE. Leave it out"
        )
    if not study.parents or not study.variants:
        raise UserError(f"{where}: expected at least one [parents.NAME] and one [variants.NAME]")
    if len(set(settings.seeds)) < len(settings.seeds) or not settings.seeds:
        raise UserError(f"{where}, [study]: seeds are {settings.seeds}; expected distinct ones")
    for variant in study.variants.values():
        if unknown := set(variant.parents) - study.parents.keys():
            raise UserError(f"[variants.{variant.name}]: unknown parent {min(unknown)!r}")
    _check_questions(study)
    assert study.runs  # reads every setting
