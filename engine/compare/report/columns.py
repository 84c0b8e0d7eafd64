"""The columns of a comparison, described once: table.md, table.csv and the report read them.

All functions take the plain values of results.json (engine/compare/schema.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine.compare.schema import ACCURACY, FAILED, PROFILED
from engine.measure.energy import NOT_MEASURED
from utils.terminal import formatted

MEGA, GIGA = 1e6, 1e9
MINUTE, HOUR = 60, 3600
SCALES = {"M": MEGA, "G": GIGA, "MB": MEGA}  # by unit; 1 for all others
NUMBER, SPREAD, DIFFERENCE = "number", "spread", "difference"
DURATION = "duration"
SIGNIFICANT = "*"
ACCURACY_GROUP = "Accuracy"
IN_TABLE = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # accuracy in table.md
# key, label, head in table.md ({}: the batch size), title, unit, format
COMPUTED = (
    ("params", "Params", "params M", "Parameters", "M", ".3f"),
    ("macs", "MACs", "", "", "G", ".3f"),
    ("flops", "FLOPs", "GFLOPs", "", "G", ".3f"),
    ("access_bytes", "Memory access", "MAC MB", "Memory access cost", "MB", ".1f"),
    ("bytes", "All traffic", "", "Memory traffic of all kernels", "MB", ".1f"),
    ("activation_bytes", "Activations", "activations MB", "Peak memory", "MB", ".1f"),
    ("intensity", "Intensity", "FLOP/B", "Arithmetic intensity", "FLOP/B", ".1f"),
)
SECTION = (("params", "params", "", "", "M", ".3f"), *COMPUTED[1:3])
GUIDELINES = (
    ("unequal_widths", "G1 widths", "", "G1: access by unequal widths, 1 is best", "", ".3f"),
    ("groups", "G2 groups", "", "G2: access by group convolutions, 1 is best", "", ".3f"),
    ("kernels", "G3 kernels", "", "G3: kernels launched", "", ".0f"),
    ("branches", "G3 branches", "", "G3: parallel kernels", "", ".0f"),
    ("elementwise", "G4 element-wise", "", "G4: share of element-wise operations", "", ".3f"),
)
LATENCY = (
    ("p50_ms", "Median", "ms/image at {}, p50 / p90", "Median latency", "ms/image", ".2f"),
    ("p90_ms", "90th percentile", "", "90th percentile latency", "ms/image", ".2f"),
    ("least_ms", "Minimum", "", "Minimum latency", "ms/image", ".2f"),
)
RATES = (
    ("images_per_second", "Throughput", "images/s at {}", "", "images/s", ".1f"),
    ("gflops_per_second", "Efficiency", "GFLOP/s at {}", "", "GFLOP/s", ".1f"),
    ("memory_bytes", "Peak memory", "", "", "MB", ".1f"),
)
TRAINING = (
    ("images_per_second", "Training speed", "training images/s", "", "images/s", ".1f"),
    ("wait_share", "Waiting for data", "waiting for data", "", "", ".0%"),
    ("seconds", "Time to train", "time to train", "", "s", DURATION),
)
PRETRAINED = (("pretrained", "Pretrained", "pretrained M", "Pretrained parameters", "M", ".3f"),)
HIGHER = {"pretrained", "intensity", "images_per_second", "gflops_per_second"}  # is better
Numbers = Sequence[tuple[str, str, str, str, str, str]]
ESSENTIAL = {
    "accuracy.AP", "accuracy.AP50", "difference.AP", "cost.params", "cost.flops",
    "speedup.latency.0.factor", "training.seconds",
}  # fmt: skip
Plain = Mapping[str, Any]


@dataclass(frozen=True)
class Column:
    """One number of every row, and how it is shown."""

    path: str  # of the value in a row of results.json, e.g. 'latency.1.p50_ms'; unique
    group: str  # heading over neighbouring columns
    label: str  # heading in the report
    csv: str  # heading in table.csv
    head: str = ""  # heading in table.md; '': not in that table
    title: str = ""  # on an axis and in lists
    unit: str = ""
    format: str = ".3f"  # as for format(), or DURATION
    better: str = "higher"  # or 'lower'
    kind: str = NUMBER  # SPREAD: mean and sd over seeds; DIFFERENCE: delta and its interval
    note: str = ""  # under the label
    second: str = ""  # path of a value that table.md shows after a '/'
    brief: str = ""  # heading on the terminal where it is not that of table.md

    @property
    def essential(self) -> bool:
        """Whether the report opens with it."""
        return self.path in ESSENTIAL or self.path.endswith(".p50_ms")

    @property
    def scale(self) -> float:
        """A value is shown divided by it."""
        return SCALES.get(self.unit, 1.0)

    @property
    def axis(self) -> str:
        """'Median latency at batch 1, ms/image'."""
        return ", ".join(filter(None, (self.title or self.label, self.unit)))

    def text(self, value: float) -> str:
        """The value as it is shown."""
        if self.format == DURATION:
            return duration(value)
        return formatted(value / self.scale, self.format)


@dataclass(frozen=True)
class Cell:
    """A row's value in a column. Without a value, `text` states why."""

    value: float | None  # as in the row, not scaled
    text: str
    sd: float | None = None
    spread: str = ""  # '± 0.006', or the interval '[+0.003, +0.040]*'
    hint: str = ""
    significant: bool = False


