"""What a process sets before it uses its device."""

import os

import pytest

from mmalign import distributed
from mmalign.distributed import start_distributed
from mmalign.errors import UserError

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


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is None"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "WORLD_SIZE is 2 and RANK is 2"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
    ],
)
def test_an_environment_that_describes_no_process_group(variables, said, monkeypatch):
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said), start_distributed("cpu", 1):
        pass
