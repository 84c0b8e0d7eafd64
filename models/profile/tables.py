"""Profiles as text: the rows of one model, or one line for each of several."""

from __future__ import annotations

from collections.abc import Sequence

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
        f"GFLOPs, {profile.operations / GIGA:.3f} G other operations; {parts}"
    )


def matrix(profiles: Sequence[tuple[str, str, ModelProfile]]) -> str:
    """(name, note, profile) as one line each: parameters and GFLOPs, whole and by part."""
    return _aligned(MATRIX_HEADING, [_line(*item) for item in profiles])


def _line(name: str, note: str, profile: ModelProfile) -> tuple[str, ...]:
    parts = [profile.part(section) for section in SECTIONS]
    return (
        name,
        f"{profile.params:,}", *(f"{part.params:,}" for part in parts),
        f"{profile.flops / GIGA:.3f}", *(f"{2 * part.macs / GIGA:.3f}" for part in parts),
        note,
    )  # fmt: skip


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
    sources = [source - row.index if source == row.index - 1 else source for source in row.sources]
    stride = channels = size = "-"
    if row.shape is not None:
        channels, size = str(row.shape[0]), f"{row.shape[1]}x{row.shape[2]}"
        stride = f"{image_size / row.shape[1]:g}"
    return (
        str(row.index), row.name or "", ",".join(map(str, sources)), str(row.repeats),
        f"{row.params:,}", f"{row.cost.macs / MEGA:.2f}", f"{row.cost.operations / MEGA:.2f}",
        stride, channels, size, row.block, row.arguments,
    )  # fmt: skip
