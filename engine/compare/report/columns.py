"""The columns of a comparison, described once: table.md, table.csv and the report read them.

All functions take the plain values of results.json (engine/compare/schema.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Any

from engine.compare.schema import ACCURACY, FAILED, PROFILED
from engine.measure.energy import NOT_MEASURED

MEGA, GIGA = 1e6, 1e9
MINUTE, HOUR = 60, 3600
SCALES = {"M": MEGA, "G": GIGA, "MB": MEGA}  # by unit; 1 for all others
NUMBER, SPREAD, DIFFERENCE = "number", "spread", "difference"
DURATION = "duration"
SIGNIFICANT = "*"
ACCURACY_GROUP = "Accuracy"
IN_TABLE = ("AP", "AP50", "AP75", "APs", "APm", "APl")  # accuracy in table.md
COMPUTED = (  # key of the cost, label, head in table.md, title, unit, format, better
    ("params", "Params", "params M", "Parameters", "M", ".3f", "lower"),
    ("macs", "MACs", "", "MACs", "G", ".3f", "lower"),
    ("flops", "FLOPs", "GFLOPs", "FLOPs", "G", ".3f", "lower"),
    ("access_bytes", "Memory access", "MAC MB", "Memory access cost", "MB", ".1f", "lower"),
    ("bytes", "All traffic", "", "Memory traffic of all kernels", "MB", ".1f", "lower"),
    ("activation_bytes", "Activations", "activations MB", "Peak memory", "MB", ".1f", "lower"),
    ("intensity", "Intensity", "FLOP/B", "Arithmetic intensity", "FLOP/B", ".1f", "higher"),
)
GUIDELINES = (  # key of the cost, label, title, format
    ("unequal_widths", "G1 widths", "G1: access by unequal widths, 1 is best", ".3f"),
    ("groups", "G2 groups", "G2: access by group convolutions, 1 is best", ".3f"),
    ("kernels", "G3 kernels", "G3: kernels launched", ".0f"),
    ("branches", "G3 branches", "G3: parallel kernels", ".0f"),
    ("elementwise", "G4 element-wise", "G4: share of element-wise operations", ".3f"),
)
SECTION_COSTS = (("params", "params", "M"), ("macs", "MACs", "G"), ("flops", "FLOPs", "G"))
LATENCY, RATES = "Latency", "Throughput, memory and energy"
TIMED = {  # by group: key of the latency, label, head in table.md, unit, format, better
    LATENCY: (
        ("p50_ms", "Median", "ms/image at {}, p50 / p90", "ms/image", ".2f", "lower"),
        ("p90_ms", "90th percentile", "", "ms/image", ".2f", "lower"),
        ("least_ms", "Minimum", "", "ms/image", ".2f", "lower"),
    ),
    RATES: (
        ("images_per_second", "Throughput", "images/s at {}", "images/s", ".1f", "higher"),
        ("gflops_per_second", "Efficiency", "GFLOP/s at {}", "GFLOP/s", ".1f", "higher"),
        ("memory_bytes", "Peak memory", "", "MB", ".1f", "lower"),
    ),
}
TRAINING = (  # key of the training, label, head in table.md, unit, format, better
    ("images_per_second", "Training speed", "training images/s", "images/s", ".1f", "higher"),
    ("wait_share", "Waiting for data", "waiting for data", "", ".0%", "lower"),
    ("seconds", "Time to train", "time to train", "s", DURATION, "lower"),
)
DETAILS = {"difference", "classes", "errors"}  # parts of a row with many columns
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
        text = format(value / self.scale, self.format)
        return text if text.strip("+-0.%") else text.lstrip("+-")  # no negative zero


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
    rows = results["rows"]
    found = [*_accuracy(rows), *_computed(), *_measured(results)]
    if any(row["training"] for row in rows):
        for key, label, head, unit, digits, better in TRAINING:
            path, csv = f"training.{key}", f"training {key}"
            found.append(
                Column(path, "Training", label, csv, head, label, unit, digits, better, SPREAD)
            )
    return found


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


def _computed() -> Iterator[Column]:
    for key, label, head, title, unit, digits, better in COMPUTED:
        group = "Computed cost"
        yield Column(f"cost.{key}", group, label, key, head, title, unit, digits, better)
    for part in ("backbone", "neck", "head"):
        for key, name, unit in SECTION_COSTS:
            path, label, csv = f"cost.{part}.{key}", f"{part} {name}", f"{part} {key}"
            yield Column(path, "Cost by section", label, csv, unit=unit, better="lower")
    for key, label, title, digits in GUIDELINES:
        group = "Guidelines G1 to G4"
        yield Column(f"cost.{key}", group, label, key, "", title, "", digits, "lower")


def _measured(results: Plain) -> Iterator[Column]:
    """Latency by batch size, speed-ups, throughput, memory, energy; none if not measured."""
    batches = results["measurement"]["batches"] if results["measurement"] else []
    if not batches:
        return
    yield from _timed(batches, LATENCY)
    if len(results["rows"]) > 1:
        csv = "speed-up by FLOPs"
        title = "Speed-up computed from FLOPs"
        yield Column("speedup.flops", "Speed-up", "By FLOPs", csv, csv, title, format=".2f")
        for index, batch in enumerate(batches):
            path, csv = f"speedup.latency.{index}.factor", f"speed-up at {batch}"
            title, note = f"Speed-up measured at batch {batch}", f"batch {batch}"
            head = f"measured at {batch}"
            yield Column(path, "Speed-up", "Measured", csv, head, title, format=".2f", note=note)
    yield from _timed(batches, RATES)
    spent = {row["energy"]["batch"] for row in results["rows"] if row["energy"]}
    note = f" at {', '.join(map(str, sorted(spent)))}" if spent else ""
    for path, label, unit, head in (
        ("energy.joules_per_image", "Energy", "J/image", f"J/image{note}"),
        ("energy.watts", "Power", "W", ""),
    ):
        csv, title = path.split(".")[1], label + note
        yield Column(path, RATES, label, csv, head, title, unit, ".3g", "lower", note=note.strip())


def _timed(batches: Sequence[int], group: str) -> Iterator[Column]:
    """The columns of TIMED of one group; rates are in table.md for the largest batch size only."""
    latency = " latency" if group == LATENCY else ""
    for key, label, head, unit, digits, better in TIMED[group]:
        for index, batch in enumerate(batches):
            note, csv = f"batch {batch}", f"batch {batch} {key}"
            title = f"{label}{latency} at {note}"
            shown = head.format(batch) if latency or batch == max(batches) else ""
            path = f"latency.{index}.{key}"
            second = f"latency.{index}.p90_ms" if key == "p50_ms" else ""
            more = {"better": better, "note": note, "second": second}
            yield Column(path, group, label, csv, shown, title, unit, digits, **more)


def cell(column: Column, row: Plain, baseline: str | None) -> Cell:
    """A row's value in a column."""
    found = at(row, column.path)
    value = found
    if found is not None and column.kind != NUMBER:
        value = found["delta" if column.kind == DIFFERENCE else "mean"]
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
        return Cell(value, text, sd=found["sd"], spread=deviation, hint=hint)
    significant = found["significant"]
    interval = f"[{column.text(found['low'])}, {column.text(found['high'])}]"
    seeds = ", ".join(map(str, found["seeds"]))
    return Cell(
        value,
        text,
        spread=interval + (SIGNIFICANT if significant else ""),
        hint=f"{found['level']:.0%} interval of {found['resamples']} resamples of the images,"
        f" seeds {seeds}: {'' if significant else 'not '}significant",
        significant=significant,
    )


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
    if part == "training" or row["status"] == PROFILED:
        return "not trained"
    return NOT_MEASURED


