"""Frozen dataclasses as command lines: each field is a flag, checked in `__post_init__`."""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, Field
from typing import Any, NoReturn, TypeVar

from utils.errors import UserError

C = TypeVar("C")
MAX_PIXELS = 16_384  # of a side of a network's input
DEFAULT_SIZE = 640  # pixels, where neither flag nor checkpoint tells another
MAX_WORKERS = 256  # loading processes, computing threads


def option(
    default: Any = MISSING,
    *,
    help: str,  # noqa: A002  argparse's own word
    flags: Sequence[str] = (),
    min: float = -math.inf,  # noqa: A002
    max: float = math.inf,  # noqa: A002
    **argument: Any,
) -> Any:
    """A dataclass field with its help text; `flags` are further spellings, e.g. ('--img',).

    `min` and `max` bound the value, or each of several, where the class calls `check_options`.
    `argument` goes to argparse: choices, metavar, or const, which `--resume` alone stands for.
    """
    metadata = {"flags": flags, "bounds": (min, max), "argument": {"help": help, **argument}}
    return dataclasses.field(default=default, metadata=metadata)


def threads_option() -> Any:
    """The field of `--threads`, for `utils.environment.use_threads`."""
    return option(
        0,
        min=0,
        max=MAX_WORKERS,
        help="computing threads of torch and OpenCV; 0: one for each core, or OMP_NUM_THREADS",
    )


def local_ranks() -> int:
    """How many ranks share this machine (torchrun's LOCAL_WORLD_SIZE), at least 1."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(text), 1) if text.isdecimal() else 1


def default_workers() -> int:
    """Loading processes per rank: up to 8, and at most its share of this machine's cores."""
    return max(1, min(8, (os.cpu_count() or 1) // local_ranks()))


def check_options(config: Any) -> None:
    """Raise ValueError for a value outside the bounds of its `option`; for `__post_init__`."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, (int, float)):
                check_range(flag(field.name), item, *field.metadata["bounds"])


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise ValueError unless low <= value <= high; NaN never lies there."""
    if value > high:
        raise ValueError(f"{name} must be at most {high}, got {value}")
    if not value >= low:
        raise ValueError(f"{name} must be at least {low}, got {value}")


def changed(config: Any) -> dict[str, Any]:
    """The settings that differ from the defaults, and those without one."""
    fields = dataclasses.fields(config)
    values = {field.name: (getattr(config, field.name), field.default) for field in fields}
    return {name: value for name, (value, default) in values.items() if value != default}


def flag(name: str) -> str:
    """The flag of a field: '--conf-thres' for conf_thres."""
    return "--" + name.replace("_", "-")


class ArgumentParser(argparse.ArgumentParser):
    """argparse that raises UserError; for an argument of no flag with what to type instead."""

    known: tuple[str, ...] = ()

    def check_names(self, argv: Sequence[str]) -> None:
        """UserError for the first flag that is not `known`: a missing one is named after it."""
        for number, item in enumerate(argv):
            is_flag = item.startswith("-") and " " not in item and not _is_number(item)
            known = item.partition("=")[0] in (*self.known, "-h", "--help")
            if (is_flag or number == 0) and not known:
                self._refuse(item)

    def _refuse(self, argument: str) -> NoReturn:
        from utils.foreign import advice  # seldom needed

        raise UserError(f"unknown argument {argument!r}{advice(argument, self.known)} (see --help)")

    def error(self, message: str) -> NoReturn:
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            self._refuse(message.removeprefix(prefix).split()[0])
        raise UserError(f"{message} (see --help)")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def parse(
    config: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str | None = None,
    description: str | None = None,
    usage: str | None = None,
) -> C:
    """Read `argv` into `config`. Raises UserError for unknown flags and impossible values."""
    return parse_given(config, argv, prog=prog, description=description, usage=usage)[0]


def from_settings(config: type[C], settings: Mapping[str, Any]) -> tuple[C, frozenset[str]]:
    """`parse_given` of a program's settings: flags without dashes, with Python's values.

    A sequence gives several values; True a flag without a value; None, or False where the default
    is False, leaves the flag out.
    """
    words: list[str] = []
    switches = {field.name for field in dataclasses.fields(config) if field.default is False}  # type: ignore[arg-type]
    for name, value in settings.items():
        if value is None or (value is False and name in switches):
            continue
        if value is True:
            words.append(flag(name))
        elif isinstance(value, list | tuple):
            words += [flag(name), *map(str, value)]
        else:
            words.append(f"{flag(name)}={value}")
    return parse_given(config, words)


def parse_given(
    config: type[C],
    argv: Sequence[str] | None,
    *,
    prog: str | None = None,
    description: str | None = None,
    usage: str | None = None,
) -> tuple[C, frozenset[str]]:
    """As `parse`, and the names of the fields that `argv` gives, be it with their default value."""
    parser = ArgumentParser(
        prog=prog,
        usage=usage,
        description=description,
        allow_abbrev=False,
        epilog="--debug adds the traceback to an error. Exit codes: 0 success, 1 internal error, "
        "2 usage or input error, 3 partly done, 4 stream lost, 129 hangup, 130 interrupted, "
        "143 terminated.",
    )
    hints = typing.get_type_hints(config)
    fields = [field for field in dataclasses.fields(config) if field.metadata]  # type: ignore[arg-type]
    parser.known = sum((_add(parser, field, hints[field.name]) for field in fields), ())
    typed = sys.argv[1:] if argv is None else argv
    parser.check_names(typed)
    # argparse sets a default only where the namespace has no value yet
    absent = argparse.Namespace(**dict.fromkeys(hints, MISSING))
    values = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vars(parser.parse_args(typed, absent)).items()
        if value is not MISSING
    }
    try:
        return config(**values), frozenset(values)
    except ValueError as error:
        raise UserError(str(error)) from error


def _add(parser: ArgumentParser, field: Field[Any], hint: Any) -> tuple[str, ...]:
    """Add the flag of a field, whose type may be `int | None` or `tuple[int, ...]`."""
    flags = (flag(field.name), *field.metadata["flags"])
    required = field.default is MISSING
    keywords = {"dest": field.name, "required": required, **field.metadata["argument"]}
    value = field.default
    if not required and not (value is None or value is False or value in ("", ())):
        text = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        keywords["help"] += f" (default: {text.replace('%', '%%')})"
    if typing.get_origin(hint) in {typing.Union, types.UnionType}:
        hint = next(item for item in typing.get_args(hint) if item is not type(None))
    if typing.get_origin(hint) is tuple:
        hint = typing.get_args(hint)[0]
        keywords["nargs"] = "+"
    elif "const" in keywords:
        keywords["nargs"] = "?"
    if hint is bool:
        keywords["action"] = "store_true"
    else:
        keywords["type"] = hint if hint in {int, float} else str
    parser.add_argument(*flags, **keywords)
    return flags
