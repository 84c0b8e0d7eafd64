"""Profiles as text: the rows of one model, or one line for each of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.profile.counting import ModelProfile, RowProfile
from models.spec import SECTIONS

MEGA, GIGA = 1e6, 1e9
HEADING = (
    "row", "name", "from", "n", "params", "MMACs", "Mops", "stride", "channels", "H x W",
    "block", "arguments",
)  # fmt: skip
MATRIX_HEADING = (
    "model", "params", "backbone", "neck", "head", "GFLOPs", "backbone", "neck", "head", "note",
)  # fmt: skip
LEFT = frozenset({"name", "from", "block", "arguments", "model", "note"})


def row_table(profile: ModelProfile) -> str:
    """The rows as text, one line each, with a heading."""
    return _aligned(HEADING, [_cells(row, profile.image_size) for row in profile.rows])


def summary(profile: ModelProfile, model: str) -> str:
    """One line: totals and the split into backbone, neck and head."""
    parts = ", ".join(
        f"{section} {part.params:,} / {part.macs / GIGA:.3f} GMACs"
        for section, part in ((section, profile.part(section)) for section in SECTIONS)
    )
    return (
        f"{model}: {len(profile.rows)} rows, {profile.params:,} parameters; at "
        f"{profile.image_size} px {profile.macs / GIGA:.3f} GMACs = {profile.flops / GIGA:.3f} "
        f"GFLOPs, {profile.cost.operations / GIGA:.3f} G other operations; {parts}"
    )


def matrix(profiles: Sequence[tuple[str, ModelProfile]]) -> str:
    """(name, profile) as one line each: parameters and GFLOPs, whole and by part."""
    lines = []
    for name, profile in profiles:
        parts = [profile.part(section) for section in SECTIONS]
        params = [f"{value:,}" for value in (profile.params, *(part.params for part in parts))]
        macs = (profile.macs, *(part.macs for part in parts))
        flops = [f"{2 * value / GIGA:.3f}" for value in macs]
        lines.append((name, *params, *flops, "; ".join(profile.spec.notes)))
    return _aligned(MATRIX_HEADING, lines)


def _aligned(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, heading, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if title in LEFT else cell.rjust(width)
            for cell, width, title in zip(line, widths, heading, strict=True)
        ).rstrip()
        for line in (heading, *lines)
    )


def _cells(row: RowProfile, image_size: int) -> tuple[str, ...]:
    spec = row.spec
    sources = [source - row.index if source == row.index - 1 else source for source in spec.sources]
    stride = channels = size = "-"
    if row.shape is not None:
        channels, size = str(row.shape[0]), f"{row.shape[1]}x{row.shape[2]}"
        stride = f"{image_size / row.shape[1]:g}"
    return (
        str(row.index), spec.name or "", ",".join(map(str, sources)), str(spec.repeats),
        f"{row.params:,}", f"{row.cost.macs / MEGA:.2f}", f"{row.cost.operations / MEGA:.2f}",
        stride, channels, size, spec.block,
        " ".join(f"{key}={_compact(value)}" for key, value in spec.args.items()),
    )  # fmt: skip


def _compact(value: Any) -> str:
    """A value of a row as short text: [3,5,7], 0.5."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_compact, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)
