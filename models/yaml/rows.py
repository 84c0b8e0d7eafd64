"""Rows of a model file: `[from, number, block, args]`, named or not, args listed or mapped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any

from models import registry
from models.registry import Positive, check
from models.spec import DETECT, make_divisible, round_channels
from utils.errors import UserError, nearest
from utils.yamlio import Document

# v1's one expression, a constant
DETECTION_CHANNELS = re.compile(r"na\s*\*\s*\(\s*nc\s*\+\s*5\s*\)")
OTHER_TASKS = {"Segment": "segmentation", "Classify": "classification"}
CLASSIFIER = "classifier"  # the section of rows after a backbone that make it one
WIDTH_STEP = 8  # channels; YOLOv5's widths are multiples of it


@dataclass(frozen=True)
class Setting:
    """Values of an included file for all its rows; None: the model's."""

    depth: float | None = None
    width: float | None = None
    divisor: int | None = None  # of the paper's width multiplier; None: up to a multiple of 8
    activation: str | None = None
    norm: tuple[float, float] | None = None  # (eps, momentum)

    def channels(self, value: float, model_width: float) -> int | float:
        """A row's channels at this width; a file's own width of 1 leaves them as they are."""
        if self.width == 1:
            return value
        if self.width is None or self.divisor is None:
            return make_divisible(value * (self.width or model_width), WIDTH_STEP)
        return round_channels(value * self.width, self.divisor)

    def follow(self, channels: int) -> int:
        """The width of a row that is to be as wide as another one of `channels`."""
        return make_divisible(channels * (self.width or 1.0), WIDTH_STEP)


@dataclass(frozen=True)
class Row:
    """A row as written: sources may be relative, negative or names; arguments are not bound yet."""

    section: str
    sources: tuple[int | str, ...]
    repeats: int
    block: str
    args: list[Any] | Mapping[str, Any]
    name: str | None
    where: str  # file:line: section[index]
    setting: Setting


def checked(where: str, name: str, value: Any, annotation: Any) -> Any:
    """The value.  UserError unless it is of the annotated type and range, see models.registry."""
    try:
        check(name, value, annotation)
    except ValueError as error:
        hint = "; expressions are never run" if isinstance(value, str) else ""
        raise UserError(f"{where}: {error}{hint}") from error
    return value


def check_keys(document: Document, known: Sequence[str], *parents: str) -> None:
    """UserError for a key of the mapping at `parents` that is not known."""
    data: Any = document.mapping()
    for parent in parents:
        data = data[parent]
    for key in data:
        if key not in known:
            raise UserError(
                f"{document.at(*parents, key)}: unknown key {key!r}{nearest(str(key), known)}"
            )


def read_rows(
    document: Document, key: tuple[str, ...], section: str, setting: Setting = Setting()
) -> tuple[Row, ...]:
    """The rows at `key` of a document. Raises UserError with file, line and row."""
    content: Any = document.data
    for part in key:
        content = content.get(part) if isinstance(content, Mapping) else None
    if not isinstance(content, list) or not content:
        raise UserError(
            f"{document.at(*key)}: {'.'.join(key)} must be a list of rows "
            f"[from, number, block, args], got {type(content).__name__}"
        )
    rows = []
    for index, item in enumerate(content):
        where, name = f"{document.at(*key, index)}: {section}[{index}]", None
        if isinstance(item, Mapping) and len(item) == 1:
            ((name, item),) = item.items()
            if not isinstance(name, str) or not name.isidentifier():
                raise UserError(f"{where}: row name {name!r} must be letters, digits and _")
        if not isinstance(item, list) or len(item) != 4 or not isinstance(item[3], list | Mapping):
            raise UserError(
                f"{where}: a row is [from, number, block, args] or NAME: [...], where args are a "
                f"list or a mapping; got {item!r}"
            )
        source, repeats, block, args = item
        checked(where, "number", repeats, Positive)
        sources = tuple(source) if isinstance(source, list) else (source,)
        for entry in sources:
            checked(where, "from", entry, int | str)
        block = _block_name(block, where)
        rows.append(Row(section, sources, repeats, block, args, name, where, setting))
    return tuple(rows)


def _block_name(block: Any, where: str) -> str:
    known = (*registry.BLOCKS, *registry.YAML_NAMES, DETECT)
    if isinstance(block, str) and block in OTHER_TASKS:
        raise UserError(
            f"{where}: {block} is a {OTHER_TASKS[block]} model; FeatherDet trains detectors (a "
            "Detect row)"
        )
    if not isinstance(block, str) or block not in known:
        close = nearest(str(block), known)
        raise UserError(
            f"{where}: unknown block {block!r}{close} (known: {', '.join(sorted(registry.BLOCKS))})"
        )
    return registry.YAML_NAMES.get(block, block)


def argument_name(block: str, key: Any, where: str) -> str:
    """The argument that a key means, which may be a short one; UserError where there is none."""
    name = registry.ALIASES.get(key, key)
    known = [item for item in registry.BLOCKS[block].arguments if item != "n"]
    if name not in known:
        raise UserError(f"{where}: {block} has no argument {name!r}{nearest(str(name), known)}")
    return str(name)


def bind_arguments(row: Row) -> dict[str, Any]:
    """Arguments by constructor parameter, of the types and ranges that the block annotates.

    A channel argument may be the name of a row instead.  UserError with the row.
    """
    block = registry.BLOCKS[row.block]
    known = [name for name in block.arguments if name != "n"]
    names, values = known, row.args
    if isinstance(row.args, Mapping):
        names = [argument_name(row.block, key, row.where) for key in row.args]
        values = list(row.args.values())
    bound = dict(zip(names, map(_plain, values), strict=False))
    if len(bound) < len(values):
        raise UserError(
            f"{row.where}: {row.block} takes each of {', '.join(known)} once, got {row.args!r}"
        )
    missing = [key for key in known if block.arguments[key].default is Parameter.empty]
    missing = [key for key in missing if key not in bound]
    if missing:
        raise UserError(f"{row.where}: {row.block} needs {', '.join(missing)}")
    for name, value in bound.items():
        if isinstance(value, str) and name in block.channel_args:
            # a text stands for channels: another row's, or those of v1's detection rows
            v1 = row.block == "Conv2d" and DETECTION_CHANNELS.fullmatch(value)
            if value.isidentifier() or v1:
                continue
        checked(f"{row.where}: {row.block}", name, value, block.arguments[name].annotation)
    return bound


def _plain(value: Any) -> Any:
    """Lists as tuples, and 'None' as YOLOv5's files write it."""
    if isinstance(value, list):
        return tuple(map(_plain, value))
    return None if value == "None" else value
