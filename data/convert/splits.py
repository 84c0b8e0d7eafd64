"""What a converter has read, the drawing of val, and the writing of a data set."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from data.index.columns import ImageRecord
from data.index.records import SKIPPED_IMAGE, SKIPPED_ROW, Problem
from utils.errors import UserError
from utils.seeding import generator

_DECIMALS = 9  # of a width: more than float32 needs, less than subtraction leaves


@dataclass(frozen=True)
class Converted:
    """The images of each split, and what was left out."""

    splits: Mapping[str, Sequence[ImageRecord]]
    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    problems: tuple[Problem, ...]

    @property
    def skipped(self) -> tuple[int, int]:
        """Images and boxes that were left out."""
        kinds = [problem.kind for problem in self.problems]
        return kinds.count(SKIPPED_IMAGE), kinds.count(SKIPPED_ROW)


def cut(found: Converted, share: float, seed: int) -> Converted:
    """With a share of the images of 'train' as 'val': the same for the same paths and seed."""
    records = sorted(found.splits["train"], key=lambda record: record.path.as_posix())
    count = min(max(1, round(share * len(records))), len(records) - 1) if share else 0
    chosen = {*generator(seed).permutation(len(records))[:count].tolist()}
    parts = {
        "train": [record for i, record in enumerate(records) if i not in chosen],
        "val": [record for i, record in enumerate(records) if i in chosen],
    }
    return replace(found, splits={**found.splits, **{k: v for k, v in parts.items() if v}})


def write_set(found: Converted, out: Path, *, link: bool) -> None:
    """Make `out`, whole or not at all: <split>/, annotations/instances_<split>.json, data.yaml.

    Raises UserError when it cannot be written.
    """
    texts = "".join(f"{problem.text}\n" for problem in found.problems)
    entries: dict[str, Any] = {"path": "."}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
            new = Path(scratch, "new")
            (new / "annotations").mkdir(parents=True)
            for split, records in found.splits.items():
                names = _file_names(records)
                for record, name in tqdm(
                    list(zip(records, names, strict=True)), desc=split, dynamic_ncols=True
                ):
                    target = new / split / name
                    target.parent.mkdir(parents=True, exist_ok=True)
                    if link and not target.exists():  # two entries may have one file
                        target.symlink_to(record.path.resolve())
                    elif not link:
                        shutil.copyfile(record.path, target)
                file = f"annotations/instances_{split}.json"
                content = json.dumps(coco_json(records, names, found))
                (new / file).write_text(content, encoding="utf-8")
                entries[split] = {"images": split, "annotations": file}
            entries["names"] = list(found.names)
            text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
            (new / "data.yaml").write_text(text, encoding="utf-8")
            if texts:
                (new / "problems.txt").write_text(
                    texts, encoding="utf-8", errors="backslashreplace"
                )
            if out.exists():
                out.rmdir()
            new.replace(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}") from error


def coco_json(records: Sequence[ImageRecord], files: Sequence[str], found: Converted) -> Any:
    """COCO's instances of one split; reading them back gives the same records to the bit."""
    ids = _image_ids(records)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for i in sorted(range(len(records)), key=ids.__getitem__):
        record = records[i]
        size = {"width": record.width, "height": record.height}
        images.append({"id": ids[i], "file_name": files[i], **size})
        rows = zip(
            record.boxes, record.labels, record.crowd, record.areas, record.segments, strict=True
        )
        for box, label, crowd, area, outline in rows:
            x1, y1, x2, y2 = map(_short, box)
            width, height = round(x2 - x1, _DECIMALS), round(y2 - y1, _DECIMALS)
            entry = {
                "id": len(annotations) + 1,
                "image_id": ids[i],
                "category_id": found.category_ids[label],
                "bbox": [x1, y1, width, height],
                "area": _short(area),
                "iscrowd": int(crowd),
            }
            if outline is not None:
                entry["segmentation"] = [[_short(value) for value in outline.reshape(-1)]]
            annotations.append(entry)
    pairs = zip(found.category_ids, found.names, strict=True)
    categories = [{"id": number, "name": name} for number, name in pairs]
    return {"images": images, "annotations": annotations, "categories": categories}


def _short(value: np.floating[Any]) -> float | int:
    """The number with the fewest digits that is this float32."""
    number = float(str(value))
    return int(number) if number.is_integer() else number


def _file_names(records: Sequence[ImageRecord]) -> list[str]:
    """Names of files, or where two are alike their paths below the folder common to all."""
    names = [record.path.name for record in records]
    if len({*names}) == len(names):
        return names
    shared = os.path.commonpath([record.path.parent for record in records])
    return [record.path.relative_to(shared).as_posix() for record in records]


def _image_ids(records: Sequence[ImageRecord]) -> list[int]:
    """The data set's own numbers, or 1, 2, ... where it has none."""
    ids = [record.image_id for record in records]
    return (
        [int(i) for i in ids]
        if all(isinstance(i, int) for i in ids)
        else list(range(1, len(ids) + 1))
    )
