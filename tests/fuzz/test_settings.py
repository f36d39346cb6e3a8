"""Any text as the value of any numeric option: the number that it says, or the option's name."""

import runpy
import sys
from pathlib import Path
from random import Random

import pytest
import tyro

from mmalign.config import TrainConfig
from mmalign.errors import UserError
from mmalign.recipes import RECIPES
from mmalign.validation import RANGES, validate, walk
from tests.conftest import no_longer_than
from tests.test_validation import numeric_fields

pytestmark = pytest.mark.fuzz
ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["0", "-0", "-1", "1", "2", "0.5", "-0.5", "nan", "-nan", "inf", "-inf", "Infinity"]
TEXTS += ["1e400", "1e-400", "1e30", str(10**30), "9" * 5000, "1_000", "1__0", "0x10", "0b1"]
TEXTS += ["1e3", "1e", "", " ", " 3", "3 ", "\u0663", "\uff13", "\u221e", "None", "none", "True"]
TEXTS += ["auto", "1,000", "1.0", "007", "+5", "--5", "-", "\x1b[2J", "1\n2", "4294967296"]
TEXTS += ["-9223372036854775809", "1/2"]
COMMANDS = {  # script: what it needs beside the option, and its numeric options
    "evaluate": ("--model none --data-root none --output OUT", "limit batch-tokens"),
    "plan_memory": (
        "finetune-7b",
        "world-size gpu micro-batch-tokens parallel.shard-size",
    ),
    "chat": ("--model none --prompt x", "max-new-tokens temperature top-p seed"),
    "preview_batch": (
        "--data.path none --data.text-only True --model.tokenizer none",
        "micro-batch-tokens data.max-length data.num-samples",
    ),
    "check_data": (
        "--data.path none --data.text-only True --model.tokenizer none",
        "data.max-length data.num-samples data.num-workers",
    ),
}


def text(rng: Random) -> str:
    if rng.random() < 0.6:
        return rng.choice(TEXTS)
    return str(rng.choice((rng.randint(-3, 10 ** rng.randrange(1, 12)), rng.gauss(0, 10))))


def test_options_of_train(capsys, seeds):
    accepted = 0
    names = [name for name in numeric_fields(TrainConfig) if name != "recompute_layers"]  # hidden
    for seed in seeds("settings")[::2]:
        rng = Random(seed)
        name, value = rng.choice(names), text(rng)
        flag = f"--{name.replace('_', '-')}"
        try:
            with no_longer_than(20):
                arguments = ["tiny-finetune", f"{flag}={value}"]
                config = tyro.extras.overridable_config_cli(RECIPES, args=arguments)
                validate(config)
        except SystemExit:  # tyro's, with status 2
            shown = capsys.readouterr()
            assert flag in shown.err + shown.out, (seed, shown)
        except UserError as error:
            assert str(error).startswith(f"{flag} is ") and len(str(error)) < 6000, (seed, error)
        except Exception as error:
            raise AssertionError((seed, flag, value)) from error
        else:
            accepted += 1
            found = dict(walk(config))[name]
            if value not in ("None", "auto"):
                assert found == float(value) and found in RANGES[name], (seed, flag, value)
    assert 0.1 < accepted / len(seeds("settings")[::2]) < 0.9


def test_options_of_the_other_commands(monkeypatch, capsys, tmp_path, seeds):
    """Every folder that they name is absent, so each ends before it has done anything."""
    for seed in seeds("settings")[1::2]:
        rng = Random(seed)
        script = rng.choice(sorted(COMMANDS))
        needed, options = COMMANDS[script]
        arguments = [x.replace("OUT", str(tmp_path / "out")) for x in needed.split()]
        flag, value = f"--{rng.choice(options.split())}", text(rng)
        monkeypatch.setattr(sys, "argv", [script, *arguments, f"{flag}={value}"])
        with no_longer_than(60):
            try:
                runpy.run_path(str(ROOT / "scripts" / f"{script}.py"), run_name="__main__")
                code: object = 0
            except SystemExit as end:
                code = end.code
            except Exception as error:
                raise AssertionError((seed, script, flag, value)) from error
        shown = capsys.readouterr()
        said = f"{code}{shown.err}{shown.out}"
        assert code != 0 or script == "plan_memory", (seed, script, flag, value, said)
        assert "Traceback" not in said and said.replace("\n", "").isprintable(), (seed, said)
