"""results.json as a table for people: table.md, and on the console."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine.compare.report.tables import commits_of
from engine.compare.schema import FAILED, LatencyAt, Results, Row
from engine.measure.energy import NOT_MEASURED
from utils.terminal import printable

MEGA, GIGA = 1e6, 1e9
NOTHING = "-"
SIGNIFICANT = "*"
DIRTY = "-dirty"
_ESCAPES = (
    ("\\", r"\\"), ("&", "&amp;"), ("<", "&lt;"), ("`", r"\`"),
    ("](", r"]\("), ("][", r"]\["), ("]:", r"]\:"),
)  # fmt: skip
MINUTE, HOUR = 60, 3600


@dataclass(frozen=True)
class Column:
    """A column of the table for people: its head and a row's cell."""

    head: str
    cell: Callable[[Row], str]


def _number(value: float | None, digits: str) -> str:
    return NOTHING if value is None else format(value, digits)


def spread_text(row: Row, key: str) -> str:
    """'0.412 ± 0.006' over the seeds."""
    found = (row["accuracy"] or {}).get(key)
    if found is None or found["mean"] is None:
        return NOTHING
    sd = "" if found["sd"] is None else f" ± {found['sd']:.3f}"
    return f"{found['mean']:.3f}{sd}"


def difference_text(row: Row) -> str:
    """'+0.021 [+0.003, +0.040]*': ΔAP, its interval, and a star where that leaves out 0."""
    found = (row["difference"] or {}).get("AP")
    if found is None:
        return NOTHING
    star = SIGNIFICANT if found["significant"] else ""
    return f"{found['delta']:+.3f} [{found['low']:+.3f}, {found['high']:+.3f}]{star}"


def duration(seconds: float | None) -> str:
    """'42 s', '12.5 min', '3.20 h'."""
    if seconds is None:
        return NOTHING
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.1f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.2f} h"


def _cost(row: Row, key: str, scale: float, digits: str) -> str:
    cost: Any = row["cost"]
    return NOTHING if cost is None else format(cost[key] / scale, digits)


def _at(row: Row, batch: int) -> LatencyAt | None:
    return next((one for one in row["latency"] if one["batch"] == batch), None)


def _latency(row: Row, batch: int) -> str:
    found = _at(row, batch)
    if found is None or found["p50_ms"] is None or found["p90_ms"] is None:
        return "failed" if found is not None else NOTHING
    return f"{found['p50_ms']:.2f} / {found['p90_ms']:.2f}"


def _of_latency(row: Row, batch: int, key: str, digits: str) -> str:
    found: Any = _at(row, batch)
    return NOTHING if found is None else _number(found[key], digits)


def _speedup(row: Row, batch: int | None) -> str:
    """'1.93': the baseline's FLOPs, or its time at a batch size, over the row's own."""
    found = row["speedup"]
    if found is None:
        return NOTHING
    if batch is None:
        return _number(found["flops"], ".2f")
    factors = (at["factor"] for at in found["latency"] if at["batch"] == batch)
    return _number(next(factors, None), ".2f")


def _energy_batch(table: Sequence[Row]) -> str:
    """' at 32': all rows' energy is of one batch size."""
    found = sorted({row["energy"]["batch"] for row in table if row["energy"] is not None})
    return f" at {', '.join(map(str, found))}" if found else ""


def _energy(row: Row) -> str:
    return NOT_MEASURED if row["energy"] is None else f"{row['energy']['joules_per_image']:.3g}"


def _training(row: Row, key: str, digits: str) -> str:
    training: Any = row["training"]
    return NOTHING if training is None else _number(training[key]["mean"], digits)


def columns(results: Results) -> list[Column]:
    """The columns that have something to say in this table."""
    table = results["rows"]
    shown = [Column("model", lambda row: row["name"])]
    if any(row["accuracy"] for row in table) or any(row["status"] == FAILED for row in table):
        for key in ("AP", "AP50", "AP75", "APs", "APm", "APl"):
            shown.append(Column(key, lambda row, key=key: spread_text(row, key)))  # type: ignore[misc]
        shown.append(Column("ΔAP [95 %]", difference_text))
    shown += [
        Column("params M", lambda row: _cost(row, "params", MEGA, ".3f")),
        Column("GFLOPs", lambda row: _cost(row, "flops", GIGA, ".3f")),
        Column("MAC MB", lambda row: _cost(row, "access_bytes", MEGA, ".1f")),
        Column("activations MB", lambda row: _cost(row, "activation_bytes", MEGA, ".1f")),
        Column("FLOP/B", lambda row: _cost(row, "intensity", 1, ".1f")),
    ]
    batches = results["measurement"]["batches"] if results["measurement"] else []
    for batch in batches:
        title = f"ms/image at {batch}, p50 / p90"
        shown.append(Column(title, lambda row, b=batch: _latency(row, b)))  # type: ignore[misc]
    if batches:
        if len(table) > 1:
            shown.append(Column("speed-up by FLOPs", lambda row: _speedup(row, None)))
            for batch in batches:
                title = f"measured at {batch}"
                shown.append(Column(title, lambda row, b=batch: _speedup(row, b)))  # type: ignore[misc]
        last = max(batches)
        shown += [
            Column(
                f"images/s at {last}",
                lambda row: _of_latency(row, last, "images_per_second", ".1f"),
            ),
            Column(
                f"GFLOP/s at {last}",
                lambda row: _of_latency(row, last, "gflops_per_second", ".1f"),
            ),
            Column(f"J/image{_energy_batch(table)}", _energy),
        ]
    if any(row["training"] for row in table):
        shown += [
            Column("training images/s", lambda row: _training(row, "images_per_second", ".1f")),
            Column("waiting for data", lambda row: _training(row, "wait_share", ".0%")),
            Column(
                "time to train",
                lambda row: (
                    duration(row["training"]["seconds"]["mean"]) if row["training"] else NOTHING
                ),
            ),
        ]
    if any(row["cause"] for row in table):
        shown.append(Column("failed", lambda row: row["cause"] or ""))
    return shown


