"""What is kept within a number of bytes, and steps that a thread makes."""

import threading

import pytest

from mmalign.data.loader import _ahead
from mmalign.data.memo import Memo


def test_keeps_the_first_that_fit():
    memo = Memo(10)
    assert memo.keep("a", 1, 6) == 1 and memo.keep("b", 2, 6) == 2 and memo.keep("c", 3, 4) == 3
    assert (memo.get("a"), memo.get("b"), memo.get("c")) == (1, None, 3)
    memo.keep("a", 4, 0)
    assert memo.get("a") == 1


def test_an_error_comes_at_its_step_and_the_next_step_is_made_meanwhile():
    made = threading.Event()

    def steps():
        yield "first"
        made.set()
        yield "second"
        raise ValueError("third")

    ahead = _ahead(steps())
    assert next(ahead) == "first" and made.wait(10)  # without being asked for
    assert next(ahead) == "second"
    with pytest.raises(ValueError, match="third"):
        next(ahead)


def test_a_loop_that_leaves_ends_the_thread():
    ahead = _ahead(iter("abc"))
    next(ahead)
    assert any(thread.name.startswith("loader") for thread in threading.enumerate())
    ahead.close()
    assert not any(thread.name.startswith("loader") for thread in threading.enumerate())
