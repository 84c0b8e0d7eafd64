"""Annotations in one file for each image, with class names: Pascal VOC (labelImg) and labelme."""

from __future__ import annotations

import json
import math
import re
import xml.etree.ElementTree as ET
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np

from data.convert.splits import Converted
from data.index.columns import Entries, ImageChecks, Texts
from data.index.dataset import SPLITS
from data.index.records import SKIPPED_ROW, Labels, Parsed, Problem, Row, build_index
from data.index.scan import SHOWN, scan_images
from data.index.yolo import YoloSource, list_images
from utils.errors import UserError, nearest
from utils.images import ImageError, read_bytes
from utils.terminal import warn

_FAR = 1e9  # pixels; no image is that large, and float32 holds it


class Shape(NamedTuple):
    """An object as its file states it, in pixels."""

    name: str
    box: tuple[float, float, float, float]  # xyxy
    crowd: bool = False
    polygon: np.ndarray | None = None  # (P, 2)


def read_pairs(kind: str, src: Path, images: Path, classes: tuple[str, ...]) -> Converted:
    """Read all images below `images`, each with the file below `src` that has its name.

    An image without a file is background; what cannot be used is in `problems`.  The splits are
    those of VOC's ImageSets/Main/{train,val,test}.txt, if `src` has them, else all is 'train'.
    Raises UserError when nothing is usable.
    """
    suffix, read = {"voc": (".xml", read_voc), "labelme": (".json", read_labelme)}[kind]
    paths, problems = list_images(YoloSource((images,), ("--images",), images))
    files = _partners(paths, src, suffix, problems)
    shapes: dict[int, list[Shape | str]] = {}
    for i, file in files.items():
        try:
            shapes[i] = read(read_bytes(file))
        except (ImageError, ValueError, RecursionError) as error:
            problems.append(Problem(str(file), str(error), image=i))
    names = _class_names(files, shapes, classes)
    ids = _ids(paths)
    entries = Entries(
        paths=Texts.of(paths),
        ids=Texts.of(map(str, ids)),
        numeric=np.ones(len(ids), bool),
        sizes=np.zeros((len(ids), 2), np.int64),
        label_files=Texts.of(()),
    )
    labels = _labels(files, shapes, names, problems)
    parsed = Parsed(
        entries=entries,
        labels=labels,
        names=names,
        category_ids=tuple(range(1, len(names) + 1)),
        problems=tuple(problems),
        annotations=src,
        stamp="",
    )
    nothing = ImageChecks.of(np.zeros((0, 3), np.int64))
    index = build_index(parsed, scan_images(entries.paths, Texts.of(()), nothing))
    for problem in index.problems[:SHOWN]:
        warn(problem.text)
    if not index.boxes:
        raise UserError(f"{src}: no image below {images} has an object in a *{suffix} file")
    if unlabelled := len(paths) - len(files):
        warn(f"{unlabelled} of {len(paths)} images have no {suffix} file: background")
    by_stem = {record.path.stem: record for record in index.records}
    splits = {
        split: [by_stem[stem] for stem in stems if stem in by_stem]
        for split, stems in _voc_lists(src, {Path(path).stem for path in paths}).items()
    }
    if splits and (rest := len(index) - sum(map(len, splits.values()))):
        warn(f"{rest} images are in none of the lists in {src}/ImageSets/Main: left out")
    everything = {"train": index.records}
    return Converted(splits or everything, names, parsed.category_ids, index.problems)


def _class_names(
    files: Mapping[int, Path], shapes: Mapping[int, list[Shape | str]], classes: tuple[str, ...]
) -> tuple[str, ...]:
    found = {
        item.name: files[i] for i, items in shapes.items() for item in items if type(item) is Shape
    }
    for name, file in found.items() if classes else ():
        if name not in classes:
            hint = nearest(name, classes)
            raise UserError(f"{file}: class {name!r} is not one of --classes{hint}")
    return classes or tuple(sorted(found))


def _ids(paths: Sequence[str]) -> list[int]:
    """The last numbers in the file names, or 1, 2, ... where these are not unique."""
    numbers = [re.findall(r"\d{1,18}", Path(path).stem) for path in paths]
    ids = [int(found[-1]) for found in numbers if found]
    return ids if len({*ids}) == len(paths) else list(range(1, len(paths) + 1))


def _labels(
    files: Mapping[int, Path],
    shapes: Mapping[int, list[Shape | str]],
    names: Sequence[str],
    problems: list[Problem],
) -> Labels:
    rows = []
    for i, items in shapes.items():
        for number, item in enumerate(items, start=1):
            if isinstance(item, Shape):
                label = names.index(item.name)
                rows.append(Row(i, label, item.box, number, item.polygon, item.crowd))
            else:
                problems.append(Problem(f"{files[i]}: object {number}", item, SKIPPED_ROW, i))
    return Labels.of(rows)


