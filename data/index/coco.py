"""COCO's instances JSON -> columns. Ids are remapped to classes and restored by `category_ids`."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.index.labels import Entry, Parsed, make_labels
from data.index.records import NOTE, SKIPPED_IMAGE, SKIPPED_ROW, Problem
from utils.errors import UserError
from utils.images import ImageError, read_bytes

_MIN_POLYGON = 6  # numbers: three points
MAX_CLASSES = 10_000
_MAX_BYTES = 8 << 30
_FAR = 1e9  # pixels; no image is that large, and float32 holds it


@dataclass(frozen=True)
class CocoSource:
    """A split in COCO's form, as a data set YAML names it."""

    images: Path  # folder
    annotations: Path  # JSON file
    where: str  # file:line of the YAML


def read_coco(
    source: CocoSource, names: tuple[str, ...] | None, *, known: Parsed | None = None
) -> Parsed:
    """Read a COCO JSON file. `names`, when the YAML gives them, must be those of the file.

    `known` is returned when it was read from the same bytes. Annotations that cannot be used are
    listed in `problems`. Raises UserError when the file as a whole cannot be.
    """
    if not os.path.isdir(source.images):  # noqa: PTH112  Path.is_dir raises without permission
        raise UserError(f"{source.where}: no such folder of images: {source.images}")
    try:
        content = read_bytes(source.annotations, limit=_MAX_BYTES)
    except ImageError as error:
        raise UserError(f"{source.where}: {source.annotations}: {error.cause}") from error
    digest = hashlib.blake2b(content, digest_size=16)
    digest.update(f"{source.images}\n{source.annotations}".encode("utf-8", "surrogateescape"))
    if known is not None and known.digest == digest.hexdigest():
        _check_names(source, known.names, names)
        return known
    data = _load(source.annotations, content)
    category_ids, class_names = _categories(source.annotations, _items(source, data, "categories"))
    _check_names(source, class_names, names)
    entries, index, problems = _entries(source, _items(source, data, "images"))
    # the files of COCO's test images have no annotations at all
    items = _items(source, data, "annotations") if "annotations" in data else []
    annotations = [item if isinstance(item, dict) else {} for item in items]
    classes = {number: i for i, number in enumerate(category_ids)}
    rejected = np.zeros(len(entries), np.int64)
    good = []
    for row, item in enumerate(annotations):
        image = _find(index, item.get("image_id"))
        cause = _cause(item, image, _find(classes, item.get("category_id")))
        if cause is None:
            good.append(item)
            continue
        name = ""
        if image is not None:
            rejected[image] += 1
            name = f" ({entries[image].path.name})"
        where = f"{source.annotations}: annotation {item.get('id', f'at position {row}')}{name}"
        problems.append(Problem(where, cause, SKIPPED_ROW))
    boxes = np.array([item["bbox"] for item in good], np.float64).reshape(-1, 4)
    labels = make_labels(
        image=np.array([index[item["image_id"]] for item in good], np.int64),
        classes=np.array([classes[item["category_id"]] for item in good], np.int64),
        boxes=np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1),
        crowd=np.array([item.get("iscrowd") == 1 for item in good], bool),
        areas=np.array([item.get("area", math.nan) for item in good], np.float64),
        sources=np.array([_source_id(item.get("id")) for item in good], np.int64),
        polygons=[_polygon(item.get("segmentation")) for item in good],
    )
    return Parsed(
        entries=tuple(entries),
        labels=labels,
        names=class_names,
        category_ids=category_ids,
        problems=tuple(problems),
        rejected=rejected,
        unreadable=np.zeros(len(entries), bool),
        annotations=source.annotations,
        digest=digest.hexdigest(),
    )


def _load(path: Path, content: bytes) -> Mapping[str, Any]:
    try:
        data = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a COCO object, found a {type(data).__name__}")
    return data


def _items(source: CocoSource, data: Mapping[str, Any], key: str) -> list[Any]:
    found = data.get(key)
    if not isinstance(found, list):
        kind = f"is a {type(found).__name__}" if key in data else "is missing"
        raise UserError(f"{source.annotations}: {key!r} {kind}; expected a list (COCO instances)")
    return found


