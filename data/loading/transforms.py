"""Transforms of a Sample; randomness only from the generator that is handed in.

Hyper-parameters have YOLOv5's names (utils.hyp); zero switches a transform off exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from data.loading.compose import HUES, ROUND_DOWN
from data.loading.geometry import candidates, is_axis_aligned, scale_segments, transform
from data.loading.sample import Sample
from utils.boxes import GREY
from utils.hyp import Hyperparameters

MIXUP_BETA = 32.0  # shares of mixup come from Beta(32, 32): near one half, YOLOv5's choice
PASTE_MAX_COVER = 0.3  # a pasted object may hide at most this share of another's box


def keep(sample: Sample, mask: np.ndarray) -> Sample:
    """The sample with only the boxes where `mask` (N,) is true."""
    if mask.all():
        return sample
    segments = tuple([s for s, kept in zip(sample.segments, mask, strict=True) if kept])
    return replace(sample, boxes=sample.boxes[mask], labels=sample.labels[mask], segments=segments)


def affine(sample: Sample, matrix: np.ndarray, size: tuple[int, int]) -> Sample:
    """The sample through `matrix` (3, 3) from source to target pixels, into (height, width) `size`.

    Boxes are clipped and those that fail `geometry.candidates` are dropped, also where nothing
    moves; the pixels then are an exact copy (of the centre, where sizes differ).
    """
    image = grey(size) if is_grey(sample.image) else warp(sample.image, matrix, size)
    boxes, segments = transform(sample.boxes, sample.segments, matrix, size)
    area_scale = float(abs(np.linalg.det(matrix[:2, :2])))
    moved = replace(sample, image=image, boxes=boxes, segments=segments)
    return keep(moved, candidates(sample.boxes, boxes, area_scale))


def random_matrix(
    source: tuple[int, int],
    target: tuple[int, int],
    rng: np.random.Generator,
    hyp: Hyperparameters,
) -> np.ndarray:
    """(3, 3) float64 from source to target pixels, sizes (height, width).

    About the source's centre: perspective, then rotation and scale, then shear; the centre then
    lands at the target's centre +- translate times its side.  A matrix that only scales and shifts
    is moved a little so that what it looks at are whole source pixels: cropping and resizing costs
    a quarter of a warp.
    """
    tilt_x, tilt_y = rng.uniform(-1, 1, 2) * hyp.perspective
    angle = math.radians(rng.uniform(-1, 1) * hyp.degrees)
    scale = 1 + rng.uniform(-1, 1) * hyp.scale
    shear_x, shear_y = (math.tan(math.radians(a * hyp.shear)) for a in rng.uniform(-1, 1, 2))
    shift_x, shift_y = 0.5 + rng.uniform(-1, 1, 2) * hyp.translate
    centre = np.array([[1, 0, -source[1] / 2], [0, 1, -source[0] / 2], [0, 0, 1]])
    perspective = np.array([[1, 0, 0], [0, 1, 0], [tilt_x, tilt_y, 1]])
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    shear = np.array([[1, shear_x, 0], [shear_y, 1, 0], [0, 0, 1]])
    shift = np.array([[1, 0, shift_x * target[1]], [0, 1, shift_y * target[0]], [0, 0, 1]])
    matrix = shift @ shear @ rotation @ perspective @ centre
    if not is_axis_aligned(matrix):
        return matrix
    left, top, columns, rows = _window(matrix, target)
    sx, sy = target[1] / columns, target[0] / rows
    return np.array([[sx, 0, -left * sx], [0, sy, -top * sy], [0, 0, 1]])


def _window(matrix: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """left, top, columns, rows of the source pixels that an axis-aligned matrix looks at."""
    columns, rows = max(round(size[1] / matrix[0, 0]), 1), max(round(size[0] / matrix[1, 1]), 1)
    return round(-matrix[0, 2] / matrix[0, 0]), round(-matrix[1, 2] / matrix[1, 1]), columns, rows


def warp(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) uint8 through `matrix` into (height, width) `size`, bilinear, grey outside.

    A matrix that only scales and shifts is taken as `random_matrix` rounds it.
    """
    if is_axis_aligned(matrix):
        return _crop_and_resize(image, matrix, size)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV's pixel centres are whole
    pixels = np.linalg.inv(half) @ matrix @ half
    flat = not (matrix[2, 0] or matrix[2, 1])
    border = (GREY, GREY, GREY)
    if flat:
        return cv2.warpAffine(image, pixels[:2], size[::-1], borderValue=border)
    return cv2.warpPerspective(image, pixels, size[::-1], borderValue=border)


