"""Boxes and polygons under a 3x3 matrix, clipped to an image exactly.

Coordinates are continuous: pixel i of a row covers [i, i + 1).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

HORIZON = 1e-3  # minimum depth of a point: what perspective moves behind the viewer is clipped

BOX_TOLERANCE = 1.0  # pixels between a box and its polygon's extent, for rounding in the file

MIN_SIDE = 2.0  # YOLOv5's candidate rule: wider and higher than 2 px,
MAX_ASPECT = 100.0  # long side under 100 short sides,
MIN_AREA_KEPT = 0.1  # and at least this share of the area still visible


def transform(
    boxes: np.ndarray,
    segments: tuple[np.ndarray | None, ...],
    matrix: np.ndarray,
    size: tuple[int, int],
) -> tuple[np.ndarray, tuple[np.ndarray | None, ...]]:
    """Boxes (N, 4) xyxy and their polygons through `matrix`, clipped to (height, width) `size`.

    Returns float32 boxes (N, 4) and polygons in the same order.  A box with a polygon becomes the
    extent of what is left of the polygon, any other that of its four corners; where nothing is
    left it is 0, 0, 0, 0 (and the polygon None).
    """
    if not is_axis_aligned(matrix):
        return _by_corners(boxes, segments, matrix, size)
    exact = boxes * matrix[[0, 1, 0, 1], [0, 1, 0, 1]] + matrix[[0, 1, 0, 1], 2]
    clipped = np.minimum(np.maximum(exact, 0), (size[1], size[0]) * 2)
    moved = clipped.astype(np.float32)
    gone = (moved[:, 2:] <= moved[:, :2]).any(1)
    moved[gone] = 0
    if not any(outline is not None for outline in segments):
        return moved, segments
    scaled = list(scale_segments(segments, (matrix[0, 0], matrix[1, 1]), matrix[:2, 2]))
    for owner in np.flatnonzero(gone):
        scaled[owner] = None
    cut = np.flatnonzero((clipped != exact).any(1))
    crossing = [owner for owner in cut if scaled[owner] is not None]  # most polygons do not
    if crossing:
        outlines = tuple([scaled[owner] for owner in crossing])
        moved[crossing], left = _by_corners(moved[crossing], outlines, np.eye(3), size)
        for owner, outline in zip(crossing, left, strict=True):
            scaled[owner] = outline
    return moved, tuple(scaled)


def _by_corners(
    boxes: np.ndarray,
    segments: tuple[np.ndarray | None, ...],
    matrix: np.ndarray,
    size: tuple[int, int],
) -> tuple[np.ndarray, tuple[np.ndarray | None, ...]]:
    """`transform` by any matrix, all polygons at once: (T, 3) points, and whose each of them is."""
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    outlines = [c if s is None else s for c, s in zip(corners, segments, strict=True)]
    owner = np.repeat(np.arange(len(boxes)), [len(outline) for outline in outlines])
    flat = np.concatenate([*outlines, np.empty((0, 2))])
    whole = np.column_stack((flat, np.ones(len(flat)))) @ matrix.T
    if matrix[2, 0] or matrix[2, 1]:
        # depth >= HORIZON: the planes of `_clip` go through the origin, so it is shifted there
        horizon = np.array([0, 0, HORIZON])
        near, owner = _clip(whole - horizon, owner, (0, 0, 1))
        whole = near + horizon
    for plane in ((1, 0, 0), (-1, 0, size[1]), (0, 1, 0), (0, -1, size[0])):
        whole, owner = _clip(whole, owner, plane)
    points = (whole[:, :2] / whole[:, 2:]).clip(0, size[::-1]).astype(np.float32)
    moved = np.zeros((len(boxes), 4), dtype=np.float32)
    start = np.flatnonzero(np.diff(owner, prepend=-1))
    kept = owner[start]
    if len(kept):
        moved[kept, :2] = np.minimum.reduceat(points, start)
        moved[kept, 2:] = np.maximum.reduceat(points, start)
    left: list[np.ndarray | None] = [None] * len(boxes)
    for index, first, end in zip(kept, start, [*start[1:], len(points)], strict=False):
        if segments[index] is not None:
            left[index] = points[first:end]
    return moved, tuple(left)


def _clip(
    points: np.ndarray, owner: np.ndarray, plane: tuple[float, float, float]
) -> tuple[np.ndarray, np.ndarray]:
    """Closed polygons in the half-plane a*x + b*y + c*w >= 0 (Sutherland-Hodgman, all at once).

    points: (T, 3) float64, homogeneous; owner: (T,) int64, sorted, the polygon of each point.
    """
    depth = points @ np.array(plane)
    inside = depth >= 0
    if inside.all():
        return points, owner
    last = np.flatnonzero(np.diff(owner, append=-1))
    following = np.arange(1, len(depth) + 1)
    following[last] = np.concatenate(([0], last[:-1] + 1))
    crossing = inside != inside[following]
    count = inside.astype(np.int64) + crossing
    start = np.cumsum(count) - count
    clipped = np.empty((int(count.sum()), 3))
    clipped[start[inside]] = points[inside]
    at, to = np.flatnonzero(crossing), following[crossing]
    share = (depth[at] / (depth[at] - depth[to]))[:, None]
    clipped[start[at] + inside[at]] = points[at] * (1 - share) + points[to] * share
    return clipped, np.repeat(owner, count)


def scale_segments(
    segments: tuple[np.ndarray | None, ...],
    scale: ArrayLike,
    offset: ArrayLike = (0, 0),
) -> tuple[np.ndarray | None, ...]:
    """Polygons times (x, y) `scale` plus `offset`, float32; None stays None."""
    factor, shift = np.array(scale, dtype=np.float32), np.array(offset, dtype=np.float32)
    return tuple([None if outline is None else outline * factor + shift for outline in segments])


def whole_segments(
    boxes: np.ndarray, segments: tuple[np.ndarray | None, ...]
) -> tuple[np.ndarray | None, ...]:
    """The polygons without those that do not reach all sides of their box (None instead).

    An object that is seen in several parts may have the polygon of one of them only, which must
    not replace the box.
    """
    owners = [i for i, outline in enumerate(segments) if outline is not None]
    if not owners:
        return segments
    outlines = [outline for outline in segments if outline is not None]
    start = np.cumsum([0, *map(len, outlines)])[:-1]
    points = np.concatenate(outlines)
    extent = np.hstack((np.minimum.reduceat(points, start), np.maximum.reduceat(points, start)))
    whole = np.zeros(len(segments), dtype=bool)
    whole[owners] = (np.abs(extent - boxes[owners]) <= BOX_TOLERANCE).all(1)
    return tuple([s if fits else None for s, fits in zip(segments, whole, strict=True)])


def is_axis_aligned(matrix: np.ndarray) -> bool:
    """Whether the matrix only scales and shifts."""
    return not (matrix[0, 1] or matrix[1, 0] or matrix[2, 0] or matrix[2, 1])


def candidates(before: np.ndarray, after: np.ndarray, area_scale: float) -> np.ndarray:
    """(N,) bool: which boxes are still worth learning after a crop.

    `before` and `after` (N, 4) xyxy; `area_scale` is how much the transform enlarges areas.
    YOLOv5's rule: wider and higher than 2 px, aspect under 100, at least 10 % of the area kept.
    """
    width, height = (after[:, 2:] - after[:, :2]).T
    old = (before[:, 2] - before[:, 0]) * (before[:, 3] - before[:, 1]) * area_scale
    big = (width > MIN_SIDE) & (height > MIN_SIDE)
    slim = np.maximum(width, height) < MAX_ASPECT * np.minimum(width, height)
    return big & slim & (width * height >= MIN_AREA_KEPT * old)
