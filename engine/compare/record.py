"""One finished run as a small file: what a table needs of it, what repeats it, and no weights.

A record is NAME.json with NAME.npz beside it, the detections on the validation images, and
truth-FINGERPRINT.npz, the true boxes, shared by all records of the same data.  With these a folder
of records can be compared anew, by another bootstrap or against other rows, without the data.

Rounding of the detections: of each image and class the 100 best are kept, which are all that COCO's
figures look at; corners to 1/16 pixel; scores to 0.02 %, on a logarithmic scale.  The figures in
the record are those before rounding.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import lzma
import math
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np

from engine.compare.check import check_record
from engine.compare.protocol import Protocol
from engine.compare.schema import Model
from engine.evaluate.box_table import BoxTable
from engine.evaluate.matching import coco_order
from engine.evaluate.results import DetectionMetrics
from models.spec import ModelSpec
from utils.errors import UserError
from utils.files import write_bytes, write_text

FORMAT = "featherdet-record-1"
FOLDER = "records"  # in a comparison's folder
TRUTH = "truth-"
PIXEL_STEPS = 16  # of a pixel
SCORE_STEPS = 4096  # of a factor of 2
ID_LENGTH = 12  # hexadecimal digits of a hash
SMALLEST = (np.uint8, np.uint16, np.uint32)
# What reading a damaged .npz raises; a cut one may look like a .npy, which is no context manager.
DAMAGE = (
    OSError, ValueError, KeyError, EOFError, TypeError, AttributeError, RuntimeError, MemoryError,
    zipfile.BadZipFile, zlib.error, lzma.LZMAError,
)  # fmt: skip
# Kinds of numpy's types, by the array's name
TRUE = {"image": "i", "labels": "i", "boxes": "f", "crowd": "b", "areas": "f"}
FOUND = {"image": "u", "labels": "u", "boxes": "u", "scores": "u"}


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

    @property
    def stem(self) -> str:
        """The file's name without suffix; see `run_id`."""
        return run_id(self.name, self.seed, self.model_id, self.protocol)

    @property
    def fingerprint(self) -> str:
        """Of the validation data."""
        return str(self.protocol["data"]["val"])


def model_id(spec: ModelSpec) -> str:
    """A hash of all that makes the untrained model; not of files' names, places and notes."""
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
    """'bccd-yolov5n-ghost-seed0-0123456789ab': tells runs of all models and protocols apart."""
    readable = re.sub(r"[^A-Za-z0-9.]+", "-", f"{protocol['data']['name']}-{name}").strip("-.")
    part = "" if seed is None else f"-seed{seed}"
    return f"{readable}{part}-{digest([model, seed, protocol])}"


def plain_spec(spec: ModelSpec, source: str) -> dict[str, Any]:
    """`spec` as JSON values, with `source` instead of the places of this machine's files."""
    plain = {**spec.to_dict(), "source": source}
    plain["layers"] = [{**layer, "where": ""} for layer in plain["layers"]]
    return cast("dict[str, Any]", json.loads(json.dumps(plain)))


def save_record(folder: Path, record: Record, metrics: DetectionMetrics, truth: BoxTable) -> Path:
    """Write the record; the JSON comes last, so that a record that is there is whole."""
    folder.mkdir(parents=True, exist_ok=True)
    save_truth(folder / truth_name(record.fingerprint), truth)
    path = folder / f"{record.stem}.json"
    _save_arrays(path.with_suffix(".npz"), pack(metrics.detections))
    write_text(path, json.dumps(_finite(asdict(record)), indent=1) + "\n")
    return path


def truth_name(fingerprint: str) -> str:
    """The file of the true boxes of a data set."""
    return f"{TRUTH}{fingerprint[:ID_LENGTH]}.npz"


def save_truth(path: Path, truth: BoxTable) -> None:
    """Write the true boxes, unless they are there and whole."""
    try:
        _load_arrays(path)
    except UserError:
        _save_arrays(path, {key: getattr(truth, key) for key in TRUE})


def load_truth(folder: Path, fingerprint: str) -> BoxTable:
    """The true boxes that the records of `folder` were compared with. UserError without them."""
    path = folder / truth_name(fingerprint)
    arrays = _load_arrays(path)
    if not _is_table(arrays, TRUE):
        raise UserError(f"{path}: not the true boxes of a data set")
    return BoxTable.ground_truth(**arrays)


def load_detections(record: Path) -> BoxTable:
    """The detections beside a record's JSON. UserError where they are missing or damaged."""
    path = record.with_suffix(".npz")
    arrays = _load_arrays(path)
    if not _is_table(arrays, FOUND):
        raise UserError(f"{path}: not the detections of a record")
    return unpack(arrays)


def pack(found: BoxTable) -> dict[str, np.ndarray]:
    """The detections rounded as this module says, in small integers."""
    found = found.take(np.sort(coco_order(found)))
    scores = np.clip(found.scores.astype(np.float64), 2.0**-15, 1.0)
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
    return values.astype(next(kind for kind in SMALLEST if highest <= np.iinfo(kind).max))


def _save_arrays(path: Path, arrays: Mapping[str, np.ndarray]) -> None:
    file = io.BytesIO()
    np.savez_compressed(file, **dict(arrays))  # type: ignore[arg-type]
    write_bytes(path, file.getvalue())


def _load_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as raw, np.load(raw) as file:
            return {key: file[key] for key in file.files}
    except DAMAGE as error:
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


def _finite(value: Any) -> Any:
    """Plain values with None for what is no number: JSON knows no NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read_json(path: Path) -> Any:
    def refuse(word: str) -> None:
        raise ValueError(f"{word} is no number")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


def load_record(path: Path) -> Record:
    """Read a record's JSON. UserError naming the file for anything else."""
    try:
        content = _read_json(path)
        found = content.get("format") if isinstance(content, dict) else None
        if found != FORMAT:
            raise UserError(f"{path}: not a record: format {found!r}, expected {FORMAT!r}")
        check_record(path, content)
        return Record(**content)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a record: {error}") from error


def records_in(folder: Path) -> Iterator[tuple[Path, Record]]:
    """The records of a folder, by name; files of other formats are passed over."""
    for path in sorted(folder.glob("*.json")):
        try:
            content = _read_json(path)
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{path}: not a record: {error}") from error
        if isinstance(content, dict) and content.get("format") == FORMAT:
            yield path, load_record(path)


def read_curves(path: Path) -> dict[str, list[float | None]]:
    """results.csv of a training run by column; None where a cell is empty."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
            names = list(rows[0]) if rows else []
            return {n: [float(row[n]) if row[n] else None for row in rows] for n in names}
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path}: not the results of a run: {error}") from error
