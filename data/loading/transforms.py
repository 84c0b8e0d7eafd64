"""Transforms of a Sample; randomness only from the generator that is handed in.

Hyper-parameters have YOLOv5's names (utils.hyp); zero switches a transform off exactly.
"""

from __future__ import annotations

import math
from dataclasses import replace

import cv2
import numpy as np

from data.loading.geometry import candidates, is_axis_aligned, scale_segments, transform
from data.loading.sample import Sample
from utils.hyp import Hyperparameters
from utils.letterbox import GREY, Letterbox

MIXUP_BETA = 32.0  # Beta(32, 32): shares near one half, YOLOv5's choice
PASTE_MAX_COVER = 0.3  # a pasted object may hide at most this share of another's box
HUES = 180  # OpenCV's hue of a byte image counts in steps of 2 degrees


def letterbox(sample: Sample, geometry: Letterbox, *, area: bool = False) -> Sample:
    """`sample` (of size geometry.src) on the grey canvas geometry.dst, with its boxes."""
    image = geometry.apply(sample.image, area=area)
    segments = scale_segments(sample.segments, geometry.scale_xy, geometry.offset)
    boxes = geometry.to_network(sample.boxes)
    return replace(sample, image=image, boxes=boxes, segments=segments)


def keep(sample: Sample, mask: np.ndarray) -> Sample:
    """The sample with only the boxes where `mask` (N,) is true."""
    if mask.all():
        return sample
    segments = tuple(s for s, kept in zip(sample.segments, mask, strict=True) if kept)
    return replace(sample, boxes=sample.boxes[mask], labels=sample.labels[mask], segments=segments)


def random_affine(
    sample: Sample, size: tuple[int, int], rng: np.random.Generator, hyp: Hyperparameters
) -> Sample:
    """Rotate, scale, shear, tilt and shift about the centre, into (height, width) `size`.

    Boxes are clipped and those that fail `geometry.candidates` are dropped, also where all
    amounts are zero; the pixels then are an exact copy (of the centre, where sizes differ).
    """
    matrix = random_matrix(sample.size, size, rng, hyp)
    image, matrix = warp(sample.image, matrix, size)
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
    lands at the target's centre +- translate times its side.
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
    return shift @ shear @ rotation @ perspective @ centre