def at(record: Any, path: str) -> Any:
    """The value at 'a.b.0.c' of nested mappings and lists; None where there is none."""
    for key in path.split("."):
        if isinstance(record, Mapping):
            record = record.get(key)
        elif isinstance(record, Sequence) and int(key) < len(record):
            record = record[int(key)]
        else:
            return None
    return record


def duration(seconds: float) -> str:
    """'42 s', '12.5 min', '3.20 h'."""
    if seconds < 2 * MINUTE:
        return f"{seconds:.0f} s"
    return f"{seconds / MINUTE:.1f} min" if seconds < 2 * HOUR else f"{seconds / HOUR:.2f} h"


def columns_of(results: Plain) -> list[Column]:
    """All columns that this comparison has, in the order of the table."""
    rows, measurement = results["rows"], results["measurement"]
    found = [*_accuracy(rows), *_columns("Computed cost", "cost", "", COMPUTED)]
    for part in ("backbone", "neck", "head"):
        some = _columns("Cost by section", f"cost.{part}", f"{part} ", SECTION)
        found += [replace(column, label=f"{part} {column.label}", head="") for column in some]
    found += _columns("Guidelines G1 to G4", "cost", "", GUIDELINES)
    if measurement and measurement["batches"]:
        found += _measured(rows, places(measurement))
    if any(row["training"] for row in rows):
        found += _columns("Training", "training", "training ", TRAINING, kind=SPREAD)
    if any(row["model"]["pretrained"] is not None for row in rows):
        found += _columns("Training", "model", "", PRETRAINED)
    return found


def _columns(group: str, path: str, csv: str, numbers: Numbers, **more: str) -> Iterator[Column]:
    for key, label, head, title, unit, digits in numbers:
        name, better = f"{path}.{key}", "higher" if key in HIGHER else "lower"
        yield Column(name, group, label, csv + key, head, title, unit, digits, better, **more)


def _accuracy(rows: Sequence[Plain]) -> Iterator[Column]:
    if not any(row["accuracy"] or row["status"] == FAILED for row in rows):
        return
    for key in ACCURACY:
        head = key if key in IN_TABLE else ""
        yield Column(f"accuracy.{key}", ACCURACY_GROUP, key, key, head, kind=SPREAD)
    for key in next((row["difference"] for row in rows if row["difference"]), ["AP"]):
        path, label, csv = f"difference.{key}", f"Δ{key}", f"delta {key}"
        head, title = "ΔAP [95 %]" if key == "AP" else "", f"Δ{key} against the baseline"
        more = {"format": "+.3f", "kind": DIFFERENCE}
        yield Column(path, ACCURACY_GROUP, label, csv, head, title, **more)
    classes: list[Plain] = next((row["classes"] for row in rows if row["classes"]), [])
    for key in ("AP", "AP50"):
        for index, one in enumerate(classes):
            name, title = one["name"], f"{key} of {one['name']}"
            path = f"classes.{index}.{key}"
            yield Column(path, f"{key} by class", name, title, title=title, kind=SPREAD)
    errors: Plain = next((row["errors"] for row in rows if row["errors"]), {})
    for part in ("delta", "special"):
        for kind in errors.get(part, ()):
            path, title = f"errors.{part}.{kind}", f"AP50 lost to: {kind}"
            csv = f"error {kind}"
            yield Column(path, "AP50 lost to", kind, csv, title=title, better="lower")


def places(measurement: Plain) -> list[str]:
    """Where each of Row.latency was taken: 'batch 1', with other runtimes 'batch 1, openvino'."""
    runtimes, batches = measurement["runtimes"], measurement["batches"]
    named = [f", {name}" for name in runtimes] if runtimes != ["torch"] else [""]
    return [f"batch {size}{name}" for name in named for size in batches]


