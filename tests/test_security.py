"""SECURITY.md: the tests that it names, and what it says besides them."""

import ast
import json
import re
import shutil
import socket
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.tokenizer import Tokenizer
from mmalign.tokenizer.chat_template import ChatTemplate
from mmalign.training.loop import train
from tests.evaluation.test_during_training import TASKS, data_root  # noqa: F401  a fixture
from tests.training.conftest import small_world  # noqa: F401  a fixture
from tests.training.helpers import small_config

ROOT = Path(__file__).resolve().parents[1]


def test_every_line_has_its_test():
    text = (ROOT / "SECURITY.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ")][1:]
    named = [re.findall(r"`(tests/\S+\.py)::(\w+)`", row) for row in rows]
    assert len(rows) > 8 and all(named), rows
    for path, name in (pair for pairs in named for pair in pairs):
        functions = [x.name for x in ast.walk(ast.parse((ROOT / path).read_text()))
                     if isinstance(x, ast.FunctionDef)]  # fmt: skip
        assert name in functions, (path, name)
    assert len(text.splitlines()) < 40  # half a page


def test_nothing_is_fetched_or_imported(small_world, data_root, tmp_path, monkeypatch):  # noqa: F811
    """A folder whose settings ask for its own code, and a network that nobody may use."""
    folders = {"decoder": small_world.decoder, "vision_tower": small_world.vision_tower}
    for name, source in folders.items():
        shutil.copytree(source, tmp_path / name)
        (tmp_path / name / "own.py").write_text("raise SystemExit('the code of a folder ran')\n")
        for file in ("config.json", "tokenizer_config.json", "preprocessor_config.json"):
            path = tmp_path / name / file
            settings = json.loads(path.read_text()) if path.exists() else {}
            names = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoImageProcessor")
            settings["auto_map"] = dict.fromkeys(names, "own.Own")
            path.write_text(json.dumps(settings))

    def refused(*arguments):
        raise AssertionError(f"a connection: {arguments}")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)
    model = {name: str(tmp_path / name) for name in folders}
    config = small_config(small_world, tmp_path / "run", num_steps=1, model=model)
    train(replace(config, data=replace(config.data, num_workers=0)))
    evaluate_model(tmp_path / "run", TASKS, data_root, tmp_path / "out", 5, quiet=True)
    assert "own" not in sys.modules


@pytest.mark.parametrize("text", ["{{ ''.__class__.__mro__ }}", "{% include '/etc/passwd' %}"])
def test_chat_templates_run_in_a_sandbox(small_world, tmp_path, text):  # noqa: F811
    (tmp_path / "chat_template.jinja").write_text(text)
    template = ChatTemplate(tmp_path, Tokenizer.from_pretrained(small_world.decoder))
    with pytest.raises(UserError, match=r"chat_template\.jinja"):
        template.render([{"role": "user", "content": "x"}], True)