def _partners(
    paths: Sequence[str], src: Path, suffix: str, problems: list[Problem]
) -> dict[int, Path]:
    """The file of each image: of its name next to it, else the only one of its name."""
    by_stem: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(src.rglob(f"*{suffix}")):
        by_stem[file.stem].append(file)
    partners: dict[int, Path] = {}
    for i, path in enumerate(map(Path, paths)):
        files = by_stem.get(path.stem, [])
        chosen = [file for file in files if file.parent == path.parent] or files
        if len(chosen) == 1:
            partners[i] = chosen[0]
        elif chosen:
            problems.append(
                Problem(str(path), f"may belong to {chosen[0]} or {chosen[1]}", image=i)
            )
    used = {*partners.values()}
    problems += [
        Problem(str(file), "no image with this name")
        for files in by_stem.values()
        for file in files
        if file not in used
    ]
    return partners


def _voc_lists(src: Path, known: set[str]) -> Mapping[str, list[str]]:
    """Stems by split of ImageSets/Main/<split>.txt; {} unless there are lists of train and val.

    Raises UserError for a name without an image, and for one in two lists.
    """
    lists: dict[str, list[str]] = {}
    owner: dict[str, Path] = {}
    files = {split: src / "ImageSets" / "Main" / f"{split}.txt" for split in SPLITS}
    if not (files["train"].is_file() and files["val"].is_file()):
        return lists
    for split, file in files.items():
        if not file.is_file():
            continue
        try:
            lines = read_bytes(file).decode("utf-8-sig").splitlines()
        except (ImageError, UnicodeDecodeError) as error:
            raise UserError(f"{file}: {error}") from error
        lists[split] = [line.split()[0] for line in lines if line.strip()]
        for number, stem in enumerate(lists[split], start=1):
            if stem not in known:
                hint = nearest(stem, known)
                raise UserError(f"{file}: entry {number}: no image {stem!r}{hint}")
            if stem in owner:
                raise UserError(f"{file}: entry {number}: {stem!r} is in {owner[stem]}, too")
            owner[stem] = file
    return lists


class _PlainTree(ET.TreeBuilder):
    def doctype(self, *_: Any) -> NoReturn:
        raise ValueError("has a DTD, which can define entities; remove it")


def read_voc(content: bytes) -> list[Shape | str]:
    """The objects of a VOC XML file, or why one cannot be used; 'difficult' ones are crowd regions.

    Boxes are xmin ymin xmax ymax as written.  Raises ValueError for what is not XML; a DTD
    (entities) is refused.
    """
    try:
        root = ET.fromstring(content, ET.XMLParser(target=_PlainTree()))
    except ET.ParseError as error:
        raise ValueError(f"not XML: {error}") from error
    objects: list[Shape | str] = []
    for item in root.iter("object"):
        name = (item.findtext("name") or "").strip()
        texts = [item.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        try:
            corners = [float(text or "nan") for text in texts]
        except ValueError:
            corners = [math.nan]
        crowd = item.findtext("difficult", "").strip() == "1"
        objects.append(_shape(name, corners, crowd=crowd, written=texts))
    return objects


def read_labelme(content: bytes) -> list[Shape | str]:
    """The objects of a labelme JSON file, or why one cannot be used.

    Rectangles, circles and masks become boxes, polygons boxes with an outline; points and lines
    have no area.  Raises ValueError for another file.
    """
    data = json.loads(content.decode("utf-8-sig"))
    if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
        raise ValueError("no list 'shapes'; not a file of labelme")  # noqa: TRY004
    objects: list[Shape | str] = []
    for item in data["shapes"]:
        shape = item if isinstance(item, dict) else {}
        kind, name = shape.get("shape_type", "polygon"), str(shape.get("label") or "").strip()
        try:
            points = np.array(shape.get("points"), np.float64).reshape(-1, 2)
        except (TypeError, ValueError):
            points = np.zeros((0, 2))
        if kind not in {"rectangle", "polygon", "circle", "mask"}:
            objects.append(f"a {kind} has no area")
        elif len(points) < (3 if kind == "polygon" else 2):
            objects.append(f"{kind} with the points {str(shape.get('points'))[:60]}")
        else:
            if kind == "circle":  # centre and a point of the edge
                radius = math.dist(points[0], points[1])
                points = np.array([points[0] - radius, points[0] + radius])
            corners = [*points.min(0).tolist(), *points.max(0).tolist()]
            outline = points.astype(np.float32) if kind == "polygon" else None
            objects.append(_shape(name, corners, polygon=outline, written=corners))
    return objects


def _shape(
    name: str,
    corners: Sequence[float],
    *,
    crowd: bool = False,
    polygon: np.ndarray | None = None,
    written: object,
) -> Shape | str:
    if not name:
        return "has no name"
    if len(corners) != 4 or not all(abs(value) < _FAR for value in corners):  # nan is not
        return f"{name}: box {written} is not four numbers under {_FAR:g}"
    x1, y1, x2, y2 = corners
    if x2 <= x1 or y2 <= y1:
        return f"{name}: box {written} has no area"
    return Shape(name, (x1, y1, x2, y2), crowd, polygon)
