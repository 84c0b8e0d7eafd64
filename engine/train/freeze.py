"""Rows of a detector that do not learn."""

from __future__ import annotations

from collections.abc import Sequence

from models.detector import Detector
from models.spec import SECTIONS, ModelSpec
from utils.errors import UserError, nearest


def rows_to_freeze(spec: ModelSpec, items: Sequence[str]) -> list[int]:
    """The rows that `--freeze` means, ascending.

    One number N: the first N rows, as in YOLOv5; several: these very rows; a section (backbone,
    neck, head) or a row's name: those rows.  UserError for a row that does not exist.
    """
    count = len(spec.layers)
    if len(items) == 1 and items[0].isdigit():
        if int(items[0]) > count:
            raise UserError(f"--freeze {items[0]}: the model has only {count} rows")
        return list(range(int(items[0])))
    return sorted({row for item in items for row in rows_named(spec, item, "--freeze")})


def rows_named(spec: ModelSpec, item: str, flag: str) -> list[int]:
    """The rows of a section, of a name or of a number, ascending. UserError when there is none."""
    found = [
        index
        for index, layer in enumerate(spec.layers)
        if item in {layer.section, layer.name, str(index)}
    ]
    if not found:
        known = [*SECTIONS, *(layer.name for layer in spec.layers if layer.name)]
        raise UserError(
            f"{flag} {item}: neither a row (0 to {len(spec.layers) - 1}) nor a name;"
            f" known names: {', '.join(known)}{nearest(item, known)}"
        )
    return found


def freeze(model: Detector, rows: Sequence[int]) -> None:
    """Stop the weights of `rows` and their batch statistics; call after `model.train()`."""
    for row in rows:
        model.layers[row].requires_grad_(False).eval()
    if rows and not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError("--freeze: every row is frozen, nothing is left to train")
