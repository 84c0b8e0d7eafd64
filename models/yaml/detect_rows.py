"""The detection end of a model file: Detect rows, anchors, and v1's way to write them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from models.spec import IMAGE, LayerSpec
from models.yaml.rows import Row
from utils.errors import UserError

MAX_ANCHORS = 64  # per level; YOLOv5 has 3


def anchors_of(row: Row, anchors: Any) -> Any:
    """The anchors of a Detect row: [nc, anchors] as words, or values instead of the word."""
    args = row.args
    given = ["nc", *args.values()] if isinstance(args, Mapping) and {*args} <= {"anchors"} else args
    wanted = zip(given, ("nc", "anchors"), strict=False)
    wrong = any(isinstance(item, str) and item != word for item, word in wanted)
    if isinstance(given, Mapping) or len(given) > 2 or wrong:
        raise UserError(f"{row.where}: Detect takes [nc, anchors], got {args!r}")
    return given[1] if len(given) == 2 and given[1] != "anchors" else anchors


def read_anchors(anchors: Any, levels: int, where: str) -> tuple[tuple[float, ...], ...] | int:
    """Checked anchors: pixels per level, or how many to find. UserError for anything else."""
    if type(anchors) is int and 1 <= anchors <= MAX_ANCHORS:
        return anchors
    rows: list[tuple[float, ...]] = []
    for level in anchors if isinstance(anchors, list | tuple) else ():
        items = level if isinstance(level, list | tuple) else (level,)
        flat = [v for item in items for v in (item if isinstance(item, list | tuple) else (item,))]
        if len(flat) % 2 or not all(type(v) in (int, float) and 0 < v < math.inf for v in flat):
            raise UserError(
                f"{where}: anchors of a level are widths and heights over 0, got {level!r:.80}"
            )
        rows.append(tuple(map(float, flat)))
    if len({len(row) for row in rows}) != 1 or not rows[0]:
        raise UserError(
            f"{where}: anchors must be one list of widths and heights per level, equally long, or "
            f"how many to find per level (1 to {MAX_ANCHORS}), got {anchors!r:.80}"
        )
    if len(rows) != levels:
        raise UserError(f"{where}: anchors for {len(rows)} levels, but Detect reads {levels} rows")
    return tuple(rows)


def merge_detection_rows(layers: list[LayerSpec]) -> list[LayerSpec]:
    """Fold v1's nn.Conv2d detection rows, which its Detect with [] reads, into Detect."""
    outputs = [
        index
        for index, layer in enumerate(layers)
        if layer.block == "Conv2d" and isinstance(layer.args.get("c_out"), str)
    ]
    if not outputs:
        return layers
    kept = [index for index in range(len(layers)) if index not in outputs]
    new = {old: index for index, old in enumerate(kept)} | {IMAGE: IMAGE}
    detect = layers[-1]
    others = [layers[index] for index in kept[:-1]]
    if (
        detect.block != "Detect"
        or detect.sources not in {(), tuple(outputs)}
        or any(set(layer.sources) & set(outputs) for layer in others)
    ):
        raise UserError(f"{detect.where}: Detect alone must read the rows {outputs}, or []")
    sources = tuple(layers[index].sources[0] for index in outputs)
    return [
        replace(layer, sources=tuple(new[source] for source in layer.sources))
        for layer in [*others, replace(detect, sources=sources)]
    ]
