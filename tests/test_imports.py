"""Imports point one way, without circles: scripts -> study -> training -> evaluation -> ..."""

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
# A package may import packages of its own line and of the lines below it.
ORDER = (
    ("scripts", "bench", "setup"),
    ("mmalign.study",),
    ("mmalign.recipes",),
    ("mmalign.training",),
    ("mmalign.evaluation", "mmalign.lm_eval", "mmalign.chat"),
    ("mmalign.toy_world", "mmalign.validation"),
    ("mmalign.data",),
    ("mmalign.flops",),
    ("mmalign.model",),
    ("mmalign.tokenizer", "mmalign.distributed", "mmalign.ownership"),
    ("mmalign.config", "mmalign.system", "mmalign.files", "mmalign.command"),
    ("mmalign.batch", "mmalign.errors", "mmalign.malloc", "mmalign.openmp", "mmalign"),
    ("mmalign_kernels", "codegen"),
)
LEVEL = {package: level for level, packages in enumerate(ORDER) for package in packages}


def module_name(path: Path) -> str:
    parts = path.relative_to(REPOSITORY).with_suffix("").parts
    if parts[0] == "kernels":
        parts = parts[1:]
    return ".".join(part for part in parts if part != "__init__")


@cache
def modules() -> dict[str, Path]:
    folders = ("mmalign", "kernels", "bench", "scripts", "csrc", "tests")
    files = [path for folder in folders for path in (REPOSITORY / folder).rglob("*.py")]
    return {module_name(path): path for path in files}


@cache
def imports(module: str) -> frozenset[str]:
    """The project's modules that a module imports, anywhere in its file."""
    path, found = modules()[module], set()
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            found |= {
                name if (name := f"{base}.{alias.name}") in modules() else base
                for alias in node.names
            }
    return frozenset(found & modules().keys()) - {module}


def package_of(module: str) -> str | None:
    parts = module.split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    return next((name for name in names if name in LEVEL), None)


def test_every_module_has_a_line():
    found = [name for name in modules() if name.partition(".")[0] == "mmalign"]
    assert [name for name in found if package_of(name) == "mmalign" and name != "mmalign"] == []


def test_imports_follow_the_order():
    against = [
        f"{module} imports {imported}"
        for module in modules()
        for imported in imports(module)
        if package_of(module)
        and package_of(imported)
        and LEVEL[package_of(module)] > LEVEL[package_of(imported)]
    ]
    assert against == []


def test_nothing_outside_tests_imports_them():
    outside = [name for name in modules() if not name.startswith("tests")]
    assert [x for x in outside if any(y.startswith("tests") for y in imports(x))] == []


def circle(graph: dict[str, frozenset[str]]) -> list[str] | None:
    """A circle of the graph as the names along it, or None."""
    done: set[str] = set()
    for start in graph:
        path, stack = [], [(start, iter(graph[start]))]
        if start in done:
            continue
        path.append(start)
        while stack:
            node, following = stack[-1]
            child = next((x for x in following if x not in done), None)
            if child is None:
                done.add(node)
                path.pop()
                stack.pop()
            elif child in path:
                return [*path[path.index(child) :], child]
            else:
                path.append(child)
                stack.append((child, iter(graph[child])))
    return None


def test_no_circles():
    assert circle({module: imports(module) for module in modules()}) is None


@pytest.mark.parametrize(
    "edges, expected",
    [
        ({"a": {"b"}, "b": set()}, None),
        ({"a": {"b", "c"}, "b": {"c"}, "c": set()}, None),
        ({"a": {"b"}, "b": {"c"}, "c": {"b"}}, ["b", "c", "b"]),
    ],
)
def test_a_circle_is_found(edges, expected):
    assert circle({name: frozenset(targets) for name, targets in edges.items()}) == expected


def test_commands_start_without_what_only_tests_and_gpus_need():
    absent = ("triton", "transformers", "lm_eval", "pandas", "peft", "pytest", "wandb")
    scripts = sorted(path.stem for path in (REPOSITORY / "scripts").glob("*.py"))
    code = "\n".join(
        [
            "import runpy, sys",
            f"sys.modules |= dict.fromkeys({absent})",
            f"for name in {scripts}:",
            f"    runpy.run_path(f'{REPOSITORY}/scripts/{{name}}.py', run_name='imported')",
        ]
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)
