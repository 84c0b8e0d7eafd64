"""Boxes and polygons under matrices, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data.loading.geometry import candidates, transform, whole_segments

QUARTER = np.array([[0.0, -1, 10], [1, 0, 0], [0, 0, 1]])  # (x, y) -> (10 - y, x)
TILT = np.array([[1, 0, 0], [0, 1, 0], [-0.02, 0, 1]])
TRIANGLE = [(0, 0), (8, 0), (0, 8)]
SQUARE = [(2, 2), (2, 6), (6, 6), (6, 2)]
GONE = [0, 0, 0, 0]


def boxes_of(*rows):
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def move(x, y, scale_x=1.0, scale_y=1.0):
    return np.array([[scale_x, 0, x], [0, scale_y, y], [0, 0, 1]])


@pytest.mark.parametrize(
    ("matrix", "size", "rows"),  # of a row: box, polygon, expected box, expected polygon
    [
        (np.eye(3), (10, 10), []),
        (QUARTER, (10, 10), []),
        (QUARTER, (10, 10), [([1, 2, 5, 8], None, [2, 1, 8, 5], None)]),
        (move(-4, 3, 2, 0.5), (5, 10), [([1, 2, 5, 8], None, [0, 4, 6, 5], None)]),
        (move(-4, 3, 2, 0.5), (5, 10), [([3, 0, 4, 4], None, [2, 3, 4, 5], None)]),
        (move(100, 0), (50, 50), [([1, 2, 5, 8], None, GONE, None)]),
        # right of x = 4 only the tip of the triangle is left: (4, 0), (8, 0), (4, 4), moved by -4
        (move(-4, 0), (20, 20), [([0, 0, 8, 8], TRIANGLE, [0, 0, 4, 4], [(0, 0), (0, 4), (4, 0)])]),
        (move(-4, 0), (20, 20), [([0, 0, 8, 8], None, [0, 0, 4, 8], None)]),
        (
            move(50, 0),
            (10, 10),
            [([2, 2, 6, 6], SQUARE, GONE, None), ([1, 1, 3, 3], None, GONE, None)],
        ),
        (  # with and without polygons, in order
            np.eye(3),
            (10, 10),
            [
                ([1, 1, 3, 3], None, [1, 1, 3, 3], None),
                ([2, 2, 6, 6], SQUARE, [2, 2, 6, 6], sorted(SQUARE)),
                ([102, 102, 106, 106], np.array(SQUARE) + 100, GONE, None),
                ([0, 0, 9, 9], None, [0, 0, 9, 9], None),
            ],
        ),
        # depth 1 - x / 50: x / (1 - x / 50) is 12.5 at x = 10 and grows over all bounds towards
        # x = 50; y = 10 there is 12.5, and the image ends at y = 99
        (TILT, (99, 99), [([10, 10, 90, 20], None, [12.5, 12.5, 99, 59.6], None)]),
        (TILT, (99, 99), [([60, 0, 90, 9], None, GONE, None)]),
    ],
)
def test_transform_by_hand(matrix, size, rows):
    segments = tuple(None if row[1] is None else np.array(row[1], np.float32) for row in rows)
    boxes, left = transform(boxes_of(*[row[0] for row in rows]), segments, matrix, size)
    assert boxes.dtype == np.float32
    np.testing.assert_allclose(boxes, boxes_of(*[row[2] for row in rows]), atol=1e-3)
    outlines = [
        None if outline is None else sorted(map(tuple, outline.tolist())) for outline in left
    ]
    assert outlines == [row[3] for row in rows]


@pytest.mark.parametrize(
    ("before", "after", "scale", "kept"),
    [
        ([0, 0, 4, 4], [0, 0, 2, 9], 1, False),  # 2 px wide is not wider than 2
        ([0, 0, 4, 4], [0, 0, 2.1, 9], 1, True),
        ([0, 0, 4, 4], [0, 0, 9, 2], 1, False),
        ([0, 0, 4, 4], [0, 0, 5, 1.99], 1, False),
        ([0, 0, 4, 4], [0, 0, 3, 299], 1, True),
        ([0, 0, 4, 4], [0, 0, 3, 301], 1, False),  # aspect 100.3
        ([0, 0, 4, 4], GONE, 1, False),
        ([0, 0, 20, 20], [0, 0, 3, 3], 0.25, False),  # 400 px, at half the scale 100: 10 are kept
        ([0, 0, 20, 20], [0, 0, 4, 2.5], 0.25, True),
        ([0, 0, 20, 20], [0, 0, 4, 2.5], 1, False),
    ],
)
def test_candidates_by_size_aspect_and_area(before, after, scale, kept):
    assert candidates(boxes_of(before), boxes_of(after), scale).tolist() == [kept]


def test_polygon_of_a_part_does_not_speak_for_the_box():
    part = np.array([[0, 0], [4, 0], [4, 4]], dtype=np.float32)
    whole = np.array([[0, 0], [10, 0.5], [10, 10]], dtype=np.float32)
    boxes = boxes_of([0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 1, 1])
    first, second, third = whole_segments(boxes, (part, whole, None))
    assert first is None
    assert second is whole
    assert third is None