def _categories(path: Path, items: list[Any]) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Category ids in rising order, and their names."""
    names: dict[int, str] = {}
    for item in items:
        number, name = (
            (item.get("id"), item.get("name")) if isinstance(item, dict) else (None, None)
        )
        if type(number) is not int or not isinstance(name, str) or not name:
            raise UserError(f"{path}: category {item!r} lacks a whole 'id' or a 'name'")
        if number in names:
            raise UserError(f"{path}: category id {number} appears twice")
        names[number] = name
    if not 0 < len(names) <= MAX_CLASSES:
        raise UserError(f"{path}: {len(names)} categories; expected 1 to {MAX_CLASSES}")
    twice = [name for name, count in Counter(names.values()).items() if count > 1]
    if twice:
        ids = [number for number, name in names.items() if name == twice[0]]
        raise UserError(f"{path}: category name {twice[0]!r} has the ids {ids}")
    ids = sorted(names)
    return tuple(ids), tuple(names[number] for number in ids)


def _check_names(
    source: CocoSource, found: tuple[str, ...], wanted: tuple[str, ...] | None
) -> None:
    if wanted is None or wanted == found:
        return
    pairs = itertools.zip_longest(wanted, found)
    i, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
    raise UserError(
        f"{source.where}: class {i} is {a!r} in 'names' but {b!r} in {source.annotations}; "
        "leave 'names' out, or give them in the order of the category ids"
    )


def _entries(
    source: CocoSource, items: list[Any]
) -> tuple[list[Entry], dict[int | str, int], list[Problem]]:
    """Images in file order, the index of each id, and the images that cannot be used."""
    entries: list[Entry] = []
    index: dict[int | str, int] = {}
    problems = []
    for position, item in enumerate(items):
        image = item if isinstance(item, dict) else {}
        number, name = image.get("id"), image.get("file_name")
        where = f"{source.annotations}: images[{position}]"
        if not isinstance(number, int | str) or not isinstance(name, str) or not name:
            problems.append(Problem(where, "lacks 'id' or 'file_name'"))
        elif "\0" in name:
            problems.append(Problem(where, "a zero byte in 'file_name'"))
        elif number in index:
            same = entries[index[number]].path == source.images / name
            cause = f"id {number!r} ({name}) appears twice"
            problems.append(Problem(where, cause, NOTE if same else SKIPPED_IMAGE))
        else:
            index[number] = len(entries)
            height, width = image.get("height"), image.get("width")
            usable = all(type(side) is int and side > 0 for side in (height, width))
            size = (int(height), int(width)) if usable else None  # type: ignore[arg-type]
            entries.append(Entry(source.images / name, number, size))
            if not usable and (height, width) != (None, None):
                cause = f"height and width {(height, width)} are not numbers of pixels"
                problems.append(Problem(where, cause, NOTE))
    return entries, index, problems


def _find(table: Mapping[Any, int], key: Any) -> int | None:
    return table.get(key) if isinstance(key, int | str) else None


def _cause(item: Mapping[str, Any], image: int | None, label: int | None) -> str | None:
    """Why an annotation is rejected, None for a good one."""
    box, area = item.get("bbox"), item.get("area", 0)
    if image is None:
        return f"image_id {item.get('image_id')!r} is not in 'images'"
    if label is None:
        return f"category_id {item.get('category_id')!r} is not in 'categories'"
    if not (isinstance(box, list) and len(box) == 4 and all(_is_number(side) for side in box)):
        return f"bbox {str(box)[:80]} is not four numbers under {_FAR:g}"
    if box[2] <= 0 or box[3] <= 0:
        return f"bbox {box} has no area: width and height must be positive"
    if type(area) not in {int, float} or not 0 <= area <= sys.float_info.max:
        return f"area {area!r} is not a finite number from 0"
    return None


def _is_number(value: Any) -> bool:
    return type(value) in {int, float} and abs(value) < _FAR  # false for nan


def _source_id(value: Any) -> int:
    return value if type(value) is int and abs(value) < 2**63 else -1


def _polygon(segmentation: Any) -> np.ndarray | None:
    """The largest polygon of an object (its visible parts may be several); None for a mask."""
    if not isinstance(segmentation, list):
        return None
    polygons = [item for item in map(_points, segmentation) if item is not None]
    if len(polygons) < 2:
        return polygons[0] if polygons else None
    return max(polygons, key=_area)


def _points(values: Any) -> np.ndarray | None:
    if not isinstance(values, list) or len(values) < _MIN_POLYGON or len(values) % 2:
        return None
    try:
        points = np.array(values)
    except (ValueError, OverflowError):
        return None
    if points.dtype.kind not in "fiu" or points.ndim != 1 or not (abs(points) < _FAR).all():
        return None
    return points.astype(np.float32).reshape(-1, 2)


def _area(points: np.ndarray) -> float:
    """Shoelace formula."""
    x, y = points.astype(np.float64).T
    return float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2)
