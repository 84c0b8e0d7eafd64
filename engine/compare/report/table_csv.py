"""results.json as table.csv, with all digits, for spreadsheets."""

from __future__ import annotations

import csv
import io
from typing import Any

from engine.compare.schema import Results, Row
from engine.measure.energy import NOT_MEASURED

FORMULA = ("=", "+", "-", "@", "\t", "\r")


def csv_table(results: Results) -> str:
    """table.csv: a line for each row, a column for each number, all digits."""
    lines = [_flat(row) for row in results["rows"]]
    heads = list(dict.fromkeys(key for line in lines for key in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, heads, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows({key: _inert(value) for key, value in line.items()} for line in lines)
    return text.getvalue()


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, as one that it does not."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value


def _flat(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {"model": row["name"], "status": row["status"]}
    line["seeds"] = " ".join("" if seed is None else str(seed) for seed in row["seeds"])
    return {**line, **_flat_accuracy(row), **_flat_costs(row), "cause": row["cause"] or ""}


def _flat_accuracy(row: Row) -> dict[str, Any]:
    line: dict[str, Any] = {}
    for key, found in (row["accuracy"] or {}).items():
        line |= {key: found["mean"], f"{key} sd": found["sd"]}
    for one in row["classes"] or ():
        line |= {f"AP of {one['name']}": one["AP"]["mean"]}
    for key, delta in (row["difference"] or {}).items():
        line |= {f"delta {key}": delta["delta"], f"delta {key} low": delta["low"]}
        line |= {f"delta {key} high": delta["high"]}
        line |= {f"delta {key} significant": delta["significant"]}
    if row["errors"] is not None:
        line |= {f"error {kind}": value for kind, value in row["errors"]["delta"].items()}
    return line


def _flat_costs(row: Row) -> dict[str, Any]:
    cost: Any = row["cost"] or {}
    line = {key: value for key, value in cost.items() if not isinstance(value, dict | list)}
    for section in ("backbone", "neck", "head"):
        part = cost.get(section) or {}
        line |= {f"{section} {key}": value for key, value in part.items()}
    for at in row["latency"]:
        batch = at["batch"]
        line |= {f"batch {batch} {key}": value for key, value in at.items() if key != "batch"}
    if row["speedup"] is not None:
        line["speed-up by FLOPs"] = row["speedup"]["flops"]
        for won in row["speedup"]["latency"]:
            line[f"speed-up at {won['batch']}"] = won["factor"]
    if row["latency"]:
        line["joules_per_image"] = (
            NOT_MEASURED if row["energy"] is None else row["energy"]["joules_per_image"]
        )
    training: Any = row["training"] or {}
    for key in ("images_per_second", "wait_share", "seconds"):
        if key in training:
            line |= {f"training {key}": training[key]["mean"]}
    return line
