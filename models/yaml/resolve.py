"""Rows as written to rows as built: absolute sources, scaled repeats, final widths."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from models import registry
from models.spec import CLASSIFIER, DETECT, IMAGE, IMAGE_CHANNELS, TAP, LayerSpec, scale_repeats
from models.yaml.rows import DETECTION_CHANNELS, Row, bind_arguments
from utils.errors import UserError, nearest

MAX_ANCHORS = 64  # per level; YOLOv5 has 3


def resolve_rows(rows: Sequence[Row], *, depth: float, width: float) -> tuple[list[LayerSpec], Any]:
    """Rows with absolute numbers and final widths; and the anchors that a Detect row states.

    `depth` and `width` multiply rows whose file has no multiples of its own.  UserError with the
    row for a source or a width that does not exist.
    """
    layers: list[LayerSpec] = []
    names: dict[str, int] = {}
    widths: dict[int, int] = {IMAGE: IMAGE_CHANNELS}
    anchors = None
    for index, row in enumerate(rows):
        sources = _sources(row, index, names)
        if row.name is not None:
            if row.name in names:
                raise UserError(f"{row.where}: row name {row.name!r} is used twice")
            names[row.name] = index
        repeats = scale_repeats(row.repeats, row.setting.depth or depth)
        args: dict[str, Any] = {}
        if row.block == DETECT:
            anchors = anchors_of(row, None)
        elif not sources:
            raise UserError(f"{row.where}: row {index} {row.block} reads no row: 'from' is empty")
        else:
            by_name = {name: widths.get(number, 0) for name, number in names.items()}
            args = _scaled_arguments(row, width, by_name)
        if row.block not in registry.HEADS:
            widths[index] = _width_out(row, repeats, args, [widths[item] for item in sources])
        section = {"backbone": "backbone", CLASSIFIER: "head"}.get(row.section, "neck")
        layers.append(
            LayerSpec(
                "head" if row.block in registry.HEADS else section,
                sources, repeats, row.block, args, row.name, row.where,
                row.setting.activation, row.setting.norm,
            )
        )  # fmt: skip
    return layers, anchors


def _scaled_arguments(row: Row, width: float, names: Mapping[str, int]) -> dict[str, Any]:
    """The arguments with final channels; `names`: the widths of the earlier rows."""
    args = bind_arguments(row)
    for key in registry.ROWS[row.block].channel_args:
        value = args.get(key)
        if isinstance(value, int | float):
            args[key] = row.setting.channels(value, width)
        elif isinstance(value, str) and not DETECTION_CHANNELS.fullmatch(value):
            if value not in names:
                raise UserError(
                    f"{row.where}: argument {key!r} of {row.block} is {value!r}, neither "
                    f"a number nor the name of an earlier row{nearest(value, names)}"
                )
            args[key] = row.setting.follow(names[value])
    return args


def _width_out(row: Row, repeats: int, args: Mapping[str, Any], inputs: list[int]) -> int:
    """Channels of the row: its `c_out`, or what the block has that is built of shapes alone."""
    if "c_out" in args:
        width = args["c_out"]
        return width if isinstance(width, int) else 0  # v1's detection row, as wide as Detect
    try:
        with torch.device("meta"):
            return registry.build(row.block, inputs, repeats, args)[1]
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{row.where}: {row.block}: {error}") from error


def _sources(row: Row, index: int, names: Mapping[str, int]) -> tuple[int, ...]:
    sources: list[int] = []
    for item in row.sources:
        if isinstance(item, str):
            if item not in names:
                hint, taps = nearest(item, names), [name for name in names if TAP.fullmatch(name)]
                if TAP.fullmatch(item) and taps:
                    remedy = "; a neck such as pan-p6 makes P6 itself" if item == "P6" else ""
                    hint = f" (the backbone has the taps {', '.join(taps)}{remedy})"
                raise UserError(
                    f"{row.where}: row {index} reads {item!r}, which names no earlier row{hint}"
                )
            sources.append(names[item])
        else:
            source = index + item if item < 0 else item
            if not (0 <= source < index or (index == 0 and source == IMAGE)):
                raise UserError(
                    f"{row.where}: row {index} reads {item}; expected a row from 0 to {index - 1}, "
                    f"or -1 to -{max(index, 1)}"
                )
            sources.append(source)
    return tuple(sources)


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
    convs = [index for index, layer in enumerate(layers) if layer.block == "Conv2d"]
    outputs = [index for index in convs if isinstance(layers[index].args.get("c_out"), str)]
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
