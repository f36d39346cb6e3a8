"""What a process sets before it uses its device."""

import os

import pytest

from mmalign import distributed
from mmalign.distributed import start_distributed

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}),
        ({name: "max_split_size_mb:64" for name in NAMES[:1]}, None),
        ({name: "max_split_size_mb:64" for name in NAMES[1:]}, None),
    ],
    ids=("nothing", *NAMES),
)
def test_segments_grow_unless_the_user_configured_the_allocator(chosen, expected, monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in NAMES})
    os.environ.update(chosen)
    seen = []

    def choose_device(device):  # the first to look at CUDA
        seen.append({k: v for k, v in os.environ.items() if k in NAMES})
        return real(device)

    real = distributed.choose_device
    monkeypatch.setattr(distributed, "choose_device", choose_device)
    with start_distributed("cpu", 1):
        assert seen == [chosen if expected is None else expected]
