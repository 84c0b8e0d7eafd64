"""The arrays of a record: detections, and the ground truth that they were compared with.

Of each image and class the 100 best detections are kept, which are all that COCO's metrics look at;
corners are rounded to 1/16 pixel and scores to 0.02 %, on a logarithmic scale.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from engine.evaluate.box_table import BoxTable
from engine.evaluate.matching import coco_order
from utils.errors import UserError
from utils.files import write_bytes
from utils.images import read_bytes

FINGERPRINT_LENGTH = 12  # digits in a file's name
PIXEL_STEPS = 16  # of a pixel
SCORE_STEPS = 4096  # of a factor of 2
MIN_SCORE = 2.0**-15
# Kinds of numpy's types, by the array's name
TRUTH_KINDS = {"image": "i", "labels": "i", "boxes": "f", "crowd": "b", "areas": "f"}
DETECTION_KINDS = {"image": "u", "labels": "u", "boxes": "u", "scores": "u"}


def truth_name(fingerprint: str) -> str:
    """The file of the ground truth of a data set."""
    return f"truth-{fingerprint[:FINGERPRINT_LENGTH]}.npz"


def save_truth(path: Path, truth: BoxTable) -> None:
    """Write the ground truth, unless a readable file is there."""
    try:
        _load(path, TRUTH_KINDS)
    except UserError:
        save_arrays(path, {key: getattr(truth, key) for key in TRUTH_KINDS})


def load_truth(folder: Path, fingerprint: str) -> BoxTable:
    """The ground truth that the records of `folder` were compared with. UserError without it."""
    return BoxTable.ground_truth(**_load(folder / truth_name(fingerprint), TRUTH_KINDS))


def load_detections(record: Path) -> BoxTable:
    """The detections of a record, by its JSON file. UserError where they are missing or damaged."""
    return unpack(_load(record.with_suffix(".npz"), DETECTION_KINDS))


def pack(found: BoxTable) -> dict[str, np.ndarray]:
    """The detections rounded as stated above, in small integers."""
    found = found.take(np.sort(coco_order(found)))
    scores = np.clip(found.scores.astype(np.float64), MIN_SCORE, 1.0)
    return {
        "image": _small(found.image),
        "labels": _small(found.labels),
        "boxes": _small(np.round(found.boxes.astype(np.float64) * PIXEL_STEPS)),
        "scores": _small(np.round(-np.log2(scores) * SCORE_STEPS)),
    }


def unpack(arrays: Mapping[str, np.ndarray]) -> BoxTable:
    """The inverse of `pack`."""
    return BoxTable.detections(
        arrays["image"].astype(np.int64),
        arrays["labels"].astype(np.int64),
        (arrays["boxes"] / PIXEL_STEPS).astype(np.float32),
        (2.0 ** -(arrays["scores"] / SCORE_STEPS)).astype(np.float32),
    )


def _small(values: np.ndarray) -> np.ndarray:
    return values.astype(np.min_scalar_type(int(values.max(initial=0))))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed .npz atomically."""
    file = io.BytesIO()
    np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    write_bytes(path, file.getvalue())


def _load(path: Path, kinds: Mapping[str, str]) -> dict[str, np.ndarray]:
    """Columns of finite numbers, four for 'boxes' and one else, equally long; else UserError."""
    try:
        with np.load(io.BytesIO(read_bytes(path))) as file:
            arrays = {key: file[key] for key in file.files}
    except Exception as error:
        raise UserError(f"{path}: not readable as a part of a record: {error}") from error
    right = arrays.keys() == kinds.keys() and all(
        array.dtype.kind == kinds[name]
        and array.shape == (arrays["image"].size, *((4,) if name == "boxes" else ()))
        and np.isfinite(array).all()
        for name, array in arrays.items()
    )
    if not right:
        what = "ground truth of a data set" if kinds is TRUTH_KINDS else "detections of a record"
        raise UserError(f"{path}: not the {what}")
    return arrays