def markdown(results: Results) -> str:
    """table.md: the rows, and what they mean."""
    shown = columns(results)
    lines = [
        "| " + " | ".join(_escaped(column.head) for column in shown) + " |",
        "|" + "---|" * len(shown),
    ]
    for row in results["rows"]:
        cells = [_escaped(column.cell(row)).replace("|", r"\|") for column in shown]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *_footnotes(results), ""])


def _escaped(text: str) -> str:
    """Text that Markdown takes as text, not as HTML, code, links or pictures.

    A bracket alone is none of these, so the usual heads and intervals stay as they are; an address
    that stands alone may be a link, to what it says.
    """
    for sign, written in _ESCAPES:
        text = text.replace(sign, written)
    return printable(text)


def _code(text: str) -> str:
    """A code span, fenced by more backticks than the text has in a row."""
    text = printable(text)
    fence = "`"
    while fence in text:
        fence += "`"
    return f"{fence}{text}{fence}" if fence == "`" else f"{fence} {text} {fence}"


def _code_notes(commits: Sequence[str]) -> list[str]:
    """By which code the runs were made; said loudly where that is not one known state of it."""
    short = ", ".join(commit_text(commit) for commit in commits)
    lines = [f"Runs by commit {short}."] if len(commits) == 1 else []
    if len(commits) > 1:
        lines.append(f"**Warning**: runs of {len(commits)} commits: {short}.")
    if any(commit.endswith(DIRTY) for commit in commits):
        lines.append("**Warning**: some were made by code with uncommitted changes (-dirty).")
    return lines


def commit_text(commit: str) -> str:
    """Twelve digits, and whether there were uncommitted changes."""
    return commit.removesuffix(DIRTY)[:12] + (DIRTY if commit.endswith(DIRTY) else "")


def device_text(device: str, threads: int | None) -> str:
    """'cpu (x86_64), torch threads: 2'."""
    return device if threads is None else f"{device}, torch threads: {threads}"


def _footnotes(results: Results) -> list[str]:
    protocol, measurement = results["protocol"], results["measurement"]
    lines = []
    if "data" in protocol:
        seeds = protocol.get("seeds")
        over = f", mean ± sd over seeds {', '.join(map(str, seeds))}" if seeds else ""
        lines.append(
            f"{_escaped(protocol['data']['name'])}, {protocol['data']['val_images']} validation"
            f" images, {protocol['image_size']} px{over}. ΔAP against"
            f" {_escaped(results['baseline'] or NOTHING)}, paired"
            f" bootstrap over images; {SIGNIFICANT}: the interval leaves out 0."
        )
    lines.append(
        "FLOPs are 2 MACs of one image; MAC MB is ShuffleNetV2's memory access cost of the"
        " convolutions; activations: the most that lives at once."
    )
    if measurement is not None:
        if len(results["rows"]) > 1:
            lines.append(
                f"Speed-up: {_escaped(results['baseline'] or NOTHING)}'s FLOPs, and its median"
                " time, over the row's own."
            )
        here = device_text(measurement["device"], measurement["threads"])
        lines.append(f"Times on {here}, all models in turn, BN folded, without decoding and NMS.")
        device = protocol.get("device") or {}
        there = device_text(str(device.get("name")), device.get("threads"))
        if device and there != here:
            lines.append(f"Not where the runs were made: that was on {_escaped(there)}.")
    lines += [_escaped(line) for line in _code_notes(commits_of(results["rows"]))]
    lines.append(_code(results["command"]))
    return [line + "\n" for line in lines]


def console(results: Results) -> str:
    """The table for people as aligned text."""
    shown = columns(results)
    cells: Sequence[Sequence[str]] = [
        [printable(column.head) for column in shown],
        *([printable(column.cell(row)) for column in shown] for row in results["rows"]),
    ]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )
