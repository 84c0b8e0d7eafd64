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
    if isinstance(args, Mapping):
        if set(args) - {"anchors"}:
            raise UserError(
                f"{row.where}: Detect takes only 'anchors', got {', '.join(map(str, args))}"
            )
        return args.get("anchors", anchors)
    for item, word in zip(args, ("nc", "anchors"), strict=False):
        if isinstance(item, str) and item != word:
            raise UserError(
                f"{row.where}: Detect takes [nc, anchors], found {item!r} instead of {word!r}"
            )
    if len(args) > 2:
        raise UserError(f"{row.where}: Detect takes [nc, anchors], found {len(args)} arguments")
    return args[1] if len(args) == 2 and args[1] != "anchors" else anchors


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
    if not rows or not rows[0]:
        raise UserError(
            f"{where}: anchors must be one list of widths and heights per level, or how many to "
            f"find per level (1 to {MAX_ANCHORS}), got {anchors!r:.80}"
        )
    if len({len(row) for row in rows}) != 1:
        raise UserError(
            f"{where}: every level needs as many anchors, got {[len(r) // 2 for r in rows]}"
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
    detect = layers[-1]
    if not outputs:
        if detect.block == "Detect" and not detect.sources:
            raise UserError(
                f"{detect.where}: Detect with [] reads nn.Conv2d rows, but there are none"
            )
        return layers
    if detect.block != "Detect" or detect.sources not in {(), tuple(outputs)}:
        raise UserError(f"{detect.where}: Detect must read the detection rows {outputs}, or []")
    kept = [index for index in range(len(layers)) if index not in outputs]
    position = {old: new for new, old in enumerate(kept)} | {IMAGE: IMAGE}
    layers[-1] = replace(detect, sources=tuple(layers[index].sources[0] for index in outputs))
    for index in kept:
        reads = [source for source in layers[index].sources if source in outputs]
        if reads:
            raise UserError(f"{layers[index].where}: reads row {reads[0]}, a detection output")
    return [
        replace(layers[old], sources=tuple(position[source] for source in layers[old].sources))
        for old in kept
    ]
