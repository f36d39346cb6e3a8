"""The processes that compile a program's kernels, here those of LLaMA2-7B's answers."""

import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from codegen.compiler import A100
from mmalign_kernels import warm_up
from mmalign_kernels.costs.cost import H100

from mmalign.evaluation.warm_up import EvaluationWithoutData
from mmalign.model.config import CLIP_VIT_L_14, LLAMA2_7B
from tests.compile_keys import listed

PROGRAM = EvaluationWithoutData(
    LLAMA2_7B, CLIP_VIT_L_14, "linear", torch.bfloat16, scores=True, answers=True
)


def test_processes_share_the_kernels():
    first, second = (listed(PROGRAM, share, 2) for share in (0, 1))
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(listed(PROGRAM))


def test_a_process_compiles_its_share(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = pickle.dumps((PROGRAM, H100, 0, 40))  # one kernel
    command = [sys.executable, "-m", "mmalign_kernels.warm_up"]
    done = subprocess.run(command, input=arguments, capture_output=True, check=True)
    [name] = done.stdout.decode().split()
    assert name in {path.stem for path in tmp_path.rglob("*.cubin")}


def nothing() -> None:
    pass


def test_kernels_are_compiled_once(monkeypatch, tmp_path: Path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    starts = []
    monkeypatch.setattr(warm_up, "start", lambda *arguments: starts.append(arguments[2]) or [])
    for program, gpu in ((nothing, H100), (nothing, H100), (PROGRAM, H100), (nothing, A100)):
        with warm_up.compiling(program, gpu):
            pass
    assert [x > 0 for x in starts] == [True, False, True, True]


def test_a_failure_is_a_warning(monkeypatch, tmp_path: Path, caplog):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(warm_up, "MOST_PROCESSES", 1)
    with warm_up.compiling(replace(PROGRAM, decoder=None), H100):
        pass
    assert "first launch" in caplog.text and "AttributeError" in caplog.text
    assert not list(tmp_path.iterdir())
