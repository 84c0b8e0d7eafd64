"""`swap` and `keep`: a variant of a model by what it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models import registry
from models.yaml.rows import Row, bind_arguments
from utils.errors import UserError, nearest
from utils.yamlio import Document


@dataclass(frozen=True)
class Swap:
    """Replace `block` (only of this `stride`, where one is given) by `target` in some sections."""

    block: str
    stride: int | None
    target: str
    args: Mapping[str, Any]  # of the target, in place of or beside those of the row
    sections: tuple[str, ...]  # empty: all
    keep: tuple[str, ...]  # names of rows that stay
    where: str


def read_swaps(document: Document, at: tuple[str, ...]) -> list[Swap]:
    """The `swap` and `keep` keys at `at`: the file itself, or its backbone, neck or head."""
    data: Any = document.data
    for part in at:
        data = data[part]
        for key in data:
            if key not in {"swap", "keep"}:
                raise UserError(f"{document.at(*at, key)}: expected swap and keep, found {key!r}")
    keep = data.get("keep", [])
    if not isinstance(keep, list) or not all(isinstance(item, str) for item in keep):
        raise UserError(
            f"{document.at(*at, 'keep')}: keep must be a list of row names, got {keep!r}"
        )
    swaps = data.get("swap")
    if swaps is None:
        if keep:
            raise UserError(f"{document.at(*at, 'keep')}: keep without swap keeps nothing")
        return []
    if not isinstance(swaps, Mapping):
        raise UserError(
            f"{document.at(*at, 'swap')}: swap must map blocks to blocks, got {swaps!r}"
        )
    return [
        _swap(str(key), value, at, tuple(keep), document.at(*at, "swap", key))
        for key, value in swaps.items()
    ]


def _swap(key: str, value: Any, at: tuple[str, ...], keep: tuple[str, ...], where: str) -> Swap:
    block, slash, stride = key.partition("/")
    if slash and stride not in {"1", "2"}:
        raise UserError(f"{where}: the stride of {key!r} must be 1 or 2")
    args: Mapping[str, Any] = {}
    target = value
    if isinstance(value, Mapping):
        args = {name: item for name, item in value.items() if name != "block"}
        target = value.get("block")
    for name in (block, target):
        if not isinstance(name, str) or name not in registry.BLOCKS:
            raise UserError(f"{where}: unknown block {name!r}{nearest(str(name), registry.BLOCKS)}")
    known = [item for item in registry.BLOCKS[str(target)].arguments if item != "n"]
    for name in args:
        if registry.ALIASES.get(name, name) not in known:
            raise UserError(
                f"{where}: {target} has no argument {name!r}{nearest(str(name), known)}"
            )
    return Swap(block, int(stride) if slash else None, str(target), args, at, keep, where)


def apply_swaps(
    sections: Mapping[str, tuple[Row, ...]], swaps: Sequence[Swap]
) -> dict[str, tuple[Row, ...]]:
    """Swap blocks row by row, all at once; a key with a stride goes before one without.

    Raises UserError for a swap that meets no row, a `keep` that names none, and for an argument
    that means something to the old block and nothing to the new one.
    """
    names = {row.name for rows in sections.values() for row in rows if row.name}
    for swap in swaps:
        for name in swap.keep:
            if name not in names:
                raise UserError(f"{swap.where}: keep names no row {name!r}{nearest(name, names)}")
    used: set[int] = set()
    result: dict[str, tuple[Row, ...]] = {}
    for section, rows in sections.items():
        changed = []
        for row in rows:
            chosen = _match(row, section, swaps)
            if chosen is not None:
                used.add(id(chosen))
            changed.append(row if chosen is None else _swapped(row, chosen))
        result[section] = tuple(changed)
    for swap in swaps:
        if id(swap) not in used:
            raise UserError(
                f"{swap.where}: no row of the base model has the block {swap.block} to swap"
            )
    return result


def _match(row: Row, section: str, swaps: Sequence[Swap]) -> Swap | None:
    fitting = [
        swap
        for swap in swaps
        if swap.block == row.block
        and (not swap.sections or section in swap.sections)
        and row.name not in swap.keep
        and (swap.stride is None or _stride(row) == swap.stride)
    ]
    return max(fitting, key=lambda s: (s.stride is not None, bool(s.sections)), default=None)


def _stride(row: Row) -> Any:
    stride = registry.BLOCKS[row.block].arguments.get("stride")
    return stride and bind_arguments(row).get("stride", stride.default)


def _swapped(row: Row, swap: Swap) -> Row:
    target = registry.BLOCKS[swap.target].arguments
    own = {registry.ALIASES.get(key, key): value for key, value in swap.args.items()}
    ignored = registry.BLOCKS[swap.target].ignores
    args = {}
    for name, value in bind_arguments(row).items():
        if name in target:
            args[name] = value
        elif name not in ignored:
            raise UserError(
                f"{swap.where}: {swap.target} in place of {row.block} ({row.where}) has no use for "
                f"{name}={value!r}"
            )
    return replace(row, block=swap.target, args={**args, **own})
