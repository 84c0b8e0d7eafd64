"""COCO's instances JSON -> columns. Ids are remapped to classes and restored by `category_ids`."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
import os
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from data.index.columns import Entries, Texts
from data.index.files import stamp_of
from data.index.records import (
    NOTE,
    SKIPPED_IMAGE,
    SKIPPED_ROW,
    Labels,
    Parsed,
    Problem,
    Row,
)
from utils.errors import UserError
from utils.images import ImageError, read_bytes

MAX_CLASSES = 10_000
_MIN_POLYGON = 6  # numbers: three points
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

    `known` is returned when the file has not changed since. Annotations that cannot be used are
    listed in `problems`. Raises UserError when the file as a whole cannot be.
    """
    if not os.path.isdir(source.images):  # noqa: PTH112  Path.is_dir raises without permission
        raise UserError(
            f"{source.where}: no such folder of images: {source.images} (nothing is downloaded;"
            " 'path' says where to look)"
        )
    stamp = stamp_of(source.images, Texts.of([str(source.annotations)]))
    if known is not None and not all(map(os.path.lexists, known.entries.paths)):
        known = None  # images have moved, and `image_file` may find them
    if known is None or not stamp or known.stamp != stamp:
        known = _read(source, stamp)
    if names is not None and names != known.names:
        pairs = itertools.zip_longest(names, known.names)
        i, (a, b) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
        raise UserError(
            f"{source.where}: class {i} is {a!r} in 'names' but {b!r} in {source.annotations}; "
            "leave 'names' out, or give them in the order of the category ids"
        )
    return known


def image_file(folder: Path, name: str) -> Path:
    """`name` in `folder`; where there is no such file, that of its last part, if there is one.

    Annotation tools write the paths of their own server, or those of Windows.
    """
    path, last = folder / name, folder / re.split(r"[/\\]", name)[-1]
    return last if path != last and not os.path.lexists(path) and os.path.lexists(last) else path


def _read(source: CocoSource, stamp: str) -> Parsed:
    path = source.annotations
    try:
        data = json.loads(read_bytes(path, limit=_MAX_BYTES).decode("utf-8-sig"))
    except ImageError as error:
        raise UserError(f"{source.where}: {path}: {error}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not JSON: {error}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected a COCO object, found a {type(data).__name__}")
    data.setdefault("annotations", [])  # the files of COCO's test images have none
    for key in ("categories", "images", "annotations"):
        if not isinstance(data.get(key), list):
            kind = f"is a {type(data[key]).__name__}" if key in data else "is missing"
            raise UserError(f"{path}: {key!r} {kind}; expected a list (COCO instances)")
    names = _categories(path, data["categories"])
    entries, problems = _entries(source, data["images"])
    index = {number: i for i, number in enumerate(entries)}
    classes = {number: i for i, number in enumerate(names)}
    paths = [path for path, _ in entries.values()]
    rows = []
    for position, annotation in enumerate(data["annotations"]):
        item = annotation if isinstance(annotation, dict) else {}
        image = _find(index, item.get("image_id"))
        try:
            rows.append(_row(item, image, _find(classes, item.get("category_id"))))
        except ValueError as error:
            name = "" if image is None else f" ({paths[image].name})"
            where = f"{path}: annotation {item.get('id', f'at position {position}')}{name}"
            problems.append(Problem(where, str(error), SKIPPED_ROW, image))
    return Parsed(
        entries=Entries(
            paths=Texts.of(map(str, paths)),
            ids=Texts.of(str(int(n)) if isinstance(n, int) else n for n in entries),
            numeric=np.array([isinstance(number, int) for number in entries], bool),
            sizes=np.array([size for _, size in entries.values()], np.int64).reshape(-1, 2),
            label_files=Texts.of(()),
        ),
        labels=Labels.of(rows),
        names=tuple(names.values()),
        category_ids=tuple(names),
        problems=tuple(problems),
        annotations=path,
        stamp=stamp,
    )


