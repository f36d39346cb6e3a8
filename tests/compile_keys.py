"""What Triton compiles a kernel anew for: types, settings, and what it specialises arguments on."""

import os
import pickle
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from codegen.compiler import pretend
from mmalign_kernels import dispatch
from mmalign_kernels.costs.cost import H100
from mmalign_kernels.triton.launch import WARP
from mmalign_kernels.warm_up import Program
from torch import nn
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction, create_function_from_signature

LIST = """
from tests.compile_keys import compile_key
from triton.runtime.jit import JITFunction
# instead of the compiler
JITFunction.run = lambda self, *args, grid, warmup, **options: print(
    compile_key(self, args, options)
)
from mmalign_kernels import warm_up
warm_up.main()
"""
M = TypeVar("M", bound=nn.Module)
HOPPER = make_backend(GPUTarget("cuda", H100.capability, WARP))


def compile_key(kernel: JITFunction, args: tuple, options: dict[str, Any]) -> str:
    """In one line, as Triton's launcher makes it for sm_90."""
    bind = create_function_from_signature(kernel.signature, kernel.params, HOPPER)
    options = {name: _on_meta(x) for name, x in options.items()}
    _, specialization, settings = bind(*map(_on_meta, args), **options)
    name = f"{kernel.fn.__module__}.{kernel.fn.__name__}"
    return f"{name} {specialization} {sorted(settings.items())}"


def _on_meta(x: object) -> object:
    """A tensor as aligned as x is in its storage; a GPU's storages are aligned to 512 bytes."""
    if not isinstance(x, torch.Tensor):
        return x
    offset = x.storage_offset()
    return torch.empty(offset + 1, dtype=x.dtype, device="meta")[offset:]


def listed(program: Program, share: int = 0, num_shares: int = 1) -> list[str]:
    """Keys of what a process of the warm-up would compile on an H100."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", LIST],
        input=pickle.dumps((program, H100, share, num_shares)),
        env=environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    *keys, names = done.stdout.decode().splitlines()
    assert {name_of(key) for key in keys} == set(names.split())
    return list(dict.fromkeys(keys))


def zero(module: M) -> M:
    """The module without weights: the interpreter computes bf16 wrongly, but zeros stay zeros."""
    for parameter in module.parameters():
        parameter.detach().zero_()
    return module


def name_of(key: str) -> str:
    return key.split()[0].rpartition(".")[2]


@contextmanager
def launched() -> Iterator[set[str]]:
    """Keys of the kernels that run inside the block, in the interpreter with an H100's settings."""
    keys, run = set(), InterpretedFunction.run

    def record(self: InterpretedFunction, *args, grid, warmup, **options):
        keys.add(compile_key(JITFunction(self.fn, **self.kwargs), args, options))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    small = H100._replace(num_multiprocessors=3)  # of which a grid depends, and no kernel
    with pytest.MonkeyPatch.context() as patch, pretend(small), dispatch.use_backend("triton"):
        patch.setattr(InterpretedFunction, "run", record)
        yield keys