def warp(
    image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(H, W, 3) uint8 through `matrix` into (height, width) `size`, bilinear, grey outside.

    Returns the image and the matrix that was used.  Where the matrix only scales and shifts, the
    window it looks at is rounded to whole source pixels (and the matrix with it): cropping and
    resizing costs a quarter of a warp.
    """
    if is_axis_aligned(matrix):
        return _crop_and_resize(image, matrix, size)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV's pixel centres are whole
    pixels = np.linalg.inv(half) @ matrix @ half
    flat = not (matrix[2, 0] or matrix[2, 1])
    grey = (GREY, GREY, GREY)
    if flat:
        return cv2.warpAffine(image, pixels[:2], size[::-1], borderValue=grey), matrix
    return cv2.warpPerspective(image, pixels, size[::-1], borderValue=grey), matrix


def _crop_and_resize(
    image: np.ndarray, matrix: np.ndarray, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    height, width = size
    columns, rows = max(round(width / matrix[0, 0]), 1), max(round(height / matrix[1, 1]), 1)
    left = round(-matrix[0, 2] / matrix[0, 0])
    top = round(-matrix[1, 2] / matrix[1, 1])
    if (left, top, rows, columns) == (0, 0, *image.shape[:2]):
        window = image
    else:
        x1, y1 = max(left, 0), max(top, 0)
        x2 = max(min(left + columns, image.shape[1]), x1)
        y2 = max(min(top + rows, image.shape[0]), y1)
        window = image[y1:y2, x1:x2]
        if window.shape[:2] != (rows, columns):
            padded = np.full((rows, columns, 3), GREY, dtype=np.uint8)
            padded[y1 - top : y2 - top, x1 - left : x2 - left] = window
            window = padded
    if (rows, columns) != size:
        window = cv2.resize(window, (width, height), interpolation=cv2.INTER_LINEAR)
    sx, sy = width / columns, height / rows
    return window, np.array([[sx, 0, -left * sx], [0, sy, -top * sy], [0, 0, 1]])


def hsv(sample: Sample, rng: np.random.Generator, hyp: Hyperparameters) -> Sample:
    """Scale hue, saturation and value by 1 +- (hsv_h, hsv_s, hsv_v); hue wraps, others saturate."""
    gains = 1 + rng.uniform(-1, 1, 3) * (hyp.hsv_h, hyp.hsv_s, hyp.hsv_v)
    if (gains == 1).all():
        return sample
    steps = np.arange(256, dtype=np.float64)[:, None] * gains
    steps[:, 0] %= HUES
    table = steps.clip(0, 255).astype(np.uint8)
    planes = cv2.split(cv2.cvtColor(sample.image, cv2.COLOR_RGB2HSV))
    changed = [cv2.LUT(plane, np.ascontiguousarray(table[:, k])) for k, plane in enumerate(planes)]
    return replace(sample, image=cv2.cvtColor(cv2.merge(changed), cv2.COLOR_HSV2RGB))


def flip_left_right(sample: Sample) -> Sample:
    """The mirror image; boxes stay xyxy."""
    return _flip(sample, axis=0)


def flip_up_down(sample: Sample) -> Sample:
    """The image upside down; boxes stay xyxy."""
    return _flip(sample, axis=1)


def _flip(sample: Sample, *, axis: int) -> Sample:
    side = sample.size[1 - axis]
    boxes = sample.boxes.copy()
    boxes[:, [axis, axis + 2]] = side - sample.boxes[:, [axis + 2, axis]]
    segments = tuple(_mirror(segment, side, axis) for segment in sample.segments)
    image = cv2.flip(sample.image, 1 - axis)
    return replace(sample, image=image, boxes=boxes, segments=segments)


def _mirror(segment: np.ndarray | None, side: float, axis: int) -> np.ndarray | None:
    if segment is None:
        return None
    mirrored = segment.copy()
    mirrored[:, axis] = side - segment[:, axis]
    return mirrored


def mixup(first: Sample, second: Sample, rng: np.random.Generator) -> Sample:
    """Blend two samples of one size with a share from Beta(32, 32); all boxes of both.

    arXiv:1710.09412, with hard labels as detectors use it.  Keeps the first's image_id.
    """
    share = rng.beta(MIXUP_BETA, MIXUP_BETA)
    return Sample(
        image=cv2.addWeighted(first.image, share, second.image, 1 - share, 0),
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
    width = sample.size[1]
    image = sample.image.copy()
    boxes, labels, segments = list(sample.boxes), list(sample.labels), list(sample.segments)
    for owner in rng.choice(owners, size=count, replace=False):
        x1, y1, x2, y2 = sample.boxes[owner]
        box = np.array([width - x2, y1, width - x1, y2], dtype=np.float32)
        if _covered(box, np.stack(boxes)).max() >= PASTE_MAX_COVER:
            continue
        outline = _mirror(sample.segments[owner], width, 0)
        assert outline is not None  # owners have polygons
        _paste(image, sample.image, outline)
        boxes.append(box)
        labels.append(sample.labels[owner])
        segments.append(outline)
    return replace(
        sample,
        image=image,
        boxes=np.stack(boxes),
        labels=np.array(labels, dtype=np.int64),
        segments=tuple(segments),
    )


def _covered(box: np.ndarray, boxes: np.ndarray) -> np.ndarray:
    """(N,) share of each of `boxes` that `box` covers."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return (high - low).clip(0).prod(1) / area.clip(1e-9)


def _paste(image: np.ndarray, source: np.ndarray, outline: np.ndarray) -> None:
    """Write the mirrored `source` into `image` within `outline`; both are of one size."""
    height, width = image.shape[:2]
    x1, y1 = np.floor(outline.min(0)).clip(0).astype(int)
    x2, y2 = np.minimum(np.ceil(outline.max(0)), (width, height)).astype(int)
    mask = np.zeros((y2 - y1, x2 - x1), dtype=np.uint8)
    corners = np.round(outline - (x1 + 0.5, y1 + 0.5)).astype(np.int32)
    cv2.fillPoly(mask, [corners], 1)
    mirrored = source[y1:y2, width - x2 : width - x1][:, ::-1]
    np.copyto(image[y1:y2, x1:x2], mirrored, where=mask.astype(bool)[..., None])
