"""Pareto fronts: the rows of a comparison that no other row beats in two numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

DETAILS = {"difference", "classes", "errors"}  # parts of a row with many columns


def pareto_front(costs: Sequence[float | None], values: Sequence[float | None]) -> list[int]:
    """By rising cost the points that no other one beats: none is as cheap and better, or as good
    and cheaper.  Points without a cost or a value are left out."""
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


def fronts(values: Mapping[str, Sequence[float | None]]) -> dict[str, dict[str, list[int]]]:
    """[a][b]: the front of two columns, a before b; none where both belong to DETAILS.

    values: by the path of a column the values of the rows, higher ones better.
    """
    found: dict[str, dict[str, list[int]]] = {path: {} for path in values}
    for first, second in combinations(values, 2):
        if not {first.split(".")[0], second.split(".")[0]} <= DETAILS:
            costs = [None if value is None else -value for value in values[first]]
            found[first][second] = pareto_front(costs, values[second])
    return found
