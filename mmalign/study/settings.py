"""Settings of a study file, as train.py's flags without the dashes: {"data.text-only": True}."""

import dataclasses
import types
import typing
from collections import Counter
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

from mmalign.errors import UserError
from mmalign.validation import walk

T = TypeVar("T")


def with_settings(config: T, settings: Mapping[str, Any], where: str) -> T:
    """config with the settings; where: the table that they stand in, for messages.

    Raises UserError for a setting that does not exist, and for a value of another type.
    """
    names = Counter(name.replace("-", "_") for name in settings)
    if twice := [name for name in names if names[name] > 1]:
        raise UserError(f"{where}: {twice[0]} stands there twice, with - and with _. Remove one")
    for name, value in settings.items():
        config = _with_setting(config, name.replace("-", "_").split("."), value, name, where)
    return config


def _with_setting(config: Any, path: list[str], value: Any, name: str, where: str) -> Any:
    first, *rest = path
    hints = typing.get_type_hints(type(config), include_extras=False)
    if first not in hints or bool(rest) != dataclasses.is_dataclass(getattr(config, first, None)):
        raise UserError(f"{where}: there is no setting {name!r}{_similar(config, name)}")
    if rest:
        value = _with_setting(getattr(config, first), rest, value, name, where)
    elif isinstance(value, str) and "\0" in value:
        raise UserError(f"{where}: {name} is {value!r}, which holds a NUL character")
    elif not _fits(value, hints[first]):
        expected = _in_words(hints[first])
        if _fits([value], hints[first]):
            expected += f", such as {[value]!r}"
        raise UserError(f"{where}: {name} is {value!r}; expected {expected}")
    elif isinstance(value, list):
        value = tuple(value)
    elif hints[first] is Path:
        value = Path(value)
    elif hints[first] is float:
        value = float(value)
    return dataclasses.replace(config, **{first: value})


def _fits(value: Any, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return value in arguments
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, argument) for argument in arguments)
    if origin is tuple:  # of any length
        return isinstance(value, (list, tuple)) and all(_fits(x, arguments[0]) for x in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, str if hint is Path else hint)


def _in_words(hint: Any) -> str:
    """What TOML calls a value of this type."""
    arguments = [x for x in typing.get_args(hint) if x not in (types.NoneType, ...)]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(repr, arguments))
    if typing.get_origin(hint) is tuple:
        return f"a list, each item {_in_words(arguments[0])}"
    if arguments:
        return " or ".join(map(_in_words, arguments))
    words = {int: "an integer", float: "a number", bool: "true or false", dict: "a table"}
    return words.get(hint, "a string")


def _similar(config: Any, name: str) -> str:
    known = [field.replace("_", "-") for field, _ in walk(config)]
    found = get_close_matches(name.replace("_", "-"), known, n=1)
    return f"; did you mean {found[0]!r}?" if found else ". train.py RECIPE --help lists them"
