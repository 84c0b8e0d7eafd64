"""One finished run as small files: what a table needs of it, what repeats it, and no weights.

A record is NAME.json with NAME.npz, the detections on the evaluated images, and
truth-FINGERPRINT.npz, the ground truth, shared by all records of the same data.  With these a
folder of records can be compared again, by another bootstrap or with other rows, without the data.

Of each image and class the 100 best detections are kept, which are all that COCO's metrics look at;
corners are rounded to 1/16 pixel and scores to 0.02 %, on a logarithmic scale.  The metrics in a
record are those before the rounding.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.compare.protocol import Protocol
from engine.compare.schema import ACCURACY, Model, construct
from engine.evaluate.matching import BoxTable, coco_order
from models.spec import ModelSpec
from utils.config import MAX_PIXELS
from utils.errors import UserError
from utils.files import write_bytes, write_text
from utils.images import read_bytes

FORMAT = "featherdet-record-1"
FOLDER = "records"  # in a comparison's folder
ID_LENGTH = 12  # hexadecimal digits of a hash
MAX_IMAGES = 1_000_000  # evaluated: the resamples count each of them a thousand times
COCO_KEYS = ACCURACY[:-2]  # of 'metrics.coco'; the others stand in 'metrics' itself
PIXEL_STEPS = 16  # of a pixel
SCORE_STEPS = 4096  # of a factor of 2
MIN_SCORE = 2.0**-15
# Kinds of numpy's types, by the array's name
TRUTH_KINDS = {"image": "i", "labels": "i", "boxes": "f", "crowd": "b", "areas": "f"}
DETECTION_KINDS = {"image": "u", "labels": "u", "boxes": "u", "scores": "u"}


@dataclass(frozen=True)
class Data:
    """The data of a run, as its protocol states them; the evaluated split: see Record."""

    name: str
    classes: list[str]
    train_images: int | None = None


@dataclass(frozen=True)
class Conditions:
    """What a table reads of a run's protocol."""

    data: Data
    image_size: int
    split: str = "val"
    device: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ClassScores:
    """What a table reads of one class's metrics."""

    name: str
    instances: int
    ap: float | None
    ap50: float | None


@dataclass(frozen=True)
class Scores:
    """What a table reads of a run's metrics."""

    precision: float | None
    recall: float | None
    coco: dict[str, float]
    per_class: list[ClassScores]


@dataclass(frozen=True)
class Record:
    """One finished run."""

    name: str  # of its row
    model_id: str  # of the untrained model, see `model_id`; or of the checkpoint's bytes
    model: Model
    spec: dict[str, Any]  # ModelSpec.to_dict()
    seed: int | None
    protocol: Protocol  # without the list of seeds
    command: str
    metrics: dict[str, Any]  # DetectionMetrics.to_dict()
    best_epoch: int | None
    curves: dict[str, list[float | None]]  # results.csv by column
    cost: dict[str, int]  # params, macs, flops
    environment: dict[str, Any] = field(default_factory=dict)  # that the run was made in
    # TrainConfig without NOT_KEPT; {}: not trained here, or a record older than this field
    training: dict[str, Any] = field(default_factory=dict)
    format: str = FORMAT
    path: Path = field(default=Path(), compare=False)  # of its JSON file, in which it is not

    @property
    def stem(self) -> str:
        """The file's name without suffix; see `run_id`."""
        return run_id(self.name, self.seed, self.model_id, self.protocol)

    @cached_property
    def conditions(self) -> Conditions:
        """Its protocol; ValueError naming what is missing or wrong there."""
        return construct(Conditions, self.protocol, "protocol")

    @cached_property
    def scores(self) -> Scores:
        """Its metrics; ValueError naming what is missing or wrong there."""
        return construct(Scores, self.metrics, "metrics")

    @property
    def data(self) -> Data:
        """The data it was trained and evaluated on."""
        return self.conditions.data

    @property
    def fingerprint(self) -> str:
        """Of the evaluated data."""
        return str(self.protocol["data"].get(self.conditions.split))

    @property
    def images(self) -> int:
        """How many were evaluated."""
        found = self.protocol["data"].get(f"{self.conditions.split}_images")
        return found if isinstance(found, int) else 0

    @property
    def accuracy(self) -> dict[str, float | None]:
        """The metrics ACCURACY; None where COCO's is not defined."""
        scores = self.scores
        coco = {key: None if scores.coco[key] < 0 else scores.coco[key] for key in COCO_KEYS}
        return {**coco, "precision": scores.precision, "recall": scores.recall}

    @property
    def truth_path(self) -> Path:
        """The file of the ground truth that it was compared with."""
        return self.path.with_name(f"truth-{self.fingerprint[:ID_LENGTH]}.npz")

    def detections(self) -> BoxTable:
        """Rounded as stated above. UserError where they are missing, damaged or of other data."""
        arrays = self._arrays(self.path.with_suffix(".npz"), DETECTION_KINDS)
        return BoxTable.detections(
            arrays["image"].astype(np.int64),
            arrays["labels"].astype(np.int64),
            (arrays["boxes"] / PIXEL_STEPS).astype(np.float32),
            (2.0 ** -(arrays["scores"] / SCORE_STEPS)).astype(np.float32),
        )

    def ground_truth(self) -> BoxTable:
        """What it was compared with. UserError where it is missing, damaged or of other data."""
        return BoxTable.ground_truth(**self._arrays(self.truth_path, TRUTH_KINDS))

    def _arrays(self, path: Path, kinds: Mapping[str, str]) -> dict[str, np.ndarray]:
        """Columns of finite numbers, four for 'boxes' and one else, equally long; else UserError.

        Images and labels are indices of those of the record.
        """
        try:
            with np.load(io.BytesIO(read_bytes(path))) as file:
                arrays = {key: file[key] for key in file.files}
        except Exception as error:
            raise UserError(f"{path}: not readable as a part of a record: {error}") from error
        what = "ground truth of a data set" if kinds is TRUTH_KINDS else "detections of a record"
        if arrays.keys() != kinds.keys() or not all(
            array.dtype.kind == kinds[name]
            and array.shape == (arrays["image"].size, *((4,) if name == "boxes" else ()))
            and np.isfinite(array).all()
            for name, array in arrays.items()
        ):
            raise UserError(f"{path}: not the {what}")
        images, classes = self.images, len(self.data.classes)
        for numbers, end in ((arrays["image"], images), (arrays["labels"], classes)):
            if ((numbers < 0) | (numbers >= end)).any():
                raise UserError(f"{path}: boxes beyond the {images} images, {classes} classes")
        return arrays


