"""Boxes and polygons under a 3x3 matrix, clipped to an image exactly.

Coordinates are continuous: pixel i of a row covers [i, i + 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

HORIZON = 1e-3  # minimum depth of a point: what perspective moves behind the viewer is clipped

BOX_TOLERANCE = 1.0  # pixels between a box and its polygon's extent, for rounding in the file

MIN_SIDE = 2.0  # YOLOv5's candidate rule: wider and higher than 2 px,
MAX_ASPECT = 100.0  # long side under 100 short sides,
MIN_AREA_KEPT = 0.1  # and at least this share of the area still visible


@dataclass(frozen=True)
class Ragged:
    """Closed polygons of different lengths in one array; `owner` is sorted."""

    points: np.ndarray  # (T, 3) float64, homogeneous
    owner: np.ndarray  # (T,) int64, index of the polygon

    def clip(self, plane: tuple[float, float, float]) -> Ragged:
        """The part in the half-plane a*x + b*y + c*w >= 0 (Sutherland-Hodgman, all at once)."""
        depth = self.points @ np.array(plane)
        inside = depth >= 0
        if inside.all():
            return self
        last = np.flatnonzero(np.diff(self.owner, append=-1))
        following = np.arange(1, len(depth) + 1)
        following[last] = np.concatenate(([0], last[:-1] + 1))
        crossing = inside != inside[following]
        count = inside.astype(np.int64) + crossing
        start = np.cumsum(count) - count
        points = np.empty((int(count.sum()), 3))
        points[start[inside]] = self.points[inside]
        at, to = np.flatnonzero(crossing), following[crossing]
        share = (depth[at] / (depth[at] - depth[to]))[:, None]
        points[start[at] + inside[at]] = self.points[at] * (1 - share) + self.points[to] * share
        return Ragged(points, np.repeat(self.owner, count))


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
    moved, cut = _scale_and_shift(boxes, matrix, size)
    scaled = list(scale_segments(segments, (matrix[0, 0], matrix[1, 1]), matrix[:2, 2]))
    cut &= np.array([segment is not None for segment in segments], dtype=bool)
    for owner in np.flatnonzero((moved[:, 2:] <= moved[:, :2]).any(1)):
        scaled[owner] = None
        cut[owner] = False
    if cut.any():  # the polygons that cross an edge; most do not
        crossing = np.flatnonzero(cut)
        outlines = tuple(scaled[owner] for owner in crossing)
        moved[crossing], clipped = _by_corners(moved[crossing], outlines, np.eye(3), size)
        for owner, outline in zip(crossing, clipped, strict=True):
            scaled[owner] = outline
    return moved, tuple(scaled)


def _by_corners(
    boxes: np.ndarray,
    segments: tuple[np.ndarray | None, ...],
    matrix: np.ndarray,
    size: tuple[int, int],
) -> tuple[np.ndarray, tuple[np.ndarray | None, ...]]:
    """`transform` by any matrix, all polygons at once."""
    flat = _clip_to(_ragged(boxes, segments, matrix), matrix, size)
    points = (flat.points[:, :2] / flat.points[:, 2:]).clip(0, size[::-1]).astype(np.float32)
    moved = np.zeros((len(boxes), 4), dtype=np.float32)
    start = np.flatnonzero(np.diff(flat.owner, prepend=-1))
    kept = flat.owner[start]
    if len(kept):
        moved[kept, :2] = np.minimum.reduceat(points, start)
        moved[kept, 2:] = np.maximum.reduceat(points, start)
    left: list[np.ndarray | None] = [None] * len(boxes)
    for owner, first, end in zip(kept, start, [*start[1:], len(points)], strict=False):
        if segments[owner] is not None:
            left[owner] = points[first:end]
    return moved, tuple(left)


def scale_segments(
    segments: tuple[np.ndarray | None, ...],
    scale: ArrayLike,
    offset: ArrayLike = (0, 0),
) -> tuple[np.ndarray | None, ...]:
    """Polygons times (x, y) `scale` plus `offset`, float32; None stays None."""
    factor, shift = np.array(scale, dtype=np.float32), np.array(offset, dtype=np.float32)
    return tuple(None if outline is None else outline * factor + shift for outline in segments)


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
    return tuple(s if fits else None for s, fits in zip(segments, whole, strict=True))


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


def _scale_and_shift(
    boxes: np.ndarray, matrix: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The moved and clipped boxes, and which of them were cut."""
    moved = boxes * np.diag(matrix)[[0, 1, 0, 1]] + matrix[[0, 1, 0, 1], 2]
    clipped = moved.clip(0, (size[1], size[0]) * 2)
    cut = (clipped != moved).any(1)
    clipped[(clipped[:, 2:] <= clipped[:, :2]).any(1)] = 0
    return clipped.astype(np.float32), cut


def _ragged(
    boxes: np.ndarray, segments: tuple[np.ndarray | None, ...], matrix: np.ndarray
) -> Ragged:
    corners = boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2)
    outlines = [c if s is None else s for c, s in zip(corners, segments, strict=True)]
    lengths = [len(outline) for outline in outlines]
    flat = np.concatenate([*outlines, np.empty((0, 2))])
    points = np.column_stack((flat, np.ones(len(flat)))) @ matrix.T
    return Ragged(points, np.repeat(np.arange(len(boxes)), lengths))


def _clip_to(polygons: Ragged, matrix: np.ndarray, size: tuple[int, int]) -> Ragged:
    height, width = size
    if matrix[2, 0] or matrix[2, 1]:
        # depth >= HORIZON: the planes of `clip` go through the origin, so it is shifted there
        horizon = np.array([0, 0, HORIZON])
        near = Ragged(polygons.points - horizon, polygons.owner).clip((0, 0, 1))
        polygons = Ragged(near.points + horizon, near.owner)
    for plane in ((1, 0, 0), (-1, 0, width), (0, 1, 0), (0, -1, height)):
        polygons = polygons.clip(plane)
    return polygons
