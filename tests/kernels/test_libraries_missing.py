"""A library that is named but missing, broken, of another project or too narrow is an error."""

import subprocess
import sys
from types import ModuleType

import pytest
import torch
from mmalign_kernels import __main__ as table
from mmalign_kernels import adamw_step, dispatch, full_attention, libraries, rms_norm
from mmalign_kernels.libraries import LIBRARIES, LibraryMissing

from . import library_stand_ins
from .packed_samples import offsets


@pytest.fixture(autouse=True)
def nothing_remembered():
    library_stand_ins.forget()
    yield
    library_stand_ins.forget()


def attend(dtype=torch.float32, head_dim=64):
    return full_attention(torch.ones(3, 3 * head_dim, dtype=dtype), offsets([1, 2]), 2, 1)


@pytest.mark.parametrize(
    ("library", "module", "advice"),
    [
        ("flash_attn", "flash_attn", "pip install flash-attn --no-build-isolation"),
        ("flash_attn_3", "flash_attn_interface", "hopper/: python setup.py install"),
        ("flash_attn_4", "flash_attn", "pip install flash-attn-4"),
        ("xformers", "xformers", "pip install xformers"),
    ],
)
def test_not_installed(library, module, advice, monkeypatch):
    for name in [x for x in sys.modules if x.split(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    message = f"full_attention.*: backend {library} is not installed.*{advice}.*another backend"
    with dispatch.use_backend(library), pytest.raises(LibraryMissing, match=message):
        attend()
    with dispatch.use_backend(library):  # families that it does not serve run as without it
        assert rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5).shape == (1, 4)


def test_built_for_another_torch(monkeypatch, tmp_path):
    broken = "raise ImportError('undefined symbol: _ZN3c105ErrorC2')\n"
    (tmp_path / "flash_attn_interface.py").write_text(broken)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "flash_attn_interface", raising=False)
    with (
        dispatch.use_backend("flash_attn_3"),
        pytest.raises(LibraryMissing, match="does not load: undefined symbol: _ZN3c105Error"),
    ):
        attend()


def test_xformers_without_its_attention(monkeypatch):
    """From 0.0.35 on it lies in another package, and its absence is silent there."""
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    with (
        dispatch.use_backend("xformers"),
        pytest.raises(LibraryMissing, match="lacks memory_efficient_attention_.*mslk"),
    ):
        attend()


def test_torch_without_flash_attention(monkeypatch):
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    with (
        dispatch.use_backend("torch_varlen"),
        pytest.raises(LibraryMissing, match="runs on CUDA only.*CUDA build of torch"),
    ):
        attend()


@pytest.fixture
def stand_ins(monkeypatch):
    yield from library_stand_ins.install(monkeypatch, dtypes=())


def test_old_flash_attn(stand_ins, monkeypatch):
    monkeypatch.setattr(libraries, "_distribution", lambda name: "2.6.3")
    with (
        dispatch.use_backend("flash_attn"),
        pytest.raises(LibraryMissing, match="is 2.6.3, too old. Needs 2.7"),
    ):
        attend()


@pytest.mark.parametrize("library", [x for x in LIBRARIES if x != "apex"])
def test_what_a_library_lacks(library, stand_ins, monkeypatch):
    with dispatch.use_backend(library):
        with pytest.raises(NotImplementedError, match="bfloat16, float16.*tensors are float32"):
            attend()
        with pytest.raises(NotImplementedError, match="head_dim of at most .* head_dim of 264"):
            attend(torch.float16, head_dim=264)
        monkeypatch.undo()
        needs = r"needs a GPU of compute capability [89]\.0 or later.*float16 on cpu"
        with pytest.raises(NotImplementedError, match=needs):
            libraries.check(library, "attention", torch.ones(1, dtype=torch.float16), 64)


def test_apex_adamw_has_fp32_weights_only(stand_ins):
    weights, seed = [torch.ones(2, dtype=torch.bfloat16)], 1
    state = [[torch.zeros(2)] for _ in range(3)]
    settings = dict(step=1, learning_rate=1, beta1=0, beta2=0, eps=0, weight_decay=0)
    with (
        dispatch.use_backend("apex"),
        pytest.raises(NotImplementedError, match="float32 weights.*bfloat16.*stochastic rounding"),
    ):
        adamw_step(weights, *state, **settings, seed=seed)


@pytest.fixture
def no_apex(monkeypatch):
    for name in ("apex", "amp_C", "fused_layer_norm_cuda"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    real = libraries.find_spec
    monkeypatch.setattr(libraries, "find_spec", lambda x: None if "_" in x else real(x))


def distribution(folder, summary, version):
    """An installed package apex, as pip leaves it."""
    (folder / "apex").mkdir()
    (folder / "apex/__init__.py").write_text("class FusedRMSNorm: pass\n")
    info = folder / f"apex-{version}.dist-info"
    info.mkdir()
    about = f"Metadata-Version: 2.1\nName: apex\nVersion: {version}\nSummary: {summary}\n"
    (info / "METADATA").write_text(about)


@pytest.mark.parametrize(
    ("summary", "version", "message"),
    [
        ("Pyramid toolkit", "0.9.10.dev0", "is not NVIDIA's: apex 0.9.10.dev0 .Pyramid toolkit."),
        ("PyTorch Extensions written by NVIDIA", "0.1", "was built without amp_C and fused_layer"),
    ],
)
def test_apex_without_its_extensions(summary, version, message, no_apex, monkeypatch, tmp_path):
    """PyPI's project of that name, and NVIDIA's as Python only: both import."""
    distribution(tmp_path, summary, version)
    monkeypatch.syspath_prepend(tmp_path)
    with (
        dispatch.use_backend("apex"),
        pytest.raises(LibraryMissing, match=message + ".*github.com/NVIDIA/apex"),
    ):
        rms_norm(torch.ones(1, 4), torch.ones(4), 1e-5)


def test_apex_is_not_installed(no_apex, monkeypatch):
    monkeypatch.setattr(sys, "path", [x for x in sys.path if not x.startswith("apex")])
    monkeypatch.setattr(libraries, "find_spec", lambda x: None)
    version, reason = libraries.find("apex")
    assert version is None and "github.com/NVIDIA/apex" in reason


def test_the_table_says_what_is_here_and_why_not(stand_ins, monkeypatch):
    monkeypatch.setattr(libraries, "_distribution", lambda name: "2.8.3")
    text = table.report()
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100 and text.isascii()
    for backend in (*dispatch.BACKENDS, *LIBRARIES):
        assert any(line.startswith(backend + " ") for line in lines)
    rows = {line.split()[0]: line.split()[1:] for line in lines if line.endswith(("yes", "-"))}
    assert rows["rotary_attention"][-6:] == ["yes"] * 5 + ["-"]
    assert rows["add_rms_norm"][-6:] == ["-"] * 5 + ["yes"]
    assert rows["adamw_step"][-6:] == ["-"] * 5 + ["yes"]
    assert rows["swiglu"][-6:] == ["-"] * 6


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder

class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        return None if name.split(".")[0] == "triton" else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Finder
import runpy
runpy.run_module("mmalign_kernels", run_name="__main__")
"""


def test_the_table_needs_no_triton():
    command = [sys.executable, "-c", WITHOUT_TRITON]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "triton        is not installed" in found.stdout
    assert "swiglu" in found.stdout and found.stderr == ""
