"""The warm-up compiles what a real step launches: here the step runs in Triton's interpreter."""

import os
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from mmalign_kernels import dispatch
from mmalign_kernels.costs.cost import H100
from triton.runtime.interpreter import InterpretedFunction

from bench.models import random_llava
from bench.samples import samples_of
from bench.train_step import MmalignStep, packed_batches
from mmalign.config import Stage
from mmalign.flops import Workload
from mmalign.recipes import RECIPES
from mmalign.training.warm_up import Shapes, finish, start
from tests.bench.test_programs import TINY

NO_CUDA = pytest.mark.skipif(torch.cuda.is_available(), reason="needs Triton's interpreter")
SMALL = replace(TINY, decoder=replace(TINY.decoder, vocab_size=320))
LIST = """
from triton.runtime.jit import JITFunction
JITFunction.run = lambda *arguments, **options: None  # instead of the compiler
from mmalign.training import warm_up
warm_up.main()
"""


def shapes(recipe: str, recompute: str = "none") -> Shapes:
    config = replace(RECIPES[recipe][1], micro_batch_tokens=1024, recompute=recompute)
    decoder = replace(SMALL.decoder, vocab_size=SMALL.decoder.vocab_size + 3)
    vision = None if config.data.text_only else SMALL.vision
    return Shapes(config, Workload(decoder, vision, config.stage, config.lora))


def listed(one: Shapes, share: int = 0, num_shares: int = 1) -> list[str]:
    """Names of the kernels that a process of the warm-up would compile."""
    done = subprocess.run(
        [sys.executable, "-c", LIST],
        input=pickle.dumps((one, H100, share, num_shares)),
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
        capture_output=True,
        check=True,
    )
    return done.stdout.decode().split()


def launched(monkeypatch, stage: Stage) -> set[str]:
    """Names of the kernels of a real step."""
    found, run = set(), InterpretedFunction.run

    def record(self, *args, **options):
        found.add(self.fn.__name__)
        return run(self, *args, **options)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    config = replace(shapes(f"{stage}-7b").config, precision="fp32")
    samples = samples_of(stage, [9, 12], SMALL)
    model = random_llava(SMALL, stage, torch.device("cpu"), torch.float32)
    step = MmalignStep(model, config, packed_batches(samples, [[0, 1]], SMALL.image_token_id))
    with dispatch.use_backend("triton"):
        step.start()
        step()
    return found


@NO_CUDA
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_every_kernel_of_a_step_is_compiled(monkeypatch, stage):
    names = launched(monkeypatch, stage)
    assert len(names) > 20 and names - set(listed(shapes(f"{stage}-7b"))) == set()


def test_processes_share_the_kernels():
    one = shapes("finetune-7b-lora", "mlp")
    first, second = (listed(one, share, 2) for share in (0, 1))
    assert not set(first) & set(second)
    assert sorted(first + second) == sorted(listed(one))


def test_a_process_compiles_its_share(monkeypatch, tmp_path: Path):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    arguments = pickle.dumps((shapes("finetune-7b"), H100, 2, 40))  # one kernel
    command = [sys.executable, "-m", "mmalign.training.warm_up"]
    done = subprocess.run(command, input=arguments, capture_output=True, check=True)
    [name] = done.stdout.decode().split()
    assert name in {path.stem for path in tmp_path.rglob("*.cubin")}


def test_a_failure_is_a_warning(caplog):
    assert finish(start(replace(shapes("finetune-7b"), workload=None), H100, 1)) == []
    assert "first launch" in caplog.text and "AttributeError" in caplog.text
