"""results.json as text: table.md, table.csv and the console.

All functions take the plain values of results.json (engine/compare/schema.py).
"""

from __future__ import annotations

import csv
import io
import re
from textwrap import fill
from typing import Any

from engine.compare.report.columns import (
    ACCURACY_GROUP,
    DIFFERENCE,
    Column,
    Plain,
    at,
    cell,
    columns_of,
    places,
)
from engine.compare.report.drawn import table_of
from engine.compare.report.notes import WARNING, lead, notes, summary
from engine.compare.schema import FAILED
from engine.measure.energy import NOT_MEASURED
from utils.terminal import printable

NOTHING = "-"
WIDTH, LONGEST_NAME = 120, 40  # characters on a terminal
# The columns of the terminal's table by weight; they appear while there is room.
BY_WEIGHT = (
    "accuracy.AP", "difference.AP", "cost.params", "cost.flops", "latency.*", "speedup.*",
    "accuracy.AP50", "training.*",
)  # fmt: skip
FORMULA = ("=", "+", "-", "@", "\t", "\r")
_ESCAPES = (
    ("\\", r"\\"), ("&", "&amp;"), ("<", "&lt;"), ("`", r"\`"),
    ("](", r"]\("), ("][", r"]\["), ("]:", r"]\:"),
)  # fmt: skip


def complete(results: Plain) -> dict[str, Any]:
    """results.json with what the report draws.

    lead: its first sentence; summary: the items at its head; notes: what the numbers mean;
    columns, fronts: see `drawn.table_of`.
    """
    texts = {"lead": lead(results), "summary": summary(results), "notes": notes(results)}
    return {**results, **texts, **table_of(results)}


def _cells(column: Column, results: Plain, *, brief: bool = False) -> list[str]:
    """A column for people: its head, then the rows; `brief` without second values."""
    texts = [column.brief or column.head if brief else column.head]
    for row in results["rows"]:
        found = cell(column, row, results["baseline"])
        second = at(row, column.second) if column.second and not brief else None
        text = found.text
        if found.value is None:
            text = text if text in {FAILED, NOT_MEASURED} else NOTHING
        elif column.group == ACCURACY_GROUP and found.spread:
            text = f"{text} {found.spread}"
        elif second is not None:
            text = f"{text} / {column.text(second)}"
        texts.append(text)
    return texts


def markdown(results: Plain) -> str:
    """table.md: the rows, and what they mean."""
    columns = [["model", *(row["name"] for row in results["rows"])]]
    columns += [_cells(column, results) for column in columns_of(results) if column.head]
    if any(row["cause"] for row in results["rows"]):
        columns.append(["failed", *(row["cause"] or "" for row in results["rows"])])
    heads, *rows = zip(*columns, strict=True)
    lines = ["| " + " | ".join(map(_escaped, heads)) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        lines.append("| " + " | ".join(_escaped(text).replace("|", r"\|") for text in row) + " |")
    for note in notes(results):
        start = f"**{WARNING.rstrip(': ')}**: " if note.startswith(WARNING) else ""
        lines += ["", start + _escaped(note.removeprefix(WARNING))]
    return "\n".join([*lines, "", _code(results["command"]), ""])


def _escaped(text: str) -> str:
    """Text that Markdown takes as text, not as HTML, code, links or images.

    A bracket alone is none of these, so the usual heads and intervals stay as they are; an address
    that stands alone may be a link, to what it shows.
    """
    for sign, written in _ESCAPES:
        text = text.replace(sign, written)
    return printable(text)


def _code(text: str) -> str:
    """A code span, fenced by more backticks than the text has in a row."""
    text = printable(text)
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence, space = "`" * (longest + 1), " " if longest else ""
    return f"{fence}{space}{text}{space}{fence}"


def console(results: Plain) -> str:
    """The essential columns as aligned text of at most WIDTH characters a line, then the causes."""
    rows = results["rows"]
    names = ["model", *(printable(row["name"]) for row in rows)]
    half = LONGEST_NAME // 2
    names = [x if len(x) <= LONGEST_NAME else f"{x[: half - 1]}…{x[-half:]}" for x in names]
    found = {column.path: column for column in columns_of(results) if column.essential}
    order = [path for part in BY_WEIGHT for path in found if re.fullmatch(part, path)]
    shown, room = set(), WIDTH - max(map(len, names))
    texts = {path: _cells(column, results, brief=True) for path, column in found.items()}
    for path in order:
        width = 2 + max(map(len, texts[path]))
        if width <= room:
            room -= width
            shown.add(path)
    columns = [[text.ljust(max(map(len, names))) for text in names]]
    for cells in (texts[path] for path in found if path in shown):
        columns.append([text.rjust(max(map(len, cells))) for text in cells])
    lines = ["  ".join(line).rstrip() for line in zip(*columns, strict=True)]
    causes = (f"{row['name']}: {row['cause']}" for row in rows if row["cause"])
    return "\n".join([*lines, *(fill(printable(text), WIDTH) for text in causes)])


def csv_table(results: Plain) -> str:
    """table.csv, for spreadsheets: a line for each row, a column for each number, all digits."""
    columns, lines = columns_of(results), []
    for row in results["rows"]:
        line: dict[str, Any] = {"model": row["name"], "status": row["status"]}
        line["seeds"] = " ".join("" if seed is None else str(seed) for seed in row["seeds"])
        line |= {key: at(row, f"cost.{key}") for key in ("image_size", "classes")}
        for column in columns:
            line[column.csv] = cell(column, row, None).value
            if column.group == ACCURACY_GROUP:
                more = ("low", "high", "significant") if column.kind == DIFFERENCE else ("sd",)
                line |= {f"{column.csv} {key}": at(row, f"{column.path}.{key}") for key in more}
        taken = places(results["measurement"]) if row["latency"] else []
        for note, one in zip(taken, row["latency"], strict=True):
            for key in ("cause", "memory_source", "layout", "other_p50_ms"):
                line[f"{note.replace(',', '')} {key}"] = one[key]
        if row["latency"] and row["energy"] is None:
            line["joules_per_image"] = NOT_MEASURED
        line["cause"] = row["cause"] or ""
        lines.append({key: _inert(value) for key, value in line.items()})
    text = io.StringIO()
    heads = list(dict.fromkeys(key for line in lines for key in line))
    writer = csv.DictWriter(text, heads, lineterminator="\n", restval="")
    writer.writeheader()
    writer.writerows(lines)
    return text.getvalue()


def _inert(value: Any) -> Any:
    """A text that a spreadsheet would take for a formula, as one that it does not."""
    return f"'{value}" if isinstance(value, str) and value.startswith(FORMULA) else value
