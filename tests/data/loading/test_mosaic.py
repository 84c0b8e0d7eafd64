"""The mosaic: pixels and boxes in the right quadrant, cut at the canvas."""

from __future__ import annotations

import numpy as np

from data.loading.mosaic import mosaic4
from data.loading.sample import Sample
from utils.seeding import generator

SIZE = 64
SHADES = (40, 80, 160, 240)


def tile(number, height=48, width=64, box=(8, 6, 56, 42)):
    """An image of one shade with a red rectangle, its box labelled with `number`."""
    image = np.full((height, width, 3), SHADES[number], dtype=np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = (255, 0, number)
    return Sample(image, np.array([box], dtype=np.float32), np.array([number]), f"image {number}")


def test_four_tiles_meet_at_a_centre_of_the_right_range():
    centres = []
    for seed in range(200):
        canvas = mosaic4([tile(n) for n in range(4)], SIZE, generator(seed))
        assert canvas.size == (2 * SIZE, 2 * SIZE)
        assert canvas.image_id == "image 0"
        shade = canvas.image[..., 1]
        rows, columns = np.nonzero(shade == SHADES[3])
        x, y = columns.min(), rows.min()  # the fourth tile begins at the centre
        centres.append((x, y))
        assert (shade[y - 1, x - 1], shade[y - 1, x], shade[y, x - 1]) == SHADES[:3]
    assert np.min(centres, 0).tolist() <= [SIZE // 2 + 3] * 2
    assert np.min(centres) >= SIZE // 2
    assert np.max(centres) <= 3 * SIZE // 2
    assert np.max(centres) >= 3 * SIZE // 2 - 3


def test_boxes_are_exactly_the_visible_pixels():
    for seed in range(50):
        canvas = mosaic4([tile(n) for n in range(4)], SIZE, generator(seed))
        for box, label in zip(canvas.boxes, canvas.labels, strict=True):
            mine = (canvas.image == (255, 0, label)).all(2)
            rows, columns = np.nonzero(mine)
            extent = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            np.testing.assert_array_equal(box, extent)
        seen = {int(n) for n in range(4) if (canvas.image == (255, 0, n)).all(2).any()}
        assert seen == set(canvas.labels.tolist())


def test_the_rest_is_grey():
    small = [tile(n, 12, 16, (2, 2, 9, 9)) for n in range(4)]
    canvas = mosaic4(small, SIZE, generator(3))
    assert (canvas.image == 114).all(2).sum() == (2 * SIZE) ** 2 - 4 * 12 * 16


def test_images_without_boxes_and_polygons_go_along():
    empty = Sample(
        np.zeros((48, 64, 3), dtype=np.uint8), np.zeros((0, 4), np.float32), np.zeros(0, int), 0
    )
    outline = np.array([[8, 6], [56, 6], [56, 42], [8, 42]], dtype=np.float32)
    shaped = Sample(tile(2).image, tile(2).boxes, tile(2).labels, 2, (outline,))
    canvas = mosaic4([empty, empty, shaped, empty], SIZE, generator(5))
    assert canvas.labels.tolist() == [2]
    corners = canvas.segments[0]
    np.testing.assert_array_equal(np.hstack((corners.min(0), corners.max(0))), canvas.boxes[0])
