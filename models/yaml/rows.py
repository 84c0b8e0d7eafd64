"""Rows of a model file, `[from, number, block, args]`, named or not, args listed or mapped.

`extends`, `swap` and `keep` make a variant of a model by what it changes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from inspect import Parameter
from typing import Any

from models import registry
from models.registry import Positive, check
from models.spec import DETECT, make_divisible, round_channels
from utils.errors import UserError, nearest
from utils.files import find_config
from utils.yamlio import Document, load_yaml

# v1's one expression, a constant
DETECTION_CHANNELS = re.compile(r"na\s*\*\s*\(\s*nc\s*\+\s*5\s*\)")
OTHER_TASKS = {"Segment": "segmentation", "Classify": "classification"}
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
    known = (*registry.ROWS, *registry.YAML_NAMES)
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
        if isinstance(block, str) and block in OTHER_TASKS:
            raise UserError(
                f"{where}: {block} is a {OTHER_TASKS[block]} model; FeatherDet trains detectors "
                "(a Detect row)"
            )
        if not isinstance(block, str) or block not in known:
            close, names = nearest(str(block), known), ", ".join(sorted(registry.ROWS))
            raise UserError(f"{where}: unknown block {block!r}{close} (known: {names})")
        block = registry.YAML_NAMES.get(block, block)
        rows.append(Row(section, sources, repeats, block, args, name, where, setting))
    return tuple(rows)


def argument_name(block: str, key: Any, where: str) -> str:
    """The argument that a key means, which may be a short one; UserError where there is none."""
    name = registry.ALIASES.get(key, key)
    known = [item for item in registry.ROWS[block].arguments if item != "n"]
    if name not in known:
        raise UserError(f"{where}: {block} has no argument {name!r}{nearest(str(name), known)}")
    return str(name)


def bind_arguments(row: Row) -> dict[str, Any]:
    """Arguments by constructor parameter, of the types and ranges that the block annotates.

    A channel argument may be the name of a row instead.  UserError with the row.
    """
    block = registry.ROWS[row.block]
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


@dataclass(frozen=True)
class Swap:
    """Replace `block` (only of this `stride`, where one is given) by `target` in some sections."""

    block: str
    stride: int | None
    target: str
    args: Mapping[str, Any]  # of the target, in addition to those of the row
    sections: tuple[str, ...]  # empty: all
    keep: tuple[str, ...]  # names of rows that stay
    where: str

    def fits(self, row: Row, section: str) -> bool:
        """Whether the row is to be swapped."""
        elsewhere = bool(self.sections) and section not in self.sections
        if self.block != row.block or row.name in self.keep or elsewhere:
            return False
        if self.stride is None:
            return True
        stride = registry.ROWS[row.block].arguments.get("stride")
        default = stride.default if stride else None
        return bool(self.stride == bind_arguments(row).get("stride", default))

    def apply(self, row: Row) -> Row:
        """The row with the other block.  UserError for an argument that means nothing there."""
        target = registry.ROWS[self.target]
        args = {}  # anchors of a Detect row mean nothing to another head
        bound = {} if row.block == DETECT else bind_arguments(row)
        for name, value in bound.items():
            if name in target.arguments:
                args[name] = value
            elif name not in target.ignores:
                raise UserError(
                    f"{self.where}: {self.target} in place of {row.block} ({row.where}) has no use "
                    f"for {name}={value!r}: give the block this argument, or list it in `ignores`"
                )
        return replace(row, block=self.target, args={**args, **self.args})


def base_chain(document: Document, folder: str) -> list[Document]:
    """The file, the one it extends, and so on.  UserError for a ring.

    A base is looked for next to the file, then as a name of cfg/<folder>.
    """
    chain = [document]
    while "extends" in document.mapping():
        name, where = document.data["extends"], document.at("extends")
        if not isinstance(name, str):
            raise UserError(f"{where}: extends must name a file, got {name!r}")
        local = document.path.parent / name
        try:
            base = load_yaml(local if local.is_file() else find_config(name, folder))
        except UserError as error:
            raise UserError(f"{where}: extends {name!r}: {error}") from error
        if any(base.path.resolve() == other.path.resolve() for other in chain):
            raise UserError(f"{where}: {base.path} extends itself by way of {document.path}")
        chain.append(base)
        document = base
    return chain


def swap_rows(
    document: Document, sections: Mapping[str, tuple[Row, ...]], own: Sequence[str] = ()
) -> dict[str, tuple[Row, ...]]:
    """The sections' rows with the swaps of the document, and of its sections `own`, made at once.

    A key with a stride goes before one without, a section's own before the document's.  UserError
    for a swap that meets no row, a `keep` that names none, and for an argument that means
    something to the old block and nothing to the new one.
    """
    swaps = _read_swaps(document, ())
    for section in own:
        if section not in sections:
            raise UserError(f"{document.at(section)}: swap needs rows that `extends` brings")
        swaps += _read_swaps(document, (section,))
    names = {row.name for rows in sections.values() for row in rows if row.name}
    swaps.sort(key=lambda swap: (swap.stride is None, not swap.sections))
    used: list[Swap] = []
    result: dict[str, tuple[Row, ...]] = {}
    for section, rows in sections.items():
        fitting = [[swap for swap in swaps if swap.fits(row, section)][:1] for row in rows]
        pairs = zip(rows, fitting, strict=True)
        result[section] = tuple(found[0].apply(row) if found else row for row, found in pairs)
        used += [swap for found in fitting for swap in found]
    for swap in swaps:
        for name in swap.keep:
            if name not in names:
                raise UserError(f"{swap.where}: keep names no row {name!r}{nearest(name, names)}")
        if swap not in used:
            raise UserError(
                f"{swap.where}: no row of the base model has the block {swap.block} to swap"
            )
    return result


def _read_swaps(document: Document, at: tuple[str, ...]) -> list[Swap]:
    """The `swap` and `keep` keys at `at`: the file itself, or its backbone, neck or head."""
    data: Any = document.data
    for part in at:
        data = data[part]
        check_keys(document, ("swap", "keep"), part)
    keep, swaps = data.get("keep", []), data.get("swap", {})
    if keep != []:
        checked(document.at(*at, "keep"), "keep", keep, Sequence[str])
    if not isinstance(swaps, Mapping) or (keep and not swaps):
        raise UserError(
            f"{document.at(*at, 'swap')}: swap must map blocks to blocks, got {swaps!r}"
        )
    result = []
    for key, value in swaps.items():
        where = document.at(*at, "swap", key)
        block, slash, stride = str(key).partition("/")
        if slash and stride not in {"1", "2"}:
            raise UserError(f"{where}: the stride of {key!r} must be 1 or 2")
        given = dict(value) if isinstance(value, Mapping) else {"block": value}
        target = given.pop("block", None)
        for name in (block, target):
            if not isinstance(name, str) or name not in registry.ROWS:
                close = nearest(str(name), registry.ROWS)
                raise UserError(f"{where}: unknown block {name!r}{close}")
        args = {argument_name(target, name, where): item for name, item in given.items()}
        strides = int(stride) if slash else None
        result.append(Swap(block, strides, target, args, at, tuple(keep), where))
    return result
