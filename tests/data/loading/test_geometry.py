"""Boxes and polygons under matrices, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data.loading.geometry import candidates, transform, whole_segments

IDENTITY = np.eye(3)
QUARTER = [[0, -1, 10], [1, 0, 0], [0, 0, 1]]  # (x, y) -> (10 - y, x)
TRIANGLE = np.array([[0, 0], [8, 0], [0, 8]], dtype=np.float32)
SQUARE = np.array([[2, 2], [6, 2], [6, 6], [2, 6]], dtype=np.float32)


def boxes_of(*rows):
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def move(x, y, scale_x=1.0, scale_y=1.0):
    return np.array([[scale_x, 0, x], [0, scale_y, y], [0, 0, 1]])


@pytest.mark.parametrize(
    ("matrix", "size", "boxes", "segments", "expected", "outlines"),
    [
        (IDENTITY, (10, 10), [], [], [], []),
        (QUARTER, (10, 10), [], [], [], []),
        (
            move(-4, 3, 2, 0.5),
            (5, 10),
            [[1, 2, 5, 8], [3, 0, 4, 4]],
            [None, None],
            [[0, 4, 6, 5], [2, 3, 4, 5]],
            [None, None],
        ),
        (move(100, 0), (50, 50), [[1, 2, 5, 8]], [None], [[0, 0, 0, 0]], [None]),
        (QUARTER, (10, 10), [[1, 2, 5, 8]], [None], [[2, 1, 8, 5]], [None]),
        # right of x = 4 only the tip of the triangle is left: (4, 0), (8, 0), (4, 4), moved by -4
        (
            move(-4, 0),
            (20, 20),
            [[0, 0, 8, 8], [0, 0, 8, 8]],
            [TRIANGLE, None],
            [[0, 0, 4, 4], [0, 0, 4, 8]],
            [{(0, 0), (4, 0), (0, 4)}, None],
        ),
        (  # with and without polygons, in order
            IDENTITY,
            (10, 10),
            [[1, 1, 3, 3], [2, 2, 6, 6], [102, 102, 106, 106], [0, 0, 9, 9]],
            [None, SQUARE, SQUARE + 100, None],
            [[1, 1, 3, 3], [2, 2, 6, 6], [0, 0, 0, 0], [0, 0, 9, 9]],
            [None, {(2, 2), (6, 2), (6, 6), (2, 6)}, None, None],
        ),
        (  # all leave the image
            move(50, 0),
            (10, 10),
            [[2, 2, 6, 6], [1, 1, 3, 3]],
            [SQUARE, None],
            [[0, 0, 0, 0], [0, 0, 0, 0]],
            [None, None],
        ),
        # depth 1 - x / 50: x / (1 - x / 50) is 12.5 at x = 10 and grows over all bounds towards
        # x = 50; y = 10 there is 12.5, and the image ends at y = 99
        (
            [[1, 0, 0], [0, 1, 0], [-0.02, 0, 1]],
            (99, 99),
            [[10, 10, 90, 20], [60, 0, 90, 9]],
            [None, None],
            [[12.5, 12.5, 99, 59.6], [0, 0, 0, 0]],
            [None, None],
        ),
    ],
)
def test_transform_by_hand(matrix, size, boxes, segments, expected, outlines):
    moved, left = transform(boxes_of(*boxes), tuple(segments), np.array(matrix, float), size)
    assert moved.dtype == np.float32
    np.testing.assert_allclose(moved, boxes_of(*expected), atol=1e-3)
    found = [None if outline is None else set(map(tuple, outline.tolist())) for outline in left]
    assert found == outlines


@pytest.mark.parametrize(
    ("after", "kept"),
    [
        ([0, 0, 2, 9], False),  # 2 px wide is not wider than 2
        ([0, 0, 2.1, 9], True),
        ([0, 0, 9, 2], False),
        ([0, 0, 5, 1.99], False),
        ([0, 0, 3, 299], True),
        ([0, 0, 3, 301], False),  # aspect 100.3
        ([0, 0, 0, 0], False),
    ],
)
def test_candidates_by_size_and_aspect(after, kept):
    assert candidates(boxes_of([0, 0, 4, 4]), boxes_of(after), 1.0).tolist() == [kept]


def test_candidates_by_area_kept_count_the_scale():
    before = boxes_of([0, 0, 20, 20])  # 400 px, at half the scale 100
    small, enough = boxes_of([0, 0, 3, 3]), boxes_of([0, 0, 4, 2.5])
    assert candidates(before, small, 0.25).tolist() == [False]
    assert candidates(before, enough, 0.25).tolist() == [True]
    assert candidates(before, enough, 1.0).tolist() == [False]


def test_polygon_of_a_part_does_not_speak_for_the_box():
    part = np.array([[0, 0], [4, 0], [4, 4]], dtype=np.float32)
    whole = np.array([[0, 0], [10, 0.5], [10, 10]], dtype=np.float32)
    boxes = boxes_of([0, 0, 10, 10], [0, 0, 10, 10], [0, 0, 1, 1])
    first, second, third = whole_segments(boxes, (part, whole, None))
    assert first is None
    assert second is whole
    assert third is None