def _categories(path: Path, items: list[Any]) -> dict[int, str]:
    """Names by category id, in rising order."""
    names: dict[int, str] = {}
    ids: dict[str, int] = {}
    for item in items:
        category = item if isinstance(item, dict) else {}
        number, name = category.get("id"), category.get("name")
        if type(number) is not int or not isinstance(name, str) or not name:
            raise UserError(f"{path}: category {item!r} has no integer 'id' or no 'name'")
        if number in names:
            raise UserError(f"{path}: category id {number} appears twice")
        if name in ids:
            raise UserError(f"{path}: category name {name!r} has the ids {[ids[name], number]}")
        names[number], ids[name] = name, number
    if not 0 < len(names) <= MAX_CLASSES:
        raise UserError(f"{path}: {len(names)} categories; expected 1 to {MAX_CLASSES}")
    return dict(sorted(names.items()))


def _entries(
    source: CocoSource, items: list[Any]
) -> tuple[dict[int | str, tuple[Path, tuple[int, int]]], list[Problem]]:
    """Path and size of each image by its id, in file order, and those that cannot be used."""
    entries: dict[int | str, tuple[Path, tuple[int, int]]] = {}
    stand_ins: dict[int | str, str] = {}
    problems = []
    for position, item in enumerate(items):
        image = item if isinstance(item, dict) else {}
        number, name = image.get("id"), image.get("file_name")
        where = f"{source.annotations}: images[{position}]"
        if not isinstance(number, int | str) or not isinstance(name, str) or not name:
            problems.append(Problem(where, "has no 'id' or no 'file_name'"))
        elif "\0" in name:
            problems.append(Problem(where, "a zero byte in 'file_name'"))
        elif number in entries:
            same = entries[number][0] == image_file(source.images, name)
            cause = f"id {number!r} ({name}) appears twice"
            problems.append(Problem(where, cause, NOTE if same else SKIPPED_IMAGE))
        else:
            size: tuple[Any, Any] = (image.get("height"), image.get("width"))
            usable = all(type(side) is int and 0 < side < _FAR for side in size)
            path = image_file(source.images, name)
            entries[number] = path, size if usable else (0, 0)
            if path != source.images / name:
                stand_ins[number] = f"{where}: {name}"
            if not usable and size != (None, None):
                cause = f"height and width {size} are not numbers of pixels"
                problems.append(Problem(where, cause, NOTE))
    uses = Counter(path for path, _ in entries.values())
    for number, where in stand_ins.items():
        if uses[entries[number][0]] > 1:
            cause = f"no such file, and {entries.pop(number)[0]} may be another image's"
            problems.append(Problem(where, cause))
    return entries, problems


def _find(table: Mapping[Any, int], key: Any) -> int | None:
    return table.get(key) if isinstance(key, int | str) else None


def _row(item: Mapping[str, Any], image: int | None, label: int | None) -> Row:
    """An annotation of a known image and class. Raises ValueError with the cause."""
    box: Any = item.get("bbox")
    area, number = item.get("area", math.nan), item.get("id")
    if image is None:
        raise ValueError(f"image_id {item.get('image_id')!r} is not in 'images'")
    if label is None:
        raise ValueError(f"category_id {item.get('category_id')!r} is not in 'categories'")
    usable = isinstance(box, list) and [type(v) in {int, float} and abs(v) < _FAR for v in box]
    if usable != [True] * 4:  # nan is not under _FAR
        raise ValueError(f"bbox {str(box)[:80]} is not four numbers under {_FAR:g}")
    x, y, width, height = box
    if width <= 0 or height <= 0:
        raise ValueError(f"bbox {box} has no area: width and height must be positive")
    if "area" in item and not (type(area) in {int, float} and 0 <= area <= sys.float_info.max):
        raise ValueError(f"area {area!r} is not a finite number of at least 0")
    return Row(
        image=image,
        label=label,
        box=(x, y, x + width, y + height),
        source=number if type(number) is int and abs(number) < 2**63 else -1,
        polygon=_polygon(item.get("segmentation")),
        crowd=item.get("iscrowd") == 1,
        area=area,
    )


def _polygon(segmentation: Any) -> np.ndarray | None:
    """The largest polygon of an object (its visible parts may be several); None for a mask."""
    polygons = []
    for values in segmentation if isinstance(segmentation, list) else ():
        with contextlib.suppress(ValueError, OverflowError):  # uneven lists, huge integers
            points = np.array(values)
            even = points.ndim == 1 and points.size >= _MIN_POLYGON and points.size % 2 == 0
            if even and points.dtype.kind in "fiu" and (abs(points) < _FAR).all():
                polygons.append(points.astype(np.float32).reshape(-1, 2))
    return max(polygons, key=cv2.contourArea, default=None)
