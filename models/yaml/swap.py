"""`extends`, `swap` and `keep`: a variant of a model by what it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from models import registry
from models.yaml.rows import Row, argument_name, bind_arguments, check_keys, checked
from utils.errors import UserError, nearest
from utils.files import find_config
from utils.yamlio import Document, load_yaml


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
        stride = registry.BLOCKS[row.block].arguments.get("stride")
        default = stride.default if stride else None
        return bool(self.stride == bind_arguments(row).get("stride", default))

    def apply(self, row: Row) -> Row:
        """The row with the other block.  UserError for an argument that means nothing there."""
        target = registry.BLOCKS[self.target]
        args = {}
        for name, value in bind_arguments(row).items():
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
            if not isinstance(name, str) or name not in registry.BLOCKS:
                close = nearest(str(name), registry.BLOCKS)
                raise UserError(f"{where}: unknown block {name!r}{close}")
        args = {argument_name(target, name, where): item for name, item in given.items()}
        strides = int(stride) if slash else None
        result.append(Swap(block, strides, target, args, at, tuple(keep), where))
    return result
