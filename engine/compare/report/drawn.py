"""What the report draws: all columns with the cells of all rows, and the Pareto fronts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

from engine.compare.report.columns import DIFFERENCE, DURATION, Plain, cell, columns_of
from engine.compare.schema import ACCURACY

DETAILS = {"difference", "classes", "errors"}  # parts of a row with many columns


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
        if distinct:
            values[one.path] = known
        marked = len(distinct) > 1 and one.kind != DIFFERENCE
        shown = [
            {**asdict(found), "best": marked and value == max(distinct)}
            for found, value in zip(cells, known, strict=True)
        ]
        unit = "" if one.format == DURATION else one.unit  # every text names its own
        more = {"title": one.axis, "unit": unit, "scale": one.scale, "cells": shown}
        more["essential"] = one.essential
        columns.append({**asdict(one), **more})
    fronts: dict[str, dict[str, list[int]]] = {path: {} for path in values}
    for first, second in combinations(values, 2):
        if not {first.split(".")[0], second.split(".")[0]} <= DETAILS:
            costs = [None if value is None else -value for value in values[first]]
            fronts[first][second] = pareto_front(costs, values[second])
    return {"columns": columns, "fronts": fronts}
