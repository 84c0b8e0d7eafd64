"""Boxes follow their pixels; amounts of zero change nothing; rules by hand."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from data.loading.sample import Sample
from data.loading.transforms import (
    affine,
    copy_paste,
    flip,
    hsv,
    hsv_gains,
    keep,
    mixup,
    mosaic4,
    mosaic_centre,
    random_matrix,
    source_window,
    warp,
)
from utils.hyp import Hyperparameters, load_hyp
from utils.seeding import generator

NONE = load_hyp("no-augmentation")


def random_affine(sample, size, rng, hyp):
    return affine(sample, random_matrix(sample.size, size, rng, hyp), size)


def painted(box=(30, 20, 81, 64), polygon=False):
    """Black with one red rectangle, and the box of exactly these pixels."""
    image = np.zeros((90, 120, 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2, 0] = 255
    boxes = np.array([box], dtype=np.float32)
    return Sample(
        image, boxes, np.array([3]), "painted", (polygon_of(boxes[0]) if polygon else None,)
    )


def polygon_of(box):
    return box[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2)


def extent(outline):
    return np.hstack((outline.min(0), outline.max(0)))


def red_extent(image):
    rows, columns = np.nonzero(image[..., 0] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def assert_follows(sample, tolerance=1.0):
    np.testing.assert_allclose(sample.boxes[0], red_extent(sample.image), atol=tolerance)


def noise(height, width, seed=0):
    small = generator(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("polygon", [False, True])
@pytest.mark.parametrize(
    ("size", "tolerance", "amounts"),
    [
        ((100, 110), 1, {"scale": 0.5}),
        ((100, 110), 1, {"translate": 0.3}),
        ((100, 110), 1, {"scale": 0.5, "translate": 0.3}),
        ((100, 110), 1, {"shear": 20.0}),
        ((100, 110), 1, {"perspective": 0.001}),
        # thin tips of a turned rectangle are half covered pixels
        ((200, 200), 1.5, {"degrees": 45.0, "shear": 10.0, "perspective": 0.0005, "scale": 0.4}),
    ],
)
def test_affine_boxes_follow_the_pixels(amounts, size, tolerance, polygon):
    hyp = replace(NONE, **amounts)
    for seed in range(25):
        sample = random_affine(painted(polygon=polygon), size, generator(seed), hyp)
        assert sample.size == size
        if len(sample.labels):
            assert_follows(sample, tolerance)


def test_affine_of_no_amounts_is_the_same_image_or_its_centre():
    sample = replace(painted(), image=noise(90, 120))
    same = random_affine(sample, (90, 120), generator(0), NONE)
    np.testing.assert_array_equal(same.image, sample.image)
    np.testing.assert_array_equal(same.boxes, sample.boxes)
    assert same.labels.tolist() == [3]
    centre = random_affine(sample, (50, 60), generator(0), NONE)
    np.testing.assert_array_equal(centre.image, sample.image[20:70, 30:90])
    np.testing.assert_array_equal(centre.boxes, [[0, 0, 51, 44]])


@pytest.mark.parametrize("shear", [0, 0.1])
def test_affine_beyond_the_image_is_grey(shear):
    far = np.array([[1.0, shear, 500], [0, 1, 0], [0, 0, 1]])
    assert (warp(painted().image, far, (40, 50)) == 114).all()


def test_crop_and_resize_equals_the_warp_by_the_same_matrix():
    image = noise(240, 320)
    hyp = replace(NONE, scale=0.5, translate=0.1)
    for seed in range(20):
        matrix = random_matrix((240, 320), (160, 160), generator(seed), hyp)
        corners = np.linalg.inv(matrix) @ np.array([[0, 0, 1], [160, 160, 1]]).T
        np.testing.assert_allclose(corners, np.round(corners), atol=1e-9)  # whole source pixels
        fast = warp(image, matrix, (160, 160))
        half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])
        pixels = (np.linalg.inv(half) @ matrix @ half)[:2]
        slow = cv2.warpAffine(image, pixels, (160, 160), borderValue=(114, 114, 114))
        inside = cv2.erode((slow != 114).all(2).astype(np.uint8), np.ones((5, 5))).astype(bool)
        assert inside.mean() > 0.2
        assert np.abs(fast.astype(int) - slow)[inside].max() <= 8
        assert np.abs(fast.astype(int) - slow)[inside].mean() < 1


def test_matrix_keeps_its_promises():
    hyp = replace(NONE, scale=0.5, translate=0.1)
    scales, centres = [], []
    for seed in range(300):
        matrix = random_matrix((640, 640), (320, 320), generator(seed), hyp)
        scales.append(matrix[0, 0])
        centres.append((matrix @ [320, 320, 1])[:2])
    assert 0.495 <= min(scales) < 0.52  # rounded to whole source pixels
    assert 1.48 < max(scales) <= 1.505
    assert np.min(centres) >= 0.4 * 320 - 1
    assert np.max(centres) <= 0.6 * 320 + 1


@pytest.mark.parametrize(("axis", "expected"), [(0, [39, 20, 90, 64]), (1, [30, 26, 81, 70])])
def test_flips_move_box_and_polygon_and_undo_themselves(axis, expected):
    for sample in (painted(), painted(polygon=True)):
        flipped = flip(sample, axis)
        np.testing.assert_array_equal(flipped.boxes, [expected])
        assert_follows(flipped, 0)
        if flipped.segments[0] is not None:
            np.testing.assert_array_equal(extent(flipped.segments[0]), expected)
        back = flip(flipped, axis)
        np.testing.assert_array_equal(back.image, sample.image)
        np.testing.assert_array_equal(back.boxes, sample.boxes)


@pytest.mark.parametrize(
    ("colour", "hyp", "channel", "low", "high"),
    [
        (
            (100, 100, 100),
            Hyperparameters(),
            2,
            (60, 64),
            (136, 140),
        ),  # 100 +- 40 %, and stays grey
        # hue 120 degrees, 60 in OpenCV's steps
        ((0, 200, 0), replace(NONE, hsv_h=0.1), 0, (53, 57), (63, 66)),
    ],
)
def test_hsv_by_hand(colour, hyp, channel, low, high):
    sample = replace(painted(), image=np.full((4, 4, 3), colour, np.uint8))
    before = cv2.cvtColor(sample.image, cv2.COLOR_RGB2HSV)[0, 0]
    levels = []
    for seed in range(200):
        changed = cv2.cvtColor(
            hsv(sample, hsv_gains(generator(seed), hyp), np.empty_like(sample.image)).image,
            cv2.COLOR_RGB2HSV,
        )
        assert (changed == changed[0, 0]).all()
        assert changed[0, 0, 1] == before[1]
        levels.append(changed[0, 0, channel])
    assert low[0] <= min(levels) <= low[1]
    assert high[0] <= max(levels) <= high[1]


@pytest.mark.parametrize("amounts", [(0.015, 0.7, 0.4), (0.4, 1.0, 1.0), (1.0, 0.0, 1.0)])
def test_hsv_is_a_product_per_pixel(amounts):
    """Rounded down; hue modulo 180; saturation and value at most 255."""
    image = generator(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for seed in range(20):
        gains = 1 + generator(seed).uniform(-1, 1, 3) * amounts
        levels = cv2.cvtColor(image, cv2.COLOR_RGB2HSV) * gains
        levels[..., 0] %= 180
        expected = cv2.cvtColor(levels.clip(0, 255).astype(np.uint8), cv2.COLOR_HSV2RGB)
        found = hsv(replace(painted(), image=image), gains, np.empty_like(image)).image
        difference = np.abs(found.astype(int) - expected)
        assert (difference > 1).mean() < 0.01  # a step of hue may move another channel by 8
        assert difference.max() <= 9


def test_mixup_blends_and_keeps_all_boxes():
    white = painted(box=(0, 0, 10, 10))
    first = replace(white, image=np.full_like(white.image, 200), image_id="a")
    second = replace(painted(polygon=True), image=np.zeros_like(white.image), image_id="b")
    mixed = mixup(first, second, 0.6)
    assert (mixed.image == 120).all()
    np.testing.assert_array_equal(mixed.boxes, [[0, 0, 10, 10], [30, 20, 81, 64]])
    assert mixed.labels.tolist() == [3, 3]
    assert mixed.image_id == "a"
    assert mixed.segments[0] is None
    assert mixed.segments[1] is not None


@pytest.mark.parametrize("copies", [0, 1, 5, 10])
def test_copy_paste_copies_the_share_asked_for(copies):
    # red squares with polygons on the left half, so that mirrored copies hide nobody
    image = np.zeros((200, 100, 3), dtype=np.uint8)
    boxes = np.array([[5, 20 * i + 4, 17, 20 * i + 16] for i in range(10)], dtype=np.float32)
    for x1, y1, x2, y2 in boxes.astype(int):
        image[y1:y2, x1:x2, 0] = 255
    sample = Sample(image, boxes, np.arange(10), 0, tuple(map(polygon_of, boxes)))
    pasted = copy_paste(sample, generator(1), share=copies / 10)
    assert len(pasted.boxes) == len(pasted.labels) == len(pasted.segments) == 10 + copies
    np.testing.assert_array_equal(pasted.boxes[:10], boxes)
    for row in range(10, 10 + copies):
        x1, y1, x2, y2 = boxes[pasted.labels[row]]
        np.testing.assert_array_equal(pasted.boxes[row], [100 - x2, y1, 100 - x1, y2])
        np.testing.assert_array_equal(extent(pasted.segments[row]), pasted.boxes[row])
    assert (pasted.image[:, 50:, 0] > 127).sum() == copies * 12 * 12
    np.testing.assert_array_equal(pasted.image[:, :50], image[:, :50])


def test_copy_paste_needs_polygons_and_hides_no_others():
    sample = painted()
    assert copy_paste(sample, generator(0), share=1.0) is sample
    sample = painted(polygon=True, box=(40, 20, 81, 64))  # its mirror image lies on itself
    assert len(copy_paste(sample, generator(0), share=1.0).labels) == 1


# mosaics

SIZE = 64
SHADES = (40, 80, 160, 240)


def tile(number, height=48, width=64, box=(8, 6, 30, 30)):
    """An image of one shade with a red rectangle, its box labelled with `number`."""
    image = np.full((height, width, 3), SHADES[number], dtype=np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2] = (255, 0, number)
    boxes = np.array([box], dtype=np.float32)
    return Sample(image, boxes, np.array([number]), f"image {number}", (polygon_of(boxes[0]),))


def test_mosaic_has_four_tiles_that_meet_at_a_centre_of_the_right_range():
    centres = []
    for seed in range(200):
        canvas = mosaic4([tile(n) for n in range(4)], SIZE, mosaic_centre(SIZE, generator(seed)))
        assert canvas.size == (2 * SIZE, 2 * SIZE)
        assert canvas.image_id == "image 0"
        shade = canvas.image[..., 1]
        rows, columns = np.nonzero(shade == SHADES[3])
        x, y = columns.min(), rows.min()  # the fourth tile begins at the centre
        centres.append((x, y))
        assert (shade[y - 1, x - 1], shade[y - 1, x], shade[y, x - 1]) == SHADES[:3]
        for box, label, outline in zip(canvas.boxes, canvas.labels, canvas.segments, strict=True):
            np.testing.assert_array_equal(extent(outline), box)
            mine = (canvas.image == (255, 0, label)).all(2)
            np.testing.assert_allclose(box, red_extent(canvas.image * mine[..., None]), atol=1e-6)
        seen = {n for n in range(4) if (canvas.image == (255, 0, n)).all(2).any()}
        assert seen == set(canvas.labels.tolist())
    assert np.min(centres, 0).tolist() <= [SIZE // 2 + 3] * 2
    assert np.min(centres) >= SIZE // 2
    assert np.max(centres) <= 3 * SIZE // 2
    assert np.max(centres) >= 3 * SIZE // 2 - 3


@pytest.mark.parametrize("degrees", [0.0, 20.0])
def test_what_a_warp_does_not_see_need_not_be_drawn(degrees):
    hyp = replace(NONE, degrees=degrees, scale=0.9, translate=0.6, shear=degrees / 2)
    for seed in range(30):
        matrix = random_matrix((2 * SIZE, 2 * SIZE), (SIZE, SIZE), generator(seed), hyp)
        seen = source_window(matrix, (SIZE, SIZE))
        four = [tile(n) for n in range(4)]
        whole = affine(
            mosaic4(four, SIZE, mosaic_centre(SIZE, generator(seed))), matrix, (SIZE, SIZE)
        )
        window = mosaic4(four, SIZE, mosaic_centre(SIZE, generator(seed)), seen)
        window.image[: max(seen[1], 0)] = window.image[max(seen[3], 0) :] = 7
        window.image[:, : max(seen[0], 0)] = window.image[:, max(seen[2], 0) :] = 7
        part = affine(window, matrix, (SIZE, SIZE))
        np.testing.assert_array_equal(whole.image, part.image)
        np.testing.assert_array_equal(whole.boxes, part.boxes)


def test_mosaic_is_grey_elsewhere_and_takes_images_without_boxes():
    small = [tile(n, 12, 16, (2, 2, 9, 9)) for n in range(4)]
    for n in (0, 1, 3):
        small[n] = keep(small[n], np.array([False]))
    canvas = mosaic4(small, SIZE, mosaic_centre(SIZE, generator(3)))
    assert (canvas.image == 114).all(2).sum() == (2 * SIZE) ** 2 - 4 * 12 * 16
    assert canvas.labels.tolist() == [2]
