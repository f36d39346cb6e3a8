"""What can happen to a file, drawn from a seeded generator, and what may come of it."""

import copy
import json
from collections.abc import Callable
from random import Random

from mmalign.errors import UserError
from tests.conftest import no_longer_than

HOSTILE = [None, "", "7", "\ud83d", "x" * 400, -1, 0, 1, 3, 10**12, 10**30, 0.5, -2.0, True, False]
HOSTILE += [float("nan"), float("inf"), [], {}, [1], ["a", None], {"a": 1}, [[[]]], 1e308]


def ends_well(what: object, names: tuple[str, ...], action: Callable, *arguments) -> bool:
    """Whether the action ends without an error; else it was one sentence with one of the names."""
    try:
        with no_longer_than(30):
            action(*arguments)
    except UserError as error:
        text = str(error)
        assert any(name in text for name in names) and len(text) < 6000, (what, text)
        assert text.replace("\n", "").isprintable(), (what, text)
        return False
    except Exception as error:
        raise AssertionError(f"seed and file: {what}") from error
    return True


def damaged_json(text: str, rng: Random, keys: tuple[str, ...] = ()) -> bytes:
    """The text cut, with a wrong byte, or with one value replaced, removed or added."""
    kind = rng.random()
    if kind < 0.2:
        return damaged_bytes(text.encode(), rng)
    value = json.loads(text)
    *path, last = rng.choice(_places(value)[:400])
    parent = value
    for key in path:
        parent = parent[key]
    if kind < 0.3 and isinstance(parent, dict):
        del parent[last]
    elif kind < 0.4 and isinstance(parent, dict):
        parent[rng.choice((*keys, "<x>", "0"))] = rng.choice(HOSTILE)
    else:
        parent[last] = copy.deepcopy(rng.choice(HOSTILE))
    return json.dumps(value).encode()


def damaged_bytes(data: bytes, rng: Random, end: int | None = None) -> bytes:
    """Cut, or with one to eight wrong bytes, of which all lie before `end`."""
    if rng.random() < 0.3:
        return data[: rng.randrange(len(data))]
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 8])):
        changed[rng.randrange(end or len(changed))] = rng.randrange(256)
    return bytes(changed)


def _places(value: object, found: tuple = ()) -> list[tuple]:
    """The paths to all values inside a JSON value."""
    if not isinstance(value, dict | list):
        return [found]
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    return [found] * bool(found) + [x for key, v in pairs for x in _places(v, (*found, key))]
