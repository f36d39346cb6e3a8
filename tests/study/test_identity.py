"""A run's identity: what changes its result changes its folder, and nothing else does."""

import json
import shutil
from pathlib import Path

import pytest

from mmalign.study.identity import Orders
from mmalign.study.study_file import parse_overrides, read_study


def identities(path: Path, *overrides: str) -> dict[str, str]:
    orders = Orders(read_study(path, parse_overrides(overrides)))
    return {run.name: orders[run].identity for run in orders.study.runs}


@pytest.mark.parametrize(
    "override, changed",
    [
        (("--finetune.optimizer.learning-rate", "0.5"), {"visual", "text-only", "part"}),
        (("--pretrain.num-steps", "4"), {"pretrain", "visual", "part"}),
        (("--variants.part.samples", "17"), {"part"}),
        (("--variants.visual.data.template", "v0"), {"visual"}),
        (("--finetune.data.num-workers", "1"), set()),
        (("--finetune.checkpoint.every", "1"), set()),
        (("--study.keep", "scores"), set()),
    ],
)
def test_settings(study_file, override, changed):
    path = study_file()
    before, after = identities(path), identities(path, *override)
    differs = {name.split("/")[1] for name in before if before[name] != after[name]}
    assert differs == changed


def test_seeds_and_variants_differ(study_file):
    found = identities(study_file())
    assert len(set(found.values())) == len(found) == 9


def test_content_of_the_data_not_its_path(study_file, world, tmp_path):
    path, copy = study_file(), tmp_path / "copy.json"
    shutil.copy(world / "finetune.json", copy)
    moved = ("--finetune.data.path", str(copy))
    assert identities(path) == identities(path, *moved)
    records = json.loads(copy.read_text())
    records[0]["conversations"][1]["value"] = "no"
    copy.write_text(json.dumps(records))
    before, after = identities(path), identities(path, *moved)
    assert {x.split("/")[1] for x in before if before[x] == after[x]} == {"base", "pretrain"}


def test_what_is_missing(study_file):
    study = read_study(study_file(), {"parents.small.vision-tower": "/nowhere"})
    orders = Orders(study)
    assert list(orders.missing) == ["/nowhere"]
    assert {run.variant for run in study.runs if orders[run].identity} == {"base", "text-only"}
