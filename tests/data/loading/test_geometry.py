"""Boxes and polygons under matrices, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from data.loading.geometry import candidates, transform, whole_segments

IDENTITY = np.eye(3)


def boxes_of(*rows):
    return np.array(rows, dtype=np.float32).reshape(-1, 4)


def test_no_boxes_stay_no_boxes():
    for matrix in (IDENTITY, np.array([[0.0, 1, 0], [-1, 0, 10], [0, 0, 1]])):
        boxes, segments = transform(boxes_of(), (), matrix, (10, 10))
        assert boxes.shape == (0, 4)
        assert boxes.dtype == np.float32
        assert segments == ()


def test_scale_and_shift_then_clip_by_hand():
    matrix = np.array([[2.0, 0, -4], [0, 0.5, 3], [0, 0, 1]])
    boxes, _ = transform(boxes_of([1, 2, 5, 8], [3, 0, 4, 4]), (None, None), matrix, (5, 10))
    np.testing.assert_allclose(boxes, [[0, 4, 6, 5], [2, 3, 4, 5]])


def test_a_box_outside_becomes_zero():
    matrix = np.array([[1.0, 0, 100], [0, 1, 0], [0, 0, 1]])
    boxes, _ = transform(boxes_of([1, 2, 5, 8]), (None,), matrix, (50, 50))
    np.testing.assert_array_equal(boxes, [[0, 0, 0, 0]])


def test_quarter_turn_by_hand():
    matrix = np.array([[0.0, -1, 10], [1, 0, 0], [0, 0, 1]])  # (x, y) -> (10 - y, x)
    boxes, _ = transform(boxes_of([1, 2, 5, 8]), (None,), matrix, (10, 10))
    np.testing.assert_allclose(boxes, [[2, 1, 8, 5]], atol=1e-6)


def test_polygon_decides_the_box_and_is_clipped_exactly():
    triangle = np.array([[0, 0], [8, 0], [0, 8]], dtype=np.float32)
    shift = np.array([[1.0, 0, -4], [0, 1, 0], [0, 0, 1]])
    boxes, (outline,) = transform(boxes_of([0, 0, 8, 8]), (triangle,), shift, (20, 20))
    # right of x = 4 only the tip is left: (4, 0), (8, 0), (4, 4), moved by -4
    np.testing.assert_allclose(boxes, [[0, 0, 4, 4]], atol=1e-6)
    assert {tuple(p) for p in outline.tolist()} == {(0, 0), (4, 0), (0, 4)}
    plain, _ = transform(boxes_of([0, 0, 8, 8]), (None,), shift, (20, 20))
    np.testing.assert_allclose(plain, [[0, 0, 4, 8]])


def test_boxes_with_and_without_polygons_keep_their_order():
    square = np.array([[2, 2], [6, 2], [6, 6], [2, 6]], dtype=np.float32)
    far = square + 100
    boxes, segments = transform(
        boxes_of([1, 1, 3, 3], [2, 2, 6, 6], [102, 102, 106, 106], [0, 0, 9, 9]),
        (None, square, far, None),
        IDENTITY,
        (10, 10),
    )
    np.testing.assert_allclose(boxes, [[1, 1, 3, 3], [2, 2, 6, 6], [0, 0, 0, 0], [0, 0, 9, 9]])
    assert segments[0] is None
    np.testing.assert_allclose(segments[1], square)
    assert segments[2] is None
    assert segments[3] is None


def test_polygons_that_all_leave_the_image():
    square = np.array([[2, 2], [6, 2], [6, 6], [2, 6]], dtype=np.float32)
    away = np.array([[1.0, 0, 50], [0, 1, 0], [0, 0, 1]])
    boxes, segments = transform(
        boxes_of([2, 2, 6, 6], [1, 1, 3, 3]), (square, None), away, (10, 10)
    )
    np.testing.assert_array_equal(boxes, np.zeros((2, 4)))
    assert segments == (None, None)


def test_perspective_cuts_what_lies_behind_the_viewer():
    matrix = np.array([[1.0, 0, 0], [0, 1, 0], [-0.02, 0, 1]])  # depth 1 - x / 50
    boxes, _ = transform(boxes_of([10, 10, 90, 20], [60, 0, 90, 9]), (None, None), matrix, (99, 99))
    # x / (1 - x / 50) is 12.5 at x = 10 and grows over all bounds towards x = 50;
    # y = 10 there is 12.5, and the image ends at y = 99
    np.testing.assert_allclose(boxes[0], [12.5, 12.5, 99, 59.6], atol=1e-3)
    np.testing.assert_array_equal(boxes[1], [0, 0, 0, 0])


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
