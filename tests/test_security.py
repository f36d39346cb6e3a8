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
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.tokenizer import Tokenizer
from mmalign.tokenizer.bounded_jinja import BoundedEnvironment
from mmalign.tokenizer.chat_template import ChatTemplate
from mmalign.training.loop import train
from tests.conftest import no_longer_than
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


TWICE = (
    "{%% set n = namespace(x='a') %%}{%% for i in range(60) %%}"
    "{%% set n.x = %s %%}{%% endfor %%}{{ n.x }}"
)
MACRO = "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"


@pytest.mark.parametrize(
    "text",
    [
        *(TWICE % x for x in ("n.x ~ n.x", "n.x + n.x", "[n.x, n.x]|join", "[n.x, n.x]")),
        *(TWICE % x for x in ("dict(x=n.x, y=n.x)", "namespace(x=n.x, y=n.x)", "n.x * 2")),
        *(
            "{{ 'a'|center(10**11) }}",
            "{{ 'a'.ljust(10**11) }}",
            "{{ ('a'|attr('zfill'))(10**11) }}",
        ),
        *(
            "{{ '%99999999999d' % 1 }}",
            "{{ '%*d' % (10**11, 1) }}",
            "{{ '%*d'|format(10**11, 1) }}",
        ),
        *("{{ '{:>99999999999}'.format(1) }}", "{{ '{:>{w}}'.format(1, w=10**11) }}"),
        "{{ ('a' * 10**6).replace('a', 'b' * 10**6) }}",
        "{{ ('a' * 10**6)|wordwrap(1, wrapstring='b' * 10**6) }}",
        "{{ ('a' * 10**6).join(range(10**5)|map('string')) }}",
        "{{ [1]|tojson(indent=10**11) }}",
        "{{ 1.5|round(10**11, 'ceil') }}",
        "{{ (2 ** (10**6)) ** (10**6) }}",
        "{% filter center(10**11) %}a{% endfilter %}",
        "{% for i in range(10**5) %}" + "a" * 10**4 + "{% endfor %}",
        "{% set x %}{% for i in range(10**5) %}" + "a" * 10**4 + "{% endfor %}{% endset %}",
    ],
)
def test_a_chat_template_cannot_fill_the_memory(text):
    """A text of gigabytes would be made in one operation of Python."""
    with pytest.raises(TemplateError, match="larger than|more than"), no_longer_than(60):
        BoundedEnvironment().compiled(text).render()


def test_a_chat_template_that_calls_itself_ends(monkeypatch):
    monkeypatch.setattr("mmalign.tokenizer.bounded_jinja._MOST_STEPS", 10**4)
    with pytest.raises(TemplateError, match="steps"), no_longer_than(60):
        BoundedEnvironment().compiled(MACRO + "{{ f(60) }}").render()


def test_bounds_change_no_text():
    """Against the environment of transformers, jinja2's own sandbox."""
    text = (
        "{% macro row(m, sep=', ') %}{{ m.role ~ sep ~ (m.content|trim)[:4] }}{% endmacro %}"
        "{% for m in messages %}{% set a, b = (loop.index, '%05d' % 1700000000) %}"
        "{{ row(m, sep=' | ') }}{{ [a, {'b': b}] }}{{ missing }}{{ none ~ 1.5 }}\n{% endfor %}"
        "{{ messages|map(attribute='role')|join('-') }}{{ 'a' * 3 + 'b'.center(7) }}"
        "{{ ['x', 'y'] + [1] }}{{ messages|tojson(indent=2) }}{{ '{:>{w}}'.format(1, w=5) }}"
        "{% for x in [[1, [2]], [3]] recursive %}{{ x if x is number else loop(x) }};{% endfor %}"
        "{% set c = cycler('r', 's') %}{{ c.next() }}{{ 'a b'|indent(3, true) ~ 2 ** 10 }}"
    )
    messages = [{"role": "user", "content": " hello "}, {"role": "assistant", "content": "<hi>"}]
    options = {"trim_blocks": True, "lstrip_blocks": True}
    theirs = ImmutableSandboxedEnvironment(**options).from_string(text).render(messages=messages)
    assert BoundedEnvironment().compiled(text).render(messages=messages) == theirs
