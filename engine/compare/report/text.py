"""results.json as text: table.md, table.csv, the console, and the notes that go with them.

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
    GIGA,
    SIGNIFICANT,
    Column,
    Plain,
    at,
    cell,
    columns_of,
    table_of,
)
from engine.compare.schema import DONE, FAILED, PARTLY
from engine.measure.energy import NOT_MEASURED
from utils.terminal import printable

NOTHING = "-"
DIRTY = "-dirty"
SPLITS = {"train": "training", "val": "validation", "test": "test"}
WARNING = "Warning: "
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
    columns, fronts: see `columns.table_of`.
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
        for one in row["latency"]:
            for key in ("cause", "memory_source", "layout", "other_p50_ms"):
                line[f"batch {one['batch']} {key}"] = one[key]
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


def notes(results: Plain) -> list[str]:
    """What the table's numbers mean and how they were made; plain sentences."""
    protocol, baseline = results["protocol"], results["baseline"] or NOTHING
    lines = []
    if "data" in protocol:
        split, seeds = protocol.get("split", "val"), protocol.get("seeds")
        images = f"{protocol['data'][f'{split}_images']} {SPLITS[split]} images"
        over = f", mean ± sd over seeds {', '.join(map(str, seeds))}" if seeds else ""
        lines.append(
            f"{protocol['data']['name']}, {images}, {protocol['image_size']} px{over}. ΔAP"
            f" against {baseline}, paired bootstrap over images; {SIGNIFICANT}: the interval"
            " excludes 0."
        )
    lines.append(
        "FLOPs are 2 MACs of one image; MAC MB is ShuffleNetV2's memory access cost of the"
        " convolutions; activations: peak memory of the feature maps."
    )
    here, elsewhere = _devices(results)
    if here and len(results["rows"]) > 1:
        lines.append(
            f"Speed-up: FLOPs, and median time, of {baseline} divided by those of the row."
        )
    if here:
        lines.append(
            f"Times on {here}, {_timing(results)}, models in turn, BN folded, without decoding and"
            f" NMS. Memory layout, the faster one: {_layouts(results)}."
        )
    if elsewhere:
        lines.append(f"The runs were made on another device: {elsewhere}.")
    commits, made = _commits(results)
    if len(commits) == 1:
        lines.append(f"Runs by commit {commits[0]}.")
    if len(commits) > 1:
        lines.append(f"{WARNING}runs of {len(commits)} commits: {', '.join(commits)}.")
    if any(commit.endswith(DIRTY) for commit in commits):
        lines.append(f"{WARNING}some runs were made by code with uncommitted changes (-dirty).")
    absent = [key for key in protocol.get("versions", ()) if any(key not in one for one in made)]
    if absent:
        lines.append(f"Not recorded for all runs, made by an older version: {', '.join(absent)}.")
    return lines


def _commits(results: Plain) -> tuple[list[str], list[Plain]]:
    """The commits of the finished runs, each once, and the environments that name them.

    A commit is twelve digits, and '-dirty' for uncommitted changes.
    """
    runs = (run for row in results["rows"] for run in row["runs"])
    made = [run["environment"] for run in runs if run["status"] == DONE]
    names = dict.fromkeys(one.get("commit") or "unknown" for one in made)
    dirty = {one: DIRTY if one.endswith(DIRTY) else "" for one in names}
    return [one.removesuffix(DIRTY)[:12] + end for one, end in dirty.items()], made


def _devices(results: Plain) -> tuple[str, str]:
    """Where the costs were measured, and where the runs were made if elsewhere; '' for neither."""
    made, measured = results["protocol"].get("device"), results["measurement"]
    if measured is None:
        return "", ""

    def text(device: object, threads: int | None) -> str:
        return f"{device}" if threads is None else f"{device}, torch threads: {threads}"

    here = text(measured["device"], measured["threads"])
    there = text(made.get("name"), made.get("threads")) if made else here
    return here, "" if there == here else there


def _timing(results: Plain) -> str:
    """'fp16, CUDA graphs'."""
    settings = results["measurement"]["settings"]
    return f"{settings['dtype']}, {'CUDA graphs' if settings['graph'] else 'eager'}"


def _layouts(results: Plain) -> str:
    """The layout that most times were taken in, and the times that were taken in the other."""
    found: dict[str, list[str]] = {}
    for row in results["rows"]:
        for one in row["latency"]:
            if one["cause"] is None:
                found.setdefault(one["layout"], []).append(f"{row['name']} at {one['batch']}")
    usual, *others = sorted(found, key=lambda layout: -len(found[layout])) or [NOTHING]
    return "; ".join([usual, *(f"{layout} for {', '.join(found[layout])}" for layout in others)])


def lead(results: Plain) -> str:
    """The report's first sentence."""
    protocol, baseline = results["protocol"], results["baseline"]
    others = len(results["rows"]) - (1 if baseline else 0)
    against = f" against {baseline}" if baseline else ""
    data = f" on {protocol['data']['name']}" if "data" in protocol else ""
    runs = len(protocol.get("seeds") or ())
    each = f", {runs} run{'' if runs == 1 else 's'} each" if runs else ""
    return (
        f"{others} model{'' if others == 1 else 's'}{against}{data}{each}: accuracy, computed cost"
        " and measured cost under one protocol."
    )


def summary(results: Plain) -> list[dict[str, str]]:
    """The items at the head of the report: each with a name, a value and a detail ('' if none)."""
    rows, protocol, measured = results["rows"], results["protocol"], results["measurement"]
    states = [row["status"] for row in rows]
    trouble = [f"{states.count(state)} {state}" for state in (FAILED, PARTLY) if state in states]
    items = [("Models", str(len(rows)), ", ".join(trouble) or "all complete")]
    items.append(("Baseline", results["baseline"] or "none", ""))
    if data := protocol.get("data"):
        counts = {use: data.get(f"{split}_images") for split, use in SPLITS.items()}
        images = [f"{count:,} {use} images" for use, count in counts.items() if count is not None]
        items.append(("Data set", data["name"], ", ".join(images)))
    items.append(("Image size", f"{protocol['image_size']} px", ""))
    if training := protocol.get("training"):
        seeds = ", ".join(map(str, protocol.get("seeds") or ()))
        chosen = protocol.get("chosen")
        auto = f"; auto: {chosen['optimizer']}, recipe {chosen['hyp']!r}" if chosen else ""
        items.append(("Training", f"{training['epochs']} epochs", f"seeds {seeds}{auto}"))
    if measured:
        device, elsewhere = _devices(results)
        items.append(("Device", device, f"runs on {elsewhere}" if elsewhere else ""))
        items.append(("Timing", _timing(results), _layouts(results)))
    if commits := _commits(results)[0]:
        warnings = [f"warning: {len(commits)} commits in one table"] * (len(commits) > 1)
        warnings += ["warning: uncommitted changes"] * any(one.endswith(DIRTY) for one in commits)
        items.append(("Code", ", ".join(commits), "; ".join(warnings)))
    if measured and (peak := measured["device_peak"]):
        rates = [peak[f"{key}_per_second"] / GIGA for key in ("flops", "bytes")]
        flops, traffic = (f"{x:,.0f}" if x >= 100 else f"{x:.3g}" for x in rates)
        ridge = f"ridge {rates[0] / rates[1]:.3g} FLOP/B"
        items.append(("Device peak", f"{flops} GFLOP/s", f"{traffic} GB/s, {ridge}"))
    if measured:
        items.append(("Energy", measured["energy_source"] or NOT_MEASURED, ""))
    return [{"name": name, "value": value, "detail": detail} for name, value, detail in items]
