"""One owner per folder, seen from a second process; a killed owner owns nothing."""

import multiprocessing
import os
import signal
import socket

import pytest
import torch

from mmalign.distributed import DistributedContext
from mmalign.errors import UserError
from mmalign.evaluation.evaluation import evaluate_model
from mmalign.ownership import owned, require_names

context = multiprocessing.get_context("spawn")


def own(folder, rank, ready, end) -> None:
    """As rank 0 or 1 of a run, until `end`."""
    ranks = DistributedContext(rank, 2 if rank else 1, torch.device("cpu"))
    if rank:
        object.__setattr__(ranks, "world_size", 1)  # no process group: its main has no problem
    with owned(folder, "--run-dir", ranks):
        ready.set()
        end.wait(60)


def start(folder, rank=0):
    ready, end = context.Event(), context.Event()
    process = context.Process(target=own, args=(folder, rank, ready, end))
    process.start()
    assert ready.wait(60)
    return process, end


def test_a_second_owner_is_refused_with_the_first_ones_name(tmp_path):
    folder = tmp_path / "run"
    first, end = start(folder)
    found = f"run is in use by process {first.pid} on {socket.gethostname()}"
    for _ in range(2):
        with pytest.raises(UserError, match=found), owned(folder, "--run-dir"):
            pass
    end.set()
    first.join()
    with owned(folder, "--run-dir"):
        pass


def test_a_killed_owner_owns_nothing_but_its_other_ranks_do(tmp_path):
    with owned(tmp_path, "--run-dir"):
        (tmp_path / ".metrics.jsonl.x.tmp").touch()  # a file that a kill left unfinished
    main, _ = start(tmp_path)
    other, end = start(tmp_path, rank=1)
    os.kill(main.pid, signal.SIGKILL)
    main.join()
    with pytest.raises(UserError, match="is in use"), owned(tmp_path, "--run-dir"):
        pass
    end.set()
    other.join()
    with owned(tmp_path, "--run-dir"):
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_what_cannot_be_a_folder(tmp_path):
    (tmp_path / "file").write_text("precious")
    for path in (tmp_path / "file", tmp_path / "file" / "run", "/dev/null"):
        message = f"--run-dir {path} cannot be a directory"
        with pytest.raises(UserError, match=message), owned(path, "--run-dir"):
            pass
    assert (tmp_path / "file").read_text() == "precious"


def test_an_evaluation_owns_its_output(tmp_path):
    first, end = start(tmp_path)
    with pytest.raises(UserError, match=f"in use by process {first.pid}"):
        evaluate_model("absent", ["ethics"], "absent", tmp_path)
    end.set()
    first.join()
    with pytest.raises(UserError, match="absent is not a directory"):
        evaluate_model("absent", ["ethics"], "absent", tmp_path)


def test_what_stands_in_the_way_of_a_name_is_refused(tmp_path):
    require_names(tmp_path / "absent", ["report.md"], ["export"])
    (tmp_path / "report.md").touch()
    (tmp_path / "export").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "export")
    require_names(tmp_path, ["report.md", "*.png"], ["export", "link", "export/llama"])
    (tmp_path / "a.png").mkdir()
    os.mkfifo(tmp_path / "export/pipe")
    for files, folders, found in (
        (["*.png"], [], "a.png is in the way: a file will be written"),
        (["export/pipe"], [], "pipe is in the way: a file"),
        ([], ["report.md"], "report.md is in the way: a folder will be written"),
    ):
        with pytest.raises(UserError, match=f"{found} .* name another folder than {tmp_path}"):
            require_names(tmp_path, files, folders)


def test_an_evaluation_looks_for_it_first(tmp_path):
    (tmp_path / "items.jsonl").mkdir()
    with pytest.raises(UserError, match="items.jsonl is in the way"):
        evaluate_model("absent", ["truthfulqa"], "absent", tmp_path)
