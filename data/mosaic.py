"""Four images in one: the mosaic of YOLOv4 (arXiv:2004.10934, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.geometry import transform
from data.sample import Sample
from data.transforms import keep
from utils.letterbox import GREY


def mosaic4(samples: Sequence[Sample], size: int, rng: np.random.Generator) -> Sample:
    """Four samples round a random centre of a grey canvas of twice `size`.

    The samples are scaled to the size they shall have (long side `size`, as a rule).  The centre
    is uniform in [size / 2, 3 size / 2] in both axes; the samples touch it with one corner each,
    top left, top right, bottom left, bottom right, and are cut at the canvas.  Boxes and polygons
    are clipped with them.  The result has the image_id of the first sample.
    """
    if len(samples) != 4:
        raise ValueError(f"a mosaic takes 4 samples, got {len(samples)}")
    side = 2 * size
    centre_x, centre_y = (int(v) for v in rng.integers(size // 2, side - size // 2 + 1, 2))
    canvas = np.full((side, side, 3), GREY, dtype=np.uint8)
    parts = []
    for corner, sample in enumerate(samples):
        height, width = sample.size
        left = centre_x - width if corner % 2 == 0 else centre_x
        top = centre_y - height if corner < 2 else centre_y
        parts.append(_lay(canvas, sample, left, top))
    return Sample(
        image=canvas,
        boxes=np.concatenate([part.boxes for part in parts]),
        labels=np.concatenate([part.labels for part in parts]),
        image_id=samples[0].image_id,
        segments=tuple(segment for part in parts for segment in part.segments),
    )


def _lay(canvas: np.ndarray, sample: Sample, left: int, top: int) -> Sample:
    """Draw `sample` at (left, top) as far as the canvas reaches; returns it in canvas pixels."""
    (height, width), (rows, columns) = sample.size, canvas.shape[:2]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, columns), min(top + height, rows)
    canvas[y1:y2, x1:x2] = sample.image[y1 - top : y2 - top, x1 - left : x2 - left]
    matrix = np.array([[1.0, 0, left], [0, 1, top], [0, 0, 1]])
    boxes, segments = transform(sample.boxes, sample.segments, matrix, (rows, columns))
    moved = Sample(sample.image, boxes, sample.labels, sample.image_id, segments)
    return keep(moved, np.all(boxes[:, 2:] > boxes[:, :2], axis=1))
