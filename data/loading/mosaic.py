"""Four images in one: the mosaic of YOLOv4 (arXiv:2004.10934, section 3.4)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.loading.geometry import scale_segments, transform
from data.loading.sample import Sample
from data.loading.transforms import keep
from utils.letterbox import GREY


def mosaic4(samples: Sequence[Sample], size: int, rng: np.random.Generator) -> Sample:
    """Four samples round a random centre of a grey canvas of twice `size`.

    The samples have their final scale (long side `size`, as a rule).  The centre
    is uniform in [size / 2, 3 size / 2] in both axes; the samples touch it with one corner each,
    top left, top right, bottom left, bottom right, and are cut at the canvas.  Boxes and polygons
    are clipped with them.  The result has the image_id of the first sample.
    """
    side = 2 * size
    centre_x, centre_y = (int(v) for v in rng.integers(size // 2, side - size // 2 + 1, 2))
    canvas = np.full((side, side, 3), GREY, dtype=np.uint8)
    boxes: list[np.ndarray] = []
    segments: list[np.ndarray | None] = []
    for corner, sample in enumerate(samples):
        height, width = sample.size
        left = centre_x - width if corner % 2 == 0 else centre_x
        top = centre_y - height if corner < 2 else centre_y
        _lay(canvas, sample.image, left, top)
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


def _lay(canvas: np.ndarray, image: np.ndarray, left: int, top: int) -> None:
    """Draw `image` at (left, top) as far as the canvas reaches."""
    (height, width), (rows, columns) = image.shape[:2], canvas.shape[:2]
    x1, y1, x2, y2 = max(left, 0), max(top, 0), min(left + width, columns), min(top + height, rows)
    canvas[y1:y2, x1:x2] = image[y1 - top : y2 - top, x1 - left : x2 - left]
