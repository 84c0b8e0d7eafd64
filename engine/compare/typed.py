"""Plain values, e.g. of a JSON file, as dataclasses, checked against their annotations."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from utils.terminal import is_printable

T = TypeVar("T")
LEVELS = 16  # of mappings and lists in each other
MIN, MAX = 1e-99, 1e99  # of sizes of numbers: so far from the ends that no sum or quotient is inf


@dataclass(frozen=True)
class Rule:
    """What a value must meet besides its type: `Annotated[int, Rule(test, "1 to 9")]`."""

    test: Callable[[Any], object]
    expected: str


def between(low: int, high: int) -> Rule:
    """A rule for numbers."""
    return Rule(lambda value: low <= value <= high, f"{low} to {high}")


def construct(kind: type[T], value: Any, name: str = "", levels: int = LEVELS) -> T:
    """`value` as `kind`, a dataclass; keys that it lacks are ignored.

    Fields may be dataclasses, str (printable), int (not negative), float (finite), bool, lists and
    dicts of these, unions with None, Annotated with a Rule, and Any (plain values in up to
    `levels` levels).  Raises ValueError naming the field, by its dotted name after `name`.
    """
    if not isinstance(value, dict):
        raise _wrong(name, value, "a mapping")
    hints = typing.get_type_hints(kind, include_extras=True)
    found = {}
    for field in dataclasses.fields(kind):  # type: ignore[arg-type]
        path = f"{name}.{field.name}" if name else field.name
        if field.name in value:
            found[field.name] = _typed(hints[field.name], value[field.name], path, levels)
        elif field.default is field.default_factory is dataclasses.MISSING:
            raise ValueError(f"{path!r} is missing")
    return kind(**found)


def _typed(kind: Any, value: Any, name: str, levels: int) -> Any:
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        value = _typed(inner[0], value, name, levels)
        if not inner[1].test(value):
            raise _wrong(name, value, inner[1].expected)
        return value
    if origin in {types.UnionType, typing.Union}:  # X | None
        return None if value is None else _typed(inner[0], value, name, levels)
    if dataclasses.is_dataclass(kind):
        return construct(kind, value, name, levels)  # type: ignore[arg-type]
    if levels == 0:
        raise ValueError(f"{name!r} has too many levels")
    if isinstance(value, list) and (origin is list or kind is Any):
        kinds = inner or (Any,)
        return [_typed(kinds[0], x, f"{name}.{i}", levels - 1) for i, x in enumerate(value)]
    if isinstance(value, dict) and (origin is dict or kind is Any):
        bad = next((key for key in value if not is_printable(key)), None)
        if bad is not None:
            raise _wrong(name, bad, "printable keys")
        kinds = inner[1:] or (Any,)
        return {key: _typed(kinds[0], x, f"{name}.{key}", levels - 1) for key, x in value.items()}
    text = isinstance(value, str) and is_printable(value)
    number = isinstance(value, int | float) and not isinstance(value, bool)
    number = number and (value == 0 or MIN < abs(value) < MAX)
    plain = text or number or value is None or isinstance(value, bool)
    meets, expected = {
        str: (text, "printable text"),
        bool: (isinstance(value, bool), "true or false"),
        int: (number and isinstance(value, int) and value >= 0, "a whole number"),
        float: (number, "a number"),
        list: (False, "a list"),
        dict: (False, "a mapping"),
        Any: (plain, "printable text or a number"),
    }[origin or kind]
    if not meets:
        raise _wrong(name, value, expected)
    return value


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    return ValueError(f"{name!r} is {shown}, expected {expected}")