def _write_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    write_bytes(path, file.getvalue())


def model_id(spec: ModelSpec) -> str:
    """A hash of all that makes the untrained model; not of files' names, lines and notes."""
    plain = spec.to_dict()
    for key in ("source", "notes"):
        plain.pop(key, None)
    for layer in plain["layers"]:
        layer.pop("where")
    return digest(plain)


def digest(plain: Any) -> str:
    """A short hash of plain values."""
    text = json.dumps(plain, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:ID_LENGTH]


def run_id(name: str, seed: int | None, model: str, protocol: Protocol) -> str:
    """'bccd-yolov5n-ghost-seed0-0123456789ab': another one for each model and protocol."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{protocol['data']['name']}-{name}").strip("-.")
    part = "" if seed is None else f"-seed{seed}"
    return f"{readable}{part}-{digest([model, seed, protocol])}"


def plain_spec(spec: ModelSpec, source: str) -> dict[str, Any]:
    """`spec` as JSON values, with `source` instead of the paths of this machine's files."""
    plain = {**spec.to_dict(), "source": source}
    plain["layers"] = [{**layer, "where": ""} for layer in plain["layers"]]
    return cast("dict[str, Any]", json.loads(json.dumps(plain)))


def save_record(folder: Path, record: Record, detections: BoxTable, truth: BoxTable) -> Record:
    """Write the record; the JSON comes last, so that a record that is there is complete."""
    folder.mkdir(parents=True, exist_ok=True)
    record = replace(record, path=folder / f"{record.stem}.json")
    try:
        record.ground_truth()  # written by another run
    except UserError:
        _write_arrays(record.truth_path, {key: getattr(truth, key) for key in TRUTH_KINDS})
    found = detections.take(np.sort(coco_order(detections)))
    scores = np.clip(found.scores.astype(np.float64), MIN_SCORE, 1.0)
    columns = {
        "image": found.image,
        "labels": found.labels,
        "boxes": np.round(found.boxes.astype(np.float64) * PIXEL_STEPS),
        "scores": np.round(-np.log2(scores) * SCORE_STEPS),
    }
    sizes = {key: np.min_scalar_type(int(x.max(initial=0))) for key, x in columns.items()}
    small = {key: values.astype(sizes[key]) for key, values in columns.items()}
    _write_arrays(record.path.with_suffix(".npz"), small)
    plain = {key: value for key, value in asdict(record).items() if key != "path"}
    write_text(record.path, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return record


def records_in(folder: Path) -> list[Record]:
    """The records of a folder, by name; JSON files of other formats are passed over.

    UserError naming the file and the field.
    """
    found = []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(read_bytes(path))
            if isinstance(content, dict) and content.get("format") == FORMAT:
                found.append(replace(construct(Record, content), path=path))
                _check(found[-1])
        except Exception as error:
            raise UserError(f"{path}: not a record: {error}") from error
    return found


def _check(record: Record) -> None:
    """Raise ValueError for a value out of its range, and where fields do not fit together."""
    data, scores, split, curves = record.data, record.scores, record.conditions.split, record.curves
    nested = [value for value in record.environment.values() if isinstance(value, dict | list)]
    commit = record.environment.get("commit")
    size, names = record.conditions.image_size, [one.name for one in scores.per_class]
    rules: dict[str, tuple[object, str]] = {
        "protocol.split": (split in {"val", "test"}, "val or test"),
        "protocol.image_size": (1 <= size <= MAX_PIXELS, f"1 to {MAX_PIXELS}"),
        "protocol.data.classes": (data.classes, "at least one class"),
        "protocol.data.train_images": (not curves or data.train_images is not None, "a number"),
        f"protocol.data.{split}": (
            re.fullmatch(r"[0-9a-f]{8,64}", record.fingerprint),
            "hexadecimal digits",
        ),
        f"protocol.data.{split}_images": (1 <= record.images <= MAX_IMAGES, f"1 to {MAX_IMAGES}"),
        "metrics.coco": (scores.coco.keys() >= set(COCO_KEYS), ", ".join(COCO_KEYS)),
        "metrics.per_class": (names == data.classes, "the classes in 'protocol.data.classes'"),
        "curves.epoch": (not curves or "epoch" in curves, "the numbers of the epochs"),
        "curves": (len(set(map(len, curves.values()))) < 2, "columns of one length"),
        "environment": (not nested and isinstance(commit, str | None), "text and numbers"),
    }
    for name, (fits, expected) in rules.items():
        if not fits:
            raise ValueError(f"{name!r} is missing or wrong, expected {expected}")
