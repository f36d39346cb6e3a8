"""Which implementation runs, and that nothing is exchanged for another in silence."""

import sys
from types import ModuleType

import mmalign_kernels.triton
import pytest
import torch
from mmalign_kernels import dispatch, pack_rows, swiglu
from mmalign_kernels.cpu import library as cpu_library
from mmalign_kernels.cuda import library as cuda_library


@pytest.fixture(autouse=True)
def no_backend(monkeypatch):
    """These tests force backends themselves."""
    monkeypatch.setattr(dispatch, "_override", None)
    monkeypatch.delenv("MMALIGN_BACKEND", raising=False)
    dispatch._choose.cache_clear()
    dispatch.environment_backend.cache_clear()
    yield
    dispatch._choose.cache_clear()
    dispatch.environment_backend.cache_clear()


@pytest.fixture
def invented_backend(monkeypatch):
    """A Triton file for swiglu and for nothing else."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    module = ModuleType("mmalign_kernels.triton.swiglu")
    module.swiglu_fwd = lambda gate_up: gate_up[:, : gate_up.shape[1] // 2] * 0 + 7
    module.swiglu_bwd = lambda grad, gate_up: gate_up * 0 + 11
    monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("missing", ("triton", "cuda"))
def test_missing_backend_is_an_error(missing, monkeypatch, set_backend):
    monkeypatch.setitem(sys.modules, f"mmalign_kernels.{missing}.packing", None)  # as if absent
    words = f"pack_rows_fwd has no {missing} implementation.*{missing}/packing.py.*missing"
    with dispatch.use_backend(missing), pytest.raises(NotImplementedError, match=words):
        pack_rows(torch.ones(3, 2), torch.tensor([1]))
    set_backend(missing)
    with pytest.raises(NotImplementedError, match=words):
        pack_rows(torch.ones(3, 2), torch.tensor([1]))


@pytest.mark.parametrize("forced", ("triton", "cuda"))
def test_gpu_backend_on_the_cpu_is_an_error(forced, invented_backend, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    module = sys.modules["mmalign_kernels.triton.swiglu"]
    monkeypatch.setitem(sys.modules, "mmalign_kernels.cuda.swiglu", module)
    with dispatch.use_backend(forced), pytest.raises(NotImplementedError, match="CUDA device"):
        swiglu(torch.ones(1, 2))


def test_unknown_backend_is_an_error(set_backend):
    with (
        pytest.raises(ValueError, match="'tritton' is not one of reference, cpu, triton, cuda"),
        dispatch.use_backend("tritton"),
    ):
        pass
    set_backend("tritton")
    with pytest.raises(ValueError, match="MMALIGN_BACKEND='tritton': 'tritton' is not"):
        swiglu(torch.ones(1, 2))


@pytest.mark.parametrize(
    "name, value, said",
    [
        ("MMALIGN_BACKEND", "tritton", "'tritton' is not one of"),
        ("MMALIGN_BACKEND", "cuda", "the cuda kernels need a CUDA device"),
        ("MMALIGN_BACKEND", "flash_attn", "flash_attn"),
        ("MMALIGN_CPU_LIBRARY", "/absent.so", "/absent.so does not exist"),
    ],
)
def test_what_cannot_run_is_refused_before_any_work(monkeypatch, name, value, said):
    dispatch.require("cpu")
    monkeypatch.setenv(name, value)
    dispatch.environment_backend.cache_clear()
    monkeypatch.setattr(dispatch.cpu_library, "missing", dispatch.cpu_library.missing.__wrapped__)
    monkeypatch.setattr(dispatch.cpu_library, "load", dispatch.cpu_library.load.__wrapped__)
    with pytest.raises((ValueError, NotImplementedError), match=said):
        dispatch.require("cpu")


def test_two_backends_of_one_family_are_an_error():
    """flash_attn and xformers both serve attention, reference and triton everything."""
    for names in ("flash_attn,xformers", "triton, reference", "apex,apex"):
        with (
            pytest.raises(ValueError, match="both serve .* Name one of them"),
            dispatch.use_backend(names),
        ):
            pass


def test_a_library_leaves_the_other_families_alone(invented_backend):
    gate_up = torch.ones(1, 2)
    with dispatch.use_backend("flash_attn"):  # not looked for: swiglu does not need it
        assert (swiglu(gate_up) != 7).all()
    with dispatch.use_backend("flash_attn,triton"):
        assert (swiglu(gate_up) == 7).all()


def test_a_new_file_is_all_that_a_backend_needs(invented_backend):
    gate_up = torch.ones(2, 4, requires_grad=True)
    assert swiglu(gate_up)[0, 0] != 7  # the reference, on a CPU
    with dispatch.use_backend("triton"):
        out = swiglu(gate_up)
    assert (out == 7).all()
    out.sum().backward()  # outside the block: still the backend of the forward pass
    assert (gate_up.grad == 11).all()


def test_override_beats_environment(invented_backend, set_backend):
    set_backend("triton")
    assert (swiglu(torch.ones(1, 2)) == 7).all()
    with dispatch.use_backend("reference"):
        assert (swiglu(torch.ones(1, 2)) != 7).all()
        with dispatch.use_backend("triton"):
            assert (swiglu(torch.ones(1, 2)) == 7).all()
        assert (swiglu(torch.ones(1, 2)) != 7).all()


def test_cuda_tensors_prefer_the_fastest_there_is(invented_backend, monkeypatch):
    monkeypatch.setitem(sys.modules, "mmalign_kernels.triton.packing", None)
    chosen = dispatch.implementation("swiglu_fwd", "swiglu", "cuda")
    assert chosen is sys.modules["mmalign_kernels.triton.swiglu"].swiglu_fwd
    chosen = dispatch.implementation("pack_rows_fwd", "packing", "cuda")
    assert chosen.__module__ == "mmalign_kernels.reference.packing"


def test_cuda_kernels_that_are_not_built_leave_triton(invented_backend, monkeypatch):
    """csrc/ is built where there is a CUDA compiler: without one the install succeeds, too."""

    def load():
        raise cuda_library.CudaLibraryMissing("is not built")

    monkeypatch.setattr(cuda_library, "load", load)
    cuda = ModuleType("mmalign_kernels.cuda.swiglu")
    cuda.swiglu_fwd = load
    monkeypatch.setitem(sys.modules, cuda.__name__, cuda)
    triton = sys.modules["mmalign_kernels.triton.swiglu"]
    with monkeypatch.context() as patch:
        patch.setattr(dispatch, "MEASURED_CUDA", frozenset({"swiglu"}))
        assert dispatch.implementation("swiglu_fwd", "swiglu", "cuda") is triton.swiglu_fwd
    with dispatch.use_backend("cuda"):  # named: nothing is exchanged for it
        assert dispatch.implementation("swiglu_fwd", "swiglu", "cuda") is load
    monkeypatch.setattr(cuda_library, "load", lambda: None)
    dispatch._choose.cache_clear()  # built, and still no measurement says that they are faster
    assert dispatch.implementation("swiglu_fwd", "swiglu", "cuda") is triton.swiglu_fwd
    monkeypatch.setattr(dispatch, "MEASURED_CUDA", frozenset({"swiglu"}))
    dispatch._choose.cache_clear()
    assert dispatch.implementation("swiglu_fwd", "swiglu", "cuda") is load


def test_cpu_kernels_that_are_not_built_leave_pytorch(monkeypatch):
    arguments = "rotary_attention_fwd", "rotary_attention", "cpu"
    monkeypatch.setattr(cpu_library, "missing", lambda: "is not built")
    assert dispatch.implementation(*arguments).__module__.endswith("reference.rotary_attention")
    monkeypatch.setattr(cpu_library, "missing", lambda: None)
    dispatch._choose.cache_clear()
    assert dispatch.implementation(*arguments).__module__.endswith("cpu.rotary_attention")
    with dispatch.use_backend("reference"):
        assert dispatch.implementation(*arguments).__module__.endswith("reference.rotary_attention")


def test_cpu_kernels_of_cuda_tensors_are_an_error():
    arguments = "rotary_attention_fwd", "rotary_attention", "cuda"
    with dispatch.use_backend("cpu"), pytest.raises(NotImplementedError, match="on the CPU, not"):
        dispatch.implementation(*arguments)


def test_broken_backend_file_is_not_taken_for_a_missing_one(monkeypatch, tmp_path):
    (tmp_path / "broken.py").write_text("import a_package_that_is_not_there\n")
    triton = mmalign_kernels.triton
    monkeypatch.setattr(triton, "__path__", [*triton.__path__, str(tmp_path)])
    with dispatch.use_backend("triton"), pytest.raises(ModuleNotFoundError, match="not_there"):
        dispatch.implementation("broken_fwd", "broken", "cpu")
