"""How many processes load data where that is left open."""

import pickle
from dataclasses import dataclass

import pytest
import torch

from mmalign.data import workers
from mmalign.data.memo import Memo
from mmalign.data.workers import MOST, choose_workers


@dataclass
class Ranks:
    """Stands for processes by their host and cores; the first is this one."""

    everyone: list[tuple[str, set[int]]]
    device: torch.device = torch.device("cuda")

    def gather_to_main(self, mine):
        assert mine == self.everyone[0]
        return self.everyone

    def broadcast_from_main(self, value):
        return value


@pytest.mark.parametrize(
    "cores, number",
    [
        ([range(1)], 1),
        ([range(2)], 1),
        ([range(6)], 5),
        ([range(200)], MOST),
        ([range(16)] * 4, 3),  # torchrun: all processes may use all cores
        ([range(4), range(4, 8), range(8, 12)], 3),  # bound to cores of their own
        ([range(8), range(4)], 5),
        ([range(4), "another node", range(4), range(4)], 3),
    ],
)
def test_a_gpu_has_the_cores_of_its_process_but_one(monkeypatch, cores, number):
    everyone, host = [], "here"
    for x in cores:
        host, found = (x, None) if isinstance(x, str) else (host, set(x))
        everyone += [] if found is None else [(host, found)]
    monkeypatch.setattr(workers, "usable_cores", lambda: everyone[0][1])
    monkeypatch.setattr(workers.socket, "gethostname", lambda: "here")
    found, why = choose_workers("auto", True, Ranks(everyone))
    assert found == number and "cores for each process" in why


def test_where_no_process_is_needed():
    gpu, cpu = Ranks([]), Ranks([], torch.device("cpu"))
    assert choose_workers("auto", False, gpu)[0] == 0 == choose_workers("auto", True, cpu)[0]
    assert choose_workers(3, False, cpu)[0] == 3 == choose_workers(3, True, gpu)[0]


def test_what_is_kept_is_kept_in_one_process(monkeypatch):
    memo = Memo(100)
    memo.keep("a", 1, 1)
    monkeypatch.setattr("os.getpid", lambda: -1)
    for other in (memo, pickle.loads(pickle.dumps(memo))):
        other.keep("b", 2, 1)
        assert (other.get("a"), other.get("b")) == (1, None)
