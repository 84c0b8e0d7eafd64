"""Types of block arguments. A constructor's annotations state what a row of a model file may give.

`check` compares a value from a file with such an annotation; rules that tie arguments to each
other or to the input's channels stay in the block.  No torch in here.
"""

from __future__ import annotations

import types
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Range:
    """Numbers from `min` to `max`, odd ones only where asked."""

    min: float
    max: float = 1_000_000
    odd: bool = False

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max and (not self.odd or value % 2 == 1)

    def __str__(self) -> str:
        return f"{'odd, ' if self.odd else ''}{self.min:,} to {self.max:,}"


Positive = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1, 1000)]  # of layers; the deepest published stage has some forty
Odd = Annotated[int, Range(1, odd=True)]  # kernel of a convolution or pooling that keeps the size
Factor = Annotated[float, Range(0)]  # of channels
Ratio = Annotated[float, Range(0, 1)]
Act = str | bool  # true: the model's activation; false: none; or a name, see `blocks.conv`


def check(name: str, value: Any, annotation: Any) -> None:
    """ValueError naming the argument unless `value` (of plain types) is of the annotated type."""
    if not _fits(value, annotation):
        raise ValueError(f"{name} must be {_describe(annotation)}, got {value!r}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        fits = _fits(value, parts[0]) and value in parts[1]
    elif origin is Literal:
        fits = any(type(value) is type(part) and value == part for part in parts)
    elif origin in (Union, types.UnionType):
        fits = any(_fits(value, part) for part in parts)
    elif origin in (tuple, Sequence):
        count = len(parts) if origin is tuple else None
        fits = isinstance(value, tuple | list) and len(value) == (count or max(len(value), 1))
        fits = fits and all(_fits(item, parts[0]) for item in value)
    else:
        fits = type(value) in ((int, float) if annotation is float else (annotation,))
    return fits


def _describe(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_describe(parts[0])} ({parts[1]})"
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, parts))
    if origin is tuple:
        return f"a list of {len(parts)}, each {_describe(parts[0])}"
    if origin is Sequence:
        return f"a list, each {_describe(parts[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    return words.get(annotation, "None")


def hidden_width(channels: int, factor: float) -> int:
    """int(channels * factor), or ValueError when that leaves no channel."""
    width = int(channels * factor)
    if width < 1:
        raise ValueError(f"{factor} times {channels} channels leaves none")
    return width


def require_multiple(divisor: int, **values: int) -> None:
    """ValueError naming the first value that is not a multiple of `divisor`."""
    for name, value in values.items():
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")
