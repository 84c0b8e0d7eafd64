"""One finished run as a small file: what a table needs of it, what repeats it, and no weights.

A record is NAME.json with the arrays of engine/compare/arrays.py: NAME.npz, the detections on the
evaluated images, and truth-FINGERPRINT.npz, the ground truth, shared by all records of the same
data.  With these a folder of records can be compared again, by another bootstrap or with other
rows, without the data.  The metrics in a record are those before the detections were rounded.
"""

from __future__ import annotations

import csv
import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, cast

from engine.compare.arrays import pack, save_arrays, save_truth, truth_name
from engine.compare.protocol import Protocol
from engine.compare.schema import ACCURACY, Model
from engine.compare.typed import Rule, between, construct
from engine.evaluate.box_table import BoxTable
from models.spec import ModelSpec
from utils.config import MAX_PIXELS
from utils.errors import UserError
from utils.files import write_text
from utils.images import read_bytes

FORMAT = "featherdet-record-1"
FOLDER = "records"  # in a comparison's folder
ID_LENGTH = 12  # hexadecimal digits of a hash
MAX_IMAGES = 1_000_000  # evaluated: the resamples count each of them a thousand times
COCO_KEYS = ACCURACY[:-2]  # of 'metrics.coco'; the others stand in 'metrics' itself

Fingerprint = Annotated[str, Rule(re.compile(r"[0-9a-f]{8,64}").fullmatch, "hexadecimal digits")]
Images = Annotated[int, between(1, MAX_IMAGES)]


@dataclass(frozen=True)
class Data:
    """The data of a run, as its protocol states them."""

    name: str
    classes: Annotated[list[str], Rule(len, "at least one class")]
    train_images: int | None = None
    val: Fingerprint | None = None
    val_images: Images | None = None
    test: Fingerprint | None = None
    test_images: Images | None = None


@dataclass(frozen=True)
class Conditions:
    """What a table reads of a run's protocol."""

    data: Data
    image_size: Annotated[int, between(1, MAX_PIXELS)]
    split: Annotated[str, Rule({"val", "test"}.__contains__, "val or test")] = "val"
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


def _is_flat(values: dict[str, Any]) -> bool:
    plain = all(not isinstance(value, dict | list) for value in values.values())
    return plain and isinstance(values.get("commit"), str | None)


Environment = Annotated[dict[str, Any], Rule(_is_flat, "text and numbers")]


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
    environment: Environment = field(default_factory=dict)  # that the run was made in
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
        return str(getattr(self.data, self.conditions.split))

    @property
    def images(self) -> int:
        """How many were evaluated."""
        return int(getattr(self.data, f"{self.conditions.split}_images"))

    @property
    def accuracy(self) -> dict[str, float | None]:
        """The metrics ACCURACY; None where COCO's is not defined."""
        scores = self.scores
        coco = {key: None if scores.coco[key] < 0 else scores.coco[key] for key in COCO_KEYS}
        return {**coco, "precision": scores.precision, "recall": scores.recall}


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
    save_truth(folder / truth_name(record.fingerprint), truth)
    path = folder / f"{record.stem}.json"
    save_arrays(path.with_suffix(".npz"), pack(detections))
    plain = {key: value for key, value in asdict(record).items() if key != "path"}
    write_text(path, json.dumps(plain, indent=1, allow_nan=False) + "\n")
    return replace(record, path=path)


def records_in(folder: Path) -> list[Record]:
    """The records of a folder, by name; JSON files of other formats are passed over."""
    found = map(load_record, sorted(folder.glob("*.json")))
    return [record for record in found if record is not None]


def load_record(path: Path) -> Record | None:
    """Read a record's JSON; None for another format. UserError naming the file and the field."""
    try:
        content = json.loads(read_bytes(path))
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            return None
        record = replace(construct(Record, content), path=path)
        _check(record)
    except Exception as error:
        raise UserError(f"{path}: not a record: {error}") from error
    return record


def _check(record: Record) -> None:
    """Raise ValueError where fields that are right alone do not fit together."""
    data, scores, split = record.data, record.scores, record.conditions.split
    needed = {
        f"protocol.data.{split}": getattr(data, split),
        f"protocol.data.{split}_images": getattr(data, f"{split}_images"),
        **{f"metrics.coco.{key}": scores.coco.get(key) for key in COCO_KEYS},
    }
    if record.curves:
        needed["protocol.data.train_images"] = data.train_images
        needed["curves.epoch"] = record.curves.get("epoch")
    for name, value in needed.items():
        if value is None:
            raise ValueError(f"{name!r} is missing")
    if [one.name for one in scores.per_class] != data.classes:
        raise ValueError("'metrics.per_class' is not of the classes in 'protocol.data.classes'")
    if len({len(values) for values in record.curves.values()}) > 1:
        raise ValueError("'curves' have different numbers of epochs")


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """results.csv of a training run by column; None where a cell is empty or not finite."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = {
            name: [float(row[name] or "nan") for row in rows] for name in next(iter(rows), ())
        }
    except Exception as error:
        raise UserError(f"{path}: not the results of a run: {error}") from error
    return {
        name: [value if math.isfinite(value) else None for value in values]
        for name, values in columns.items()
    }