def source_window(matrix: np.ndarray, size: tuple[int, int]) -> tuple[int, int, int, int]:
    """x1, y1, x2, y2 round all source pixels that `warp` looks at, without perspective."""
    corners = np.array([[0, 0, 1], [size[1], 0, 1], [0, size[0], 1], [size[1], size[0], 1]])
    points = corners @ np.linalg.inv(matrix).T[:, :2]
    x1, y1 = (np.floor(points.min(0)) - 2).astype(int).tolist()
    x2, y2 = (np.ceil(points.max(0)) + 2).astype(int).tolist()
    return x1, y1, x2, y2


def _crop_and_resize(image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    left, top, columns, rows = _window(matrix, size)
    right, bottom = max(left + columns, 0), max(top + rows, 0)
    window = image[max(top, 0) : bottom, max(left, 0) : right]
    if window.shape[:2] != (rows, columns):
        window = np.empty((rows, columns, 3), dtype=np.uint8)
        _fill(window, (0, 0, columns, rows), image, (-left, -top))
    if (rows, columns) != size:
        window = cv2.resize(window, size[::-1], interpolation=cv2.INTER_LINEAR)
    return window


def hsv_gains(rng: np.random.Generator, hyp: Hyperparameters) -> np.ndarray:
    """(3,) float64: 1 +- (hsv_h, hsv_s, hsv_v)."""
    return 1 + rng.uniform(-1, 1, 3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)


def hsv(sample: Sample, gains: np.ndarray, out: np.ndarray) -> Sample:
    """Multiply hue, saturation and value by `gains` (3,); hue wraps, the others saturate.

    The result's image is `out` (H, W, 3) uint8.
    """
    if (gains == 1).all():
        out[:] = sample.image
        return replace(sample, image=out)
    image = changed = cv2.cvtColor(sample.image, cv2.COLOR_RGB2HSV)
    if gains[0] * HUES < 256:  # OpenCV takes hues of 180 and more modulo 180
        factors = np.full((3, 4), ROUND_DOWN)
        factors[:, :3] = np.diag(gains)
        cv2.transform(image, factors, dst=image)
    else:  # the same in four times the time
        steps = np.arange(256, dtype=np.float64)[:, None] * gains
        steps[:, 0] %= HUES
        changed = cv2.LUT(image, steps.clip(0, 255).astype(np.uint8)[None])
    cv2.cvtColor(changed, cv2.COLOR_HSV2RGB, dst=out)
    return replace(sample, image=out)


def flip(sample: Sample, axis: int) -> Sample:
    """The mirror image along x (axis 0) or y (axis 1); boxes stay xyxy."""
    side, unit = sample.size[1 - axis], np.eye(2)[axis]
    boxes = sample.boxes.copy()
    boxes[:, [axis, axis + 2]] = side - sample.boxes[:, [axis + 2, axis]]
    segments = scale_segments(sample.segments, 1 - 2 * unit, side * unit)
    image = sample.image if is_grey(sample.image) else cv2.flip(sample.image, 1 - axis)
    return replace(sample, image=image, boxes=boxes, segments=segments)


def mixup(first: Sample, second: Sample, share: float) -> Sample:
    """`share` of the first sample and the rest of the second, of the same size; all boxes of both.

    arXiv:1710.09412, with hard labels as detectors use it.  Keeps the first's image_id.
    """
    image = first.image
    if not is_grey(image):
        image = cv2.addWeighted(image, share, second.image, 1 - share, 0)
    return Sample(
        image=image,
        boxes=np.concatenate((first.boxes, second.boxes)),
        labels=np.concatenate((first.labels, second.labels)),
        image_id=first.image_id,
        segments=first.segments + second.segments,
    )


def copy_paste(sample: Sample, rng: np.random.Generator, *, share: float) -> Sample:
    """Paste mirrored copies of `share` of the objects that have polygons onto the same image.

    A copy that would hide 30 % or more of any box is left out.  After arXiv:2012.07177, within
    one (mosaic) canvas.
    """
    owners = [i for i, segment in enumerate(sample.segments) if segment is not None]
    count = round(share * len(owners))
    if not count:
        return sample
    mirrored = flip(sample, 0)
    image, boxes, pasted = sample.image.copy(), sample.boxes, []
    for owner in rng.choice(owners, size=count, replace=False):
        box, outline = mirrored.boxes[owner], mirrored.segments[owner]
        assert outline is not None  # owners have polygons
        low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
        areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
        if ((high - low).clip(0).prod(1) / areas.clip(1e-9)).max() >= PASTE_MAX_COVER:
            continue
        x1, y1 = np.floor(outline.min(0)).clip(0).astype(int)
        x2, y2 = np.minimum(np.ceil(outline.max(0)), image.shape[1::-1]).astype(int)
        mask = np.zeros((y2 - y1, x2 - x1), dtype=np.uint8)
        cv2.fillPoly(mask, [np.round(outline - (x1 + 0.5, y1 + 0.5)).astype(np.int32)], 1)
        source = mirrored.image[y1:y2, x1:x2]
        np.copyto(image[y1:y2, x1:x2], source, where=mask.astype(bool)[..., None])
        boxes = np.vstack((boxes, box))
        pasted.append(int(owner))
    labels = np.concatenate((sample.labels, [sample.labels[owner] for owner in pasted]))
    segments = sample.segments + tuple([mirrored.segments[owner] for owner in pasted])
    labels = labels.astype(np.int64)
    return replace(sample, image=image, boxes=boxes, labels=labels, segments=segments)


def mosaic_centre(size: int, rng: np.random.Generator) -> tuple[int, int]:
    """(x, y) where the samples of a mosaic meet, uniform in [size / 2, 3 size / 2] in both axes."""
    x, y = (int(v) for v in rng.integers(size // 2, 2 * size - size // 2 + 1, 2))
    return x, y


def mosaic4(
    samples: Sequence[Sample],
    size: int,
    centre: tuple[int, int],
    seen: tuple[int, int, int, int] | None = None,
) -> Sample:
    """Four samples round the (x, y) `centre` of a grey canvas of twice `size`.

    arXiv:2004.10934, section 3.4.  The samples have their final scale (long side `size`, as a
    rule).  They touch the centre with one corner each, top left, top right, bottom left, bottom
    right, and are cut at the canvas.  Boxes and polygons are clipped with them.  The result has the
    image_id of the first sample.

    Only the pixels inside `seen` (x1, y1, x2, y2; None: all) are drawn, the others are undefined.
    """
    side, places = 2 * size, tile_corners([sample.size for sample in samples], centre)
    boxes: list[np.ndarray] = []
    segments: list[np.ndarray | None] = []
    canvas = grey((side, side))
    if not all(is_grey(sample.image) for sample in samples):
        canvas = np.empty((side, side, 3), dtype=np.uint8)
        x1, y1, x2, y2 = (min(max(v, 0), side) for v in seen or (0, 0, side, side))
        x, y = min(max(centre[0], x1), x2), min(max(centre[1], y1), y2)
        corners = [(x1, y1, x, y), (x, y1, x2, y), (x1, y, x, y2), (x, y, x2, y2)]
        for sample, place, corner in zip(samples, places, corners, strict=True):
            _fill(canvas, corner, sample.image, place)
    for sample, (left, top) in zip(samples, places, strict=True):
        boxes.append(sample.boxes + np.array([left, top, left, top], dtype=np.float32))
        segments += scale_segments(sample.segments, (1, 1), (left, top))
    cut, outlines = transform(np.concatenate(boxes), tuple(segments), np.eye(3), (side, side))
    whole = Sample(
        image=canvas,
        boxes=cut,
        labels=np.concatenate([sample.labels for sample in samples]),
        image_id=samples[0].image_id,
        segments=outlines,
    )
    return keep(whole, np.all(cut[:, 2:] > cut[:, :2], axis=1))


def tile_corners(
    sizes: Sequence[tuple[int, int]], centre: tuple[int, int]
) -> list[tuple[int, int]]:
    """(left, top) on the canvas of each tile of a mosaic, from its (height, width)."""
    x, y = centre
    return [
        (x - width * (corner % 2 == 0), y - height * (corner < 2))
        for corner, (height, width) in enumerate(sizes)
    ]


def grey(size: tuple[int, int]) -> np.ndarray:
    """A grey image of (height, width) `size` that takes no memory and no time.

    Through all transforms here a grey image stays one, so that boxes can be had without pixels.
    """
    return np.broadcast_to(np.uint8(GREY), (*size, 3))


def is_grey(image: np.ndarray) -> bool:
    """Whether the image is one of `grey`."""
    return image.strides[0] == 0


def _fill(
    canvas: np.ndarray,
    area: tuple[int, int, int, int],
    image: np.ndarray,
    place: tuple[int, int],
) -> None:
    """Draw the `area` (x1, y1, x2, y2): `image`, whose corner is at `place` (x, y), and grey."""
    (x1, y1, x2, y2), (left, top) = area, place
    begin, end = min(max(left, x1), x2), max(min(left + image.shape[1], x2), x1)
    first, last = min(max(top, y1), y2), max(min(top + image.shape[0], y2), y1)
    canvas[y1:first, x1:x2] = canvas[last:y2, x1:x2] = GREY
    canvas[first:last, x1:begin] = canvas[first:last, end:x2] = GREY
    canvas[first:last, begin:end] = image[first - top : last - top, begin - left : end - left]
