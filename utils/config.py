"""Frozen dataclasses as command lines: each field is a flag, checked in `__post_init__`."""

from __future__ import annotations

import argparse
import dataclasses
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError, nearest

C = TypeVar("C")
MOST_PIXELS = 16_384  # of a side of a network's input
MOST_WORKERS = 256  # loading processes


def option(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002  argparse's own word
    flags: Sequence[str] = (),
    choices: Sequence[Any] | None = None,
    metavar: str | None = None,
    const: Any = MISSING,
) -> Any:
    """A dataclass field with its help text; `flags` are further spellings, e.g. ('--img',).

    With `const` the flag may stand without a value, which then is `const` (`--resume`).
    """
    metadata = {
        "help": help,
        "flags": tuple(flags),
        "choices": choices,
        "metavar": metavar,
        "const": const,
    }
    if default is MISSING:
        return dataclasses.field(metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


class ArgumentParser(argparse.ArgumentParser):
    """argparse whose mistakes are UserErrors, with the nearest of the `known` flags."""

    known: tuple[str, ...] = ()

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            first = message.removeprefix(prefix).split()[0]
            raise UserError(f"unknown argument {first!r}{nearest(first, self.known)} (see --help)")
        raise UserError(f"{message} (see --help)")


def parse(config: type[C], argv: Sequence[str] | None, *, prog: str, description: str) -> C:
    """Read `argv` into `config`. Raises UserError for unknown flags and impossible values."""
    parser = ArgumentParser(
        prog=prog,
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="--debug adds the traceback to an error. Exit codes: 0 done, 1 internal error, "
        "2 user error, 3 partly done, 4 source lost, 130 interrupted, 143 terminated.",
    )
    hints = typing.get_type_hints(config)
    spellings: list[str] = []
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        spellings += _add(parser, field, hints[field.name])
    parser.known = tuple(spellings)
    values = vars(parser.parse_args(argv))
    for name, value in values.items():
        if isinstance(value, list):
            values[name] = tuple(value)
    try:
        return config(**values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _add(parser: argparse.ArgumentParser, field: Field[Any], hint: Any) -> list[str]:
    flag = "--" + field.name.replace("_", "-")
    flags = [flag, *field.metadata.get("flags", ())]
    keywords: dict[str, Any] = {"dest": field.name, "help": field.metadata.get("help", "")}
    if field.default is MISSING:
        keywords["required"] = True
    else:
        keywords["default"] = field.default
    kind, many = _kind(hint)
    if kind is bool:
        parser.add_argument(*flags, action="store_true", **keywords)
        return flags
    keywords["type"] = _number_or_text(kind)
    for name in ("choices", "metavar"):
        if field.metadata.get(name) is not None:
            keywords[name] = field.metadata[name]
    if many:
        keywords["nargs"] = "+"
    elif field.metadata.get("const", MISSING) is not MISSING:
        keywords["nargs"] = "?"
        keywords["const"] = field.metadata["const"]
    parser.add_argument(*flags, **keywords)
    return flags


def _kind(hint: Any) -> tuple[type, bool]:
    """The value type of a field and whether it takes several: `int | None`, `tuple[int, ...]`."""
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        hint = next(item for item in typing.get_args(hint) if item is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], True
    return hint, False


def _number_or_text(kind: type) -> Callable[[str], Any]:
    return kind if kind in {int, float} else str


@dataclass(frozen=True)
class Range:
    """Bounds of a value: low <= value <= high, for messages that name the field."""

    low: float
    high: float

    def check(self, owner: str, name: str, value: float) -> None:
        """Raise ValueError unless the value lies within the bounds (NaN never does)."""
        if not self.low <= value <= self.high:
            raise ValueError(f"{owner}: {name} must lie in [{self.low}, {self.high}], got {value}")
