"""The inputs of ../shared/faults, and the scripts in this process with its exit codes and words."""

import logging
import os
import re
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import no_longer_than

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Ended:
    code: int
    text: str  # of both streams

    def refused(self, *names: str) -> None:
        """Ended with one sentence that has all these names in it."""
        [error] = [line for line in self.text.splitlines() if line.startswith("error: ")]
        assert self.code == 1 and len(error) < 2000, self.text
        assert all(name in error for name in names), error

    def succeeded(self, *words: str) -> None:
        assert self.code == 0 and all(word in self.text for word in words), self.text


class Case:
    """One folder of inputs, beside the good ones in `base`, and a folder to write to."""

    def __init__(self, folder: Path, scratch: Path, capsys):
        self.folder, self.base, self.scratch = folder, folder.parent / "base", scratch
        self.run, self.output, self.capsys = scratch / "run", scratch / "out", capsys

    def train(self, **changes: object) -> Ended:
        """tiny-finetune on the good inputs; changes: options, with _ for - and __ for the dot."""
        return self.call("train", "tiny-finetune", *options(self.training(changes)))

    def training(self, changes: dict) -> dict:
        good = {"run_dir": self.run, "num_steps": 2, "global_batch_size": 4, "device": "cpu"}
        good |= {"model__decoder": self.base / "decoder", "model__vision_tower": self.base / "clip"}
        good |= {"data__path": self.base / "data.json", "data__image_root": self.base / "images"}
        good |= {"checkpoint__every": 1, "checkpoint__keep": 4, "data__num_workers": 0}
        return good | {"optimizer__learning_rate": 1e-2} | changes

    def train_four_of_six(self, **changes: object) -> None:
        """A run as a kill has left it after step 4."""
        self.train(num_steps=6, **changes).succeeded()
        for path in ("export", "checkpoints/step_5", "checkpoints/step_6"):
            os.rename(self.run / path, self.scratch / f"removed_{Path(path).name}")

    def check(self, **changes: object) -> Ended:
        good = {"data__path": self.base / "data.json", "data__image_root": self.base / "images"}
        good |= {"data__template": "v1", "model__tokenizer": self.base / "decoder"}
        return self.call("check_data", *options(good | {"data__num_workers": 0} | changes))

    def evaluate(self, *more: str, **changes: object) -> Ended:
        good = {"model": self.base / "decoder", "data_root": self.base / "evaluation"}
        good |= {"output": self.output, "device": "cpu"}
        return self.call("evaluate", *options(good | changes), *more)

    def call(self, script: str, *arguments: str) -> Ended:
        """The script's main block with these arguments; what is no SystemExit is a failed test."""
        before, sys.argv = sys.argv, [f"{script}.py", *arguments]
        self.capsys.readouterr()
        code: object = None
        try:
            with no_longer_than(60):
                runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
        except SystemExit as end:
            code = end.code
        finally:
            sys.argv = before
        out, err = self.capsys.readouterr()
        said = code if isinstance(code, str) else ""
        return Ended(1 if said else int(code or 0), f"{out}{err}{said}")


def options(values: dict) -> list[str]:
    pairs = [(f"--{name.replace('__', '.').replace('_', '-')}", x) for name, x in values.items()]
    return [str(word) for pair in pairs for word in pair]


@pytest.fixture(scope="session")
def built(shared_data, tmp_path_factory) -> Path:
    """All cases, made once."""
    source = shared_data.parent / "faults" / "make_inputs.py"
    if not source.is_file():
        pytest.skip(f"no {source}: inputs that went wrong in practice")
    folder = tmp_path_factory.mktemp("faults") / "built"
    runpy.run_path(str(source))["build"](folder)
    return folder


@pytest.fixture
def case(built, request, tmp_path, capsys) -> Case:
    """The case whose number the test's name (test_07_...) or its parameter begins with."""
    root = logging.getLogger()
    before = root.level
    request.addfinalizer(lambda: root.setLevel(before))
    root.setLevel(logging.INFO)  # as basicConfig of a script
    name = request.node.callspec.id if hasattr(request.node, "callspec") else request.node.name
    number = re.search(r"\d\d", name)
    assert number
    [folder] = built.glob(f"{number[0]}-*")
    return Case(folder, tmp_path, capsys)
