"""Boxes follow their pixels; amounts of zero change nothing; rules by hand."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest

from data.loading.sample import Sample
from data.loading.transforms import (
    copy_paste,
    flip_left_right,
    flip_up_down,
    hsv,
    letterbox,
    mixup,
    random_affine,
    random_matrix,
    warp,
)
from utils.hyp import Hyperparameters, load_hyp
from utils.letterbox import Letterbox
from utils.seeding import generator

NONE = load_hyp("no-augmentation")


def painted(height=90, width=120, box=(30, 20, 81, 64), polygon=False):
    """Black with one red rectangle, and the box of exactly these pixels."""
    image = np.zeros((height, width, 3), dtype=np.uint8)
    x1, y1, x2, y2 = box
    image[y1:y2, x1:x2, 0] = 255
    outline = np.array([[x1, y1], [x2, y1], [x2, y2], [x1, y2]], dtype=np.float32)
    return Sample(
        image,
        np.array([box], dtype=np.float32),
        np.array([3], dtype=np.int64),
        "painted",
        (outline if polygon else None,),
    )


def red_extent(image):
    rows, columns = np.nonzero(image[..., 0] > 127)
    return [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]


def assert_follows(sample, tolerance=1.0):
    np.testing.assert_allclose(sample.boxes[0], red_extent(sample.image), atol=tolerance)


def noise(height, width, seed=0):
    small = generator(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return cv2.resize(small, (width, height), interpolation=cv2.INTER_CUBIC)


@pytest.mark.parametrize("size", [64, 160, 333])
@pytest.mark.parametrize("polygon", [False, True])
def test_letterbox_moves_box_and_polygon_with_the_pixels(size, polygon):
    sample = letterbox(painted(polygon=polygon), Letterbox.square((90, 120), size))
    assert sample.size == (size, size)
    assert_follows(sample)
    if polygon:
        corners = sample.segments[0]
        np.testing.assert_allclose(np.hstack((corners.min(0), corners.max(0))), sample.boxes[0])


@pytest.mark.parametrize("polygon", [False, True])
@pytest.mark.parametrize(
    "amounts",
    [
        {"scale": 0.5},
        {"translate": 0.3},
        {"scale": 0.5, "translate": 0.3},
        {"shear": 20.0},
        {"perspective": 0.001},
    ],
    ids=str,
)
def test_affine_boxes_follow_the_pixels(amounts, polygon):
    hyp = replace(NONE, **amounts)
    for seed in range(20):
        sample = random_affine(painted(polygon=polygon), (100, 110), generator(seed), hyp)
        assert sample.size == (100, 110)
        if len(sample.labels):
            assert_follows(sample)


def test_rotation_box_is_the_extent_of_the_corners():
    hyp = replace(NONE, degrees=45.0, shear=10.0, perspective=0.0005, scale=0.4, translate=0.2)
    for seed in range(30):
        for polygon in (False, True):
            sample = random_affine(painted(polygon=polygon), (200, 200), generator(seed), hyp)
            assert_follows(sample, 1.5)  # thin tips of a turned rectangle are half covered pixels


def test_affine_of_no_amounts_is_the_same_image():
    sample = replace(painted(), image=noise(90, 120))
    same = random_affine(sample, (90, 120), generator(0), NONE)
    np.testing.assert_array_equal(same.image, sample.image)
    np.testing.assert_array_equal(same.boxes, sample.boxes)
    assert same.labels.tolist() == [3]


def test_affine_of_no_amounts_to_a_smaller_size_is_the_centre():
    sample = replace(painted(), image=noise(90, 120))
    centre = random_affine(sample, (50, 60), generator(0), NONE)
    np.testing.assert_array_equal(centre.image, sample.image[20:70, 30:90])
    np.testing.assert_array_equal(centre.boxes, [[0, 0, 51, 44]])


def test_affine_beyond_the_image_is_grey_and_boxless():
    far = np.array([[1.0, 0, 500], [0, 1, 0], [0, 0, 1]])
    image, _ = warp(painted().image, far, (40, 50))
    assert (image == 114).all()
    turned = far.copy()
    turned[0, 1] = 0.1
    assert (warp(painted().image, turned, (40, 50))[0] == 114).all()


def test_crop_and_resize_equals_the_warp_by_the_same_matrix():
    image = noise(240, 320)
    hyp = replace(NONE, scale=0.5, translate=0.1)
    for seed in range(20):
        asked = random_matrix((240, 320), (160, 160), generator(seed), hyp)
        fast, matrix = warp(image, asked, (160, 160))
        # the window's corners moved by less than one source pixel
        corners = np.array([[0, 0, 1], [160, 160, 1]]).T
        moved = np.linalg.inv(matrix) @ corners - np.linalg.inv(asked) @ corners
        assert np.abs(moved[:2]).max() <= 1
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
    assert 0.5 <= min(scales) < 0.52
    assert 1.48 < max(scales) <= 1.5
    assert np.min(centres) >= 0.4 * 320
    assert np.max(centres) <= 0.6 * 320


def test_flips_move_box_and_polygon_and_undo_themselves():
    for flip in (flip_left_right, flip_up_down):
        for polygon in (False, True):
            sample = painted(polygon=polygon)
            flipped = flip(sample)
            assert_follows(flipped, 0)
            back = flip(flipped)
            np.testing.assert_array_equal(back.image, sample.image)
            np.testing.assert_array_equal(back.boxes, sample.boxes)
            if polygon:
                corners = flipped.segments[0]
                extent = np.hstack((corners.min(0), corners.max(0)))
                np.testing.assert_array_equal(extent, flipped.boxes[0])
    np.testing.assert_array_equal(flip_left_right(painted()).boxes, [[39, 20, 90, 64]])
    np.testing.assert_array_equal(flip_up_down(painted()).boxes, [[30, 26, 81, 70]])


def test_hsv_of_zero_is_the_same_image():
    sample = replace(painted(), image=noise(90, 120))
    assert hsv(sample, generator(0), NONE).image is sample.image


def test_hsv_scales_the_value_and_keeps_grey_grey():
    grey = replace(painted(), image=np.full((90, 120, 3), 100, dtype=np.uint8))
    levels = set()
    for seed in range(200):
        image = hsv(grey, generator(seed), Hyperparameters()).image
        assert np.ptp(image) == 0
        levels.add(int(image[0, 0, 0]))
    assert 60 <= min(levels) < 64
    assert 136 < max(levels) <= 140


def test_hsv_turns_the_hue_by_its_share():
    green = np.zeros((4, 4, 3), dtype=np.uint8)
    green[..., 1] = 200  # hue 120 degrees, 60 in OpenCV's steps
    sample = replace(painted(), image=green)
    hyp = replace(NONE, hsv_h=0.1)
    hues = set()
    for seed in range(100):
        turned = hsv(sample, generator(seed), hyp).image
        hues.add(int(cv2.cvtColor(turned, cv2.COLOR_RGB2HSV)[0, 0, 0]))
    assert 53 <= min(hues) < 57
    assert 63 < max(hues) <= 66


def test_mixup_blends_and_keeps_all_boxes():
    white = painted(box=(0, 0, 10, 10))
    first = replace(white, image=np.full_like(white.image, 200), image_id="a")
    second = replace(painted(polygon=True), image=np.zeros_like(white.image), image_id="b")
    shares = []
    for seed in range(50):
        mixed = mixup(first, second, generator(seed))
        assert np.ptp(mixed.image) == 0
        shares.append(mixed.image[0, 0, 0] / 200)
        np.testing.assert_array_equal(mixed.boxes, [[0, 0, 10, 10], [30, 20, 81, 64]])
        assert mixed.labels.tolist() == [3, 3]
        assert mixed.image_id == "a"
        assert mixed.segments[0] is None
        assert mixed.segments[1] is not None
    # Beta(32, 32): mean 1/2, deviation 1 / (2 sqrt(65)) = 0.062
    assert abs(np.mean(shares) - 0.5) < 0.03
    assert 0.03 < np.std(shares) < 0.1


def rows_of_squares(count):
    """Red squares with polygons on the left half, so that mirrored copies hide nobody."""
    image = np.zeros((count * 20, 100, 3), dtype=np.uint8)
    boxes = np.array([[5, 20 * i + 4, 17, 20 * i + 16] for i in range(count)], dtype=np.float32)
    for x1, y1, x2, y2 in boxes.astype(int):
        image[y1:y2, x1:x2, 0] = 255
    outlines = tuple(b[[0, 1, 2, 1, 2, 3, 0, 3]].reshape(4, 2) for b in boxes)
    return Sample(image, boxes, np.arange(count), 0, outlines)


@pytest.mark.parametrize(("share", "copies"), [(0.0, 0), (0.1, 1), (0.5, 5), (1.0, 10)])
def test_copy_paste_copies_the_share_asked_for(share, copies):
    sample = rows_of_squares(10)
    pasted = copy_paste(sample, generator(1), share=share)
    assert len(pasted.labels) == 10 + copies
    assert len(pasted.segments) == 10 + copies
    np.testing.assert_array_equal(pasted.boxes[:10], sample.boxes)
    for box, label, outline in list(zip(pasted.boxes, pasted.labels, pasted.segments, strict=True))[
        10:
    ]:
        x1, y1, x2, y2 = sample.boxes[label]
        np.testing.assert_array_equal(box, [100 - x2, y1, 100 - x1, y2])
        np.testing.assert_array_equal(np.hstack((outline.min(0), outline.max(0))), box)
    added = (pasted.image[:, 50:, 0] > 127).sum()
    assert added == copies * 12 * 12
    np.testing.assert_array_equal(pasted.image[:, :50], sample.image[:, :50])


def test_copy_paste_leaves_out_what_would_hide_others():
    sample = painted(polygon=True, box=(40, 20, 81, 64))  # its mirror image lies on itself
    assert len(copy_paste(sample, generator(0), share=1.0).labels) == 1


def test_copy_paste_needs_polygons():
    sample = painted()
    assert copy_paste(sample, generator(0), share=1.0) is sample