def _measured(rows: Sequence[Plain], notes: Sequence[str]) -> Iterator[Column]:
    """Latency by batch size and runtime, speed-ups, throughput, memory, energy."""
    yield from _timed(notes, "Latency", LATENCY)
    if len(rows) > 1:
        csv, title = "speed-up by FLOPs", "Speed-up computed from FLOPs"
        yield Column("speedup.flops", "Speed-up", "By FLOPs", csv, csv, title, format=".2f")
        for index, note in enumerate(notes):
            at = note.removeprefix("batch ")
            path, csv = f"speedup.latency.{index}.factor", f"speed-up at {at}"
            title, head = f"Speed-up measured at {note}", f"measured at {at}"
            more = {"format": ".2f", "note": note, "brief": f"speed-up at {at}"}
            yield Column(path, "Speed-up", "Measured", csv, head, title, **more)
    group = "Throughput, memory and energy"
    yield from _timed(notes, group, RATES)
    spent = sorted({row["energy"]["batch"] for row in rows if row["energy"]})
    note = f"at {', '.join(map(str, spent))}" if spent else ""
    head, energy, power = (f"{text} {note}".rstrip() for text in ("J/image", "Energy", "Power"))
    numbers = (
        ("joules_per_image", "Energy", head, energy, "J/image", ".3g"),
        ("watts", "Power", "", power, "W", ".3g"),
    )
    yield from _columns(group, "energy", "", numbers, note=note)


def _timed(notes: Sequence[str], group: str, numbers: Numbers) -> Iterator[Column]:
    """Columns for each of `places`; rates are in table.md for the first runtime's largest batch."""
    sizes = [int(note.split(",")[0].removeprefix("batch ")) for note in notes]
    for number in numbers:
        for index, note in enumerate(notes):
            path, csv = f"latency.{index}", note.replace(",", "")
            if number[0] == "memory_bytes" and note.partition(", ")[2] not in {"", "torch"}:
                continue  # is not known there
            (column,) = _columns(group, path, f"{csv} ", [number], note=note)
            shown = numbers is LATENCY or index == sizes.index(max(sizes))
            at = note.removeprefix("batch ")
            yield replace(
                column,
                head=column.head.format(at) if shown else "",
                title=f"{column.title or column.label} at {note}",
                second=f"{path}.p90_ms" if number[0] == "p50_ms" else "",
                brief=f"ms at {at}" if number[0] == "p50_ms" else "",
            )


def cell(column: Column, row: Plain, baseline: str | None) -> Cell:
    """A row's value in a column."""
    found = at(row, column.path)
    key = {NUMBER: "", SPREAD: "mean", DIFFERENCE: "delta"}[column.kind]
    value = found[key] if key and found is not None else found
    if value is None:
        cause = at(row, column.path.rpartition(".")[0] + ".cause")
        return Cell(None, _absence(column, row, baseline, cause), hint=cause or "")
    text = column.text(value)
    if column.kind == NUMBER:
        return Cell(value, text)
    if column.kind == SPREAD:
        known = ["none" if one is None else column.text(one) for one in found["values"]]
        seeds = ", ".join(map(str, row["seeds"]))
        hint = f"seeds {seeds}: {', '.join(known)}" if len(known) > 1 else ""
        deviation = "" if found["sd"] is None else f"± {column.text(found['sd'])}"
        return Cell(value, text, found["sd"], deviation, hint)
    significant = found["significant"]
    mark, negation = (SIGNIFICANT, "") if significant else ("", "not ")
    interval = f"[{column.text(found['low'])}, {column.text(found['high'])}]{mark}"
    hint = (
        f"{found['level']:.0%} interval of {found['resamples']} resamples of the images,"
        f" seeds {', '.join(map(str, found['seeds']))}: {negation}significant"
    )
    return Cell(value, text, None, interval, hint, significant)


def _absence(column: Column, row: Plain, baseline: str | None, cause: str | None) -> str:
    """Why a row has no value in a column."""
    part = column.path.split(".")[0]
    if part in {"difference", "speedup"} and row["name"] == baseline:
        return "baseline"
    if part in {"latency", "energy", "speedup"}:
        return FAILED if cause else NOT_MEASURED
    if row[part] and part != "difference":
        return "not defined"
    if row["status"] == FAILED:
        return FAILED
    return "not trained" if part == "training" or row["status"] == PROFILED else NOT_MEASURED
