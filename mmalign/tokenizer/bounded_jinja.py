"""Jinja for the chat templates of foreign folders, which may be hostile.

The sandbox keeps a template from Python, the bounds here from running without end and from filling
the memory: steps (of loops and calls) and characters (of every text on the way) are counted, and
what would multiply a text is looked at before it is made.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

BEGIN, END = "\uf8f0", "\uf8f1"  # around what {% generation %} marks
_MOST_STEPS = 10**6  # in one conversation: more never end
_MOST_TEXT = 3 * 10**7  # characters
# filters whose result can be longer than their input by more than a small factor
_GROWING = ("batch", "center", "format", "indent", "join", "pprint", "replace", "round", "slice")
_GROWING += ("string", "sum", "tojson", "truncate", "urlize", "wordwrap", "xmlattr")


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}, with which templates mark the model's answers."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller) -> str:
        return f"{BEGIN}{caller()}{END}"


class _Counting(NodeTransformer):
    """What Jinja compiles to plain Python, loops, ~ and lists, goes through filters."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        node.iter = _filtered(node.iter, "counted")
        return self.generic_visit(node)

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List([self.visit(part) for part in node.nodes], lineno=node.lineno)
        return _filtered(parts, "concatenated")

    def visit_List(self, node: nodes.Expr) -> nodes.Node:
        return _filtered(self.generic_visit(node), "made")

    visit_Dict = visit_List

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        found = self.generic_visit(node)  # of names that are set where it is not "load"
        return _filtered(found, "made") if node.ctx == "load" else found


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """start() begins a new conversation; TemplateError for one that is too long to write."""

    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self):
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
            finalize=self._shown,
        )
        self.start()
        for name, function in self.filters.items():
            self.filters[name] = self._bounded(function, name)
        self.filters |= {"counted": self._counted, "concatenated": self._concatenated}
        self.filters["made"] = self._made
        self.globals["raise_exception"] = _raise
        del self.globals["lipsum"]  # makes text of nothing
        self.concat = self._concat

    def start(self) -> None:
        self.num_steps = self.num_characters = 0

    def compiled(self, text: str):
        tree = _Counting().visit(self.parse(text))
        tree.set_environment(self)
        return self.from_string(tree)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            bits = left.bit_length() if isinstance(left, int) else 1
            if isinstance(right, int) and bits * abs(right) > _MOST_STEPS:
                raise TemplateError(f"a power in it has more than {_MOST_STEPS:,} bits")
        elif operator == "*":
            if _reach(left) * _reach(right) > _MOST_STEPS:
                raise TemplateError(f"a product in it is larger than {_MOST_STEPS:,}")
        elif operator == "%" and isinstance(left, str):
            self._require_space(left, [_widths(left, [right])])
        return self._made(super().call_binop(context, operator, left, right))

    def call(self, context: Context, function: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        self._step()
        if isinstance(function, LoopContext) and args:  # a recursive loop's next level
            args = (self._counted(args[0]), *args[1:])
        method: Any = getattr(function, "__wrapped__", function)  # str.format is wrapped
        owner = getattr(method, "__self__", None)
        if isinstance(owner, str):
            args = tuple(map(_listed, args))
            self._require_method(owner, method.__name__, [*args, *kwargs.values()])
        return self._made(super().call(context, function, *args, **kwargs))

    def _bounded(self, function: Callable, name: str) -> Callable:
        """A filter that is asked for how much it makes before it does."""
        first = int(hasattr(function, "jinja_pass_arg"))  # before it: the context, or such

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            if name in _GROWING:
                args = tuple(map(_listed, args))
                others = [*args[first + 1 :], *kwargs.values()]
                self._require_method(args[first], name, others)
            return self._made(function(*args, **kwargs))

        return bounded

    def _require_method(self, value: Any, name: str, others: list) -> None:
        if name.startswith("format"):
            others = [_widths(str(value), others)]
        self._require_space(value, others)

    def _require_space(self, value: Any, others: Iterable[Any]) -> None:
        """TemplateError where all of `value`, times the largest of the others, is too much."""
        if _measure(value)[0] * max([1, *map(_reach, others)]) > _MOST_TEXT:
            raise TemplateError(f"a text in it would have more than {_MOST_TEXT:,} characters")

    def _made(self, value: Any) -> Any:
        """The value, which is counted."""
        if isinstance(value, str):
            self.num_characters += len(value)
        elif isinstance(value, list | tuple | dict):
            length, num_parts = _measure(value)
            self.num_characters += 8 * num_parts if length <= _MOST_TEXT else length
        if self.num_characters > _MOST_TEXT:
            raise TemplateError(f"it makes more than {_MOST_TEXT:,} characters of text")
        return value

    def _shown(self, value: Any) -> str:
        """What {{ }} writes."""
        self._require_space(value, ())
        return self._made(str(value))

    def _concat(self, pieces: Iterable[str]) -> str:
        return "".join([self._made(piece) for piece in pieces])

    def _concatenated(self, parts: list) -> str:
        self._require_space(parts, ())
        return self._made("".join(map(str, parts)))

    def _counted(self, values: Iterable) -> Iterator:
        for value in values:
            self._step()
            yield value

    def _step(self) -> None:
        self.num_steps += 1
        if self.num_steps > _MOST_STEPS:
            raise TemplateError(f"its loops and calls take more than {_MOST_STEPS:,} steps")


def _filtered(node: Any, name: str) -> nodes.Filter:
    return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


def _listed(value: Any) -> Any:
    """A list of what a filter before this one yields, so that it has a length."""
    return list(value) if isinstance(value, GeneratorType) else value


def _measure(value: Any) -> tuple[int, int]:
    """At least the characters of a value as text, and the parts; of one list in another each time.

    Stops beyond _MOST_TEXT.
    """
    length, num_parts, rest = 0, 0, [value]
    while rest and length <= _MOST_TEXT:
        part = rest.pop()
        if isinstance(part, str):
            length += len(part)
        elif isinstance(part, Mapping):
            rest += [*part.keys(), *part.values()]
        elif isinstance(part, list | tuple | Set):
            rest += part
        elif isinstance(part, Namespace):
            rest.append(getattr(part, "_Namespace__attrs"))  # noqa: B009
        elif isinstance(part, range):
            length += 8 * len(part)
        length, num_parts = length + 32, num_parts + 1  # quotes, commas, numbers
    return length, num_parts


def _reach(value: Any) -> float:
    """The factor by which a text can grow with this beside it: a width, a separator, a list."""
    if isinstance(value, int | float):
        return abs(value) if math.isfinite(value) else math.inf
    return len(value) if isinstance(value, str) else _measure(value)[0]


def _widths(text: str, values: Any) -> float:
    """The factor of a format: the widths in it, those among the values, and the values' text."""
    found: list[float] = [_measure(values)[0], *(int(x[:20]) for x in re.findall(r"\d+", text))]
    if "*" in text or re.search(r"{[^}]*{", text):
        found += map(_reach, _numbers_in(values))
    return max(found)


def _numbers_in(value: Any) -> Iterator[float]:
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for part in value:
            yield from _numbers_in(part)
    elif isinstance(value, int | float):
        yield value


def _raise(message: str) -> None:
    raise TemplateError(message)
