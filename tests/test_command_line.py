"""Options of the training scripts: recipes by name, fields with readable help."""

import inspect

import pytest

from mmalign.command_line import parse_recipe
from mmalign.config import OptimizerConfig
from mmalign.recipes import RECIPES


def test_fields_of_a_recipe_are_changed():
    found = parse_recipe(
        RECIPES, "train.py", "", ["finetune-7b", "--optimizer.moments", "8bit", "--seed", "7"]
    )
    recipe = RECIPES["finetune-7b"][1]
    assert (found.optimizer.moments, found.seed) == ("8bit", 7)
    assert found.optimizer.master == recipe.optimizer.master


def test_help_of_a_field_fills_its_lines(monkeypatch, capsys):
    """Whatever the lines in the source."""
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        parse_recipe(RECIPES, "train.py", "", ["finetune-7b", "--help"])
    lines = [line.strip(" \u2502") for line in capsys.readouterr().out.split("\n")]
    first = next(i for i, line in enumerate(lines) if line.startswith("What is kept beside bf16"))
    last = next(i for i in range(first, len(lines)) if "(default" in lines[i])
    assert last - first >= 2 and all(len(line) > 75 for line in lines[first:last])
    source = inspect.getsource(OptimizerConfig)
    assert " ".join(lines[first:last])[:200] in " ".join(source.split())
