"""Commands whose options are the fields of a configuration."""

import dataclasses
from collections.abc import Sequence
from types import MappingProxyType
from typing import TypeVar

import docstring_parser
import tyro

Config = TypeVar("Config")


def parse_recipe(
    recipes: dict[str, tuple[str, Config]],
    prog: str,
    description: str,
    args: Sequence[str] | None = None,
) -> Config:
    """A recipe by name with the fields changed that the command line names; --help shows both."""
    for _, config in recipes.values():
        _join_help_lines(config)
    return tyro.extras.overridable_config_cli(
        recipes, prog=prog, description=description, args=args
    )


def _join_help_lines(config: object) -> None:
    """A field's text as one line, which --help wraps: tyro keeps the breaks of indented text."""
    texts = {
        x.arg_name: x.description for x in docstring_parser.parse_from_object(type(config)).params
    }
    for field in dataclasses.fields(config):
        if field.name in texts and "help" not in field.metadata:
            joined = " ".join(texts[field.name].split())
            field.metadata = MappingProxyType({**field.metadata, "help": joined})
        if dataclasses.is_dataclass(value := getattr(config, field.name)):
            _join_help_lines(value)