def pareto_front(costs: Sequence[float | None], values: Sequence[float | None]) -> list[int]:
    """By rising cost the points that no other one beats: none is as cheap and better, or as good
    and cheaper.  Points without a cost or a value are left out.
    """
    points = [
        (cost, -value, index)
        for index, (cost, value) in enumerate(zip(costs, values, strict=True))
        if cost is not None and value is not None
    ]
    best: list[tuple[float, float, int]] = []
    for point in sorted(points):
        if not best or point[1] < best[-1][1] or point[:2] == best[-1][:2]:
            best.append(point)
    return [index for _, _, index in best]


def table_of(results: Plain) -> dict[str, Any]:
    """What the report draws: `columns`, each with the `cells` of the rows in turn, and `fronts`.

    `best` marks the best value of a column with different ones.  fronts[a][b]: the Pareto front of
    two columns, a before b, by their paths; none where both belong to DETAILS.
    """
    columns: list[dict[str, Any]] = []
    values: dict[str, list[float | None]] = {}  # by path; a higher one is better
    parts = ("accuracy", "difference")  # a difference follows its metric
    order = {f"{part}.{key}": index for index, key in enumerate(ACCURACY) for part in parts}
    for one in sorted(columns_of(results), key=lambda one: order.get(one.path, len(order))):
        cells = [cell(one, row, results["baseline"]) for row in results["rows"]]
        sign = 1 if one.better == "higher" else -1
        known = [None if found.value is None else sign * found.value for found in cells]
        distinct = {value for value in known if value is not None}
        best = max(distinct) if len(distinct) > 1 and one.kind != DIFFERENCE else None
        shown = {**asdict(one), "title": one.axis, "scale": one.scale}
        shown["cells"] = [
            {**asdict(found), "best": best is not None and value == best}
            for found, value in zip(cells, known, strict=True)
        ]
        if one.format == DURATION:
            shown["unit"] = ""  # every text names its own
        columns.append(shown)
        if distinct:
            values[one.path] = known
    fronts: dict[str, dict[str, list[int]]] = {path: {} for path in values}
    for first, second in combinations(values, 2):
        if not {first.split(".")[0], second.split(".")[0]} <= DETAILS:
            costs = [None if value is None else -value for value in values[first]]
            fronts[first][second] = pareto_front(costs, values[second])
    return {"columns": columns, "fronts": fronts}
