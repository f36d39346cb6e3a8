"""The cases of compute-sanitizer, which need a GPU, have arguments that the operations take."""

from pathlib import Path
from types import SimpleNamespace

from mmalign_kernels import cuda
from mmalign_kernels.reference import adamw, projector, rms_norm, rotary_attention

from tests.csrc import sanitize


def test_every_case_is_a_right_call(monkeypatch):
    """Of csrc/ on a GPU; here plain PyTorch takes the same arguments."""
    monkeypatch.setattr(sanitize, "DEVICE", "cpu")
    monkeypatch.setattr(sanitize, "_is_hopper", lambda: True)
    plain = {
        "rms_norm": rms_norm,
        "adamw": SimpleNamespace(operation=lambda name: getattr(adamw, name)),
        "projector": projector,
        "rotary_attention": rotary_attention,
    }
    files = {x.stem for x in Path(cuda.__path__[0]).glob("[!_]*.py")}
    assert plain.keys() == files - {"library"}, "a family without cases"
    for name, module in plain.items():
        monkeypatch.setattr(sanitize, f"{name}_cuda", module)
    names = []
    for name, run in sanitize.cases():
        run()
        names.append(name)
    assert len(names) == len(set(names)) > 100
    begins = ("rms_norm", "add_rms_norm", "adamw", "project_image_features", "rotary_attention")
    assert all(any(x.startswith(begin) for x in names) for begin in begins)
