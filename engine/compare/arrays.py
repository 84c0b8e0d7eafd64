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

TRUTH = "truth-"
FINGERPRINT_LENGTH = 12  # digits in a file's name
PIXEL_STEPS = 16  # of a pixel
SCORE_STEPS = 4096  # of a factor of 2
MIN_SCORE = 2.0**-15
TYPES = (np.uint8, np.uint16, np.uint32)  # the smallest that fits is written
# Kinds of numpy's types, by the array's name
TRUTH_KINDS = {"image": "i", "labels": "i", "boxes": "f", "crowd": "b", "areas": "f"}
DETECTION_KINDS = {"image": "u", "labels": "u", "boxes": "u", "scores": "u"}


def truth_name(fingerprint: str) -> str:
    """The file of the ground truth of a data set."""
    return f"{TRUTH}{fingerprint[:FINGERPRINT_LENGTH]}.npz"


def save_truth(path: Path, truth: BoxTable) -> None:
    """Write the ground truth, unless a readable file is there."""
    try:
        _load_arrays(path)
    except UserError:
        save_arrays(path, {key: getattr(truth, key) for key in TRUTH_KINDS})


def load_truth(folder: Path, fingerprint: str) -> BoxTable:
    """The ground truth that the records of `folder` were compared with. UserError without it."""
    path = folder / truth_name(fingerprint)
    arrays = _load_arrays(path)
    if not _is_table(arrays, TRUTH_KINDS):
        raise UserError(f"{path}: not the ground truth of a data set")
    return BoxTable.ground_truth(**arrays)


def load_detections(record: Path) -> BoxTable:
    """The detections of a record, by its JSON file. UserError where they are missing or damaged."""
    path = record.with_suffix(".npz")
    arrays = _load_arrays(path)
    if not _is_table(arrays, DETECTION_KINDS):
        raise UserError(f"{path}: not the detections of a record")
    return unpack(arrays)


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
    highest = int(values.max(initial=0))
    return values.astype(next(kind for kind in TYPES if highest <= np.iinfo(kind).max))


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write a compressed .npz atomically."""
    file = io.BytesIO()
    np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    write_bytes(path, file.getvalue())


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(io.BytesIO(read_bytes(path))) as file:
            return {key: file[key] for key in file.files}
    except Exception as error:
        raise UserError(f"{path}: not readable as a part of a record: {error}") from error


def _is_table(arrays: Mapping[str, np.ndarray], kinds: Mapping[str, str]) -> bool:
    """Whether these are columns of finite numbers, four for 'boxes' and one else, equally long."""
    if arrays.keys() != kinds.keys():
        return False
    rows = arrays["image"].size
    return all(
        array.dtype.kind == kinds[name]
        and array.shape == ((rows, 4) if name == "boxes" else (rows,))
        and np.isfinite(array).all()
        for name, array in arrays.items()
    )
