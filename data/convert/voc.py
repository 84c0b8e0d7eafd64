"""Convert a data set with Pascal VOC XML files to COCO JSON."""

from __future__ import annotations

import json
import math
import re
import shutil
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

from utils.config import option, parse
from utils.errors import UserError, nearest
from utils.files import write_text
from utils.images import IMAGE_SUFFIXES, ImageError, read_image
from utils.terminal import say


@dataclass(frozen=True)
class VocConfig:
    """The command line of `python -m data.convert voc`."""

    images: str = option(help="folder of the images (JPEGImages)")
    annotations: str = option(help="folder of the XML files (Annotations)")
    split: tuple[str, ...] = option(help="lists of image names (ImageSets/Main/train.txt ...)")
    out: str = option(help="folder to create, with <split>/ and annotations/instances_<split>.json")
    classes: tuple[str, ...] = option((), help="class names in order (default: all, sorted)")
    supercategory: str = option("", help="'supercategory' of every class")
    description: str = option("", help="text of the JSON's 'info'; {split} is replaced")


# name; xmin ymin xmax ymax as written, whole numbers as int; difficult
VocObject = tuple[str, tuple[float, ...], bool]


@dataclass(frozen=True)
class VocImage:
    """An image of a split, with its objects in file order."""

    path: Path
    height: int
    width: int
    objects: list[VocObject]


def convert_voc(config: VocConfig) -> list[Path]:
    """Write one COCO JSON for each split, and copies of its images; returns the JSON files.

    Boxes are [xmin, ymin, xmax - xmin, ymax - ymin] of the XML. Objects marked difficult become
    crowd regions, which are neither trained on nor counted. The image id is the last number in the
    file name if these are unique, else 1, 2, ... Width and height are the image's, not the XML's.
    Raises UserError for missing or malformed input, and if a JSON file exists already.
    """
    out = Path(config.out)
    lists = {Path(file).stem: Path(file) for file in config.split}
    targets = {split: out / "annotations" / f"instances_{split}.json" for split in lists}
    if len(targets) < len(config.split):
        raise UserError("--split: two list files have the same name")
    for target in targets.values():
        if target.exists():
            raise UserError(f"{target} exists; remove it or name another --out")
    splits = {split: _read_split(config, lists[split]) for split in lists}
    names = _class_names(config, [image for images in splits.values() for image in images])
    for split, images in splits.items():
        info = {"description": config.description.replace("{split}", split)}
        content = {"info": info, **_coco(images, names, config.supercategory)}
        try:  # the JSON file last: if it exists, the split is complete
            for folder in (out / split, out / "annotations"):
                folder.mkdir(parents=True, exist_ok=True)
            for image in images:
                shutil.copyfile(image.path, out / split / image.path.name)
            write_text(targets[split], json.dumps(content))
        except OSError as error:
            raise UserError(f"{error.filename or out}: {error.strerror}") from error
    return list(targets.values())


def _read_split(config: VocConfig, file: Path) -> list[VocImage]:
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except Exception as error:
        raise UserError(f"--split {file}: {error}") from error
    folder = Path(config.images)
    if not folder.is_dir():
        raise UserError(f"--images {folder}: no such folder")
    by_stem = {p.stem: p for p in sorted(folder.iterdir()) if p.suffix.lower() in IMAGE_SUFFIXES}
    images: dict[str, VocImage] = {}
    bar = tqdm(lines, desc=file.stem, dynamic_ncols=True)
    for number, name in enumerate(map(str.strip, bar), start=1):
        if not name:
            continue
        if name in images:
            raise UserError(f"{file}:{number}: image {name!r} is listed twice")
        if name not in by_stem:
            hint = nearest(name, by_stem)
            raise UserError(f"{file}:{number}: no image {name!r} in {folder}{hint}")
        try:
            height, width = read_image(by_stem[name]).shape[:2]
        except ImageError as error:
            raise UserError(f"{by_stem[name]}: {error}") from error
        objects = read_voc(Path(config.annotations) / f"{name}.xml")
        images[name] = VocImage(by_stem[name], height, width, objects)
    if not images:
        raise UserError(f"--split {file}: the list is empty")
    return list(images.values())


class _PlainTree(ET.TreeBuilder):
    def doctype(self, *_: Any) -> NoReturn:
        raise ValueError("has a DTD, which can define entities; remove it")


def read_voc(file: Path) -> list[VocObject]:
    """The objects of one VOC XML file. Raises UserError; a DTD (entities) is refused."""
    try:
        root = ET.fromstring(file.read_bytes(), ET.XMLParser(target=_PlainTree()))
    except ET.ParseError as error:
        raise UserError(f"{file}:{error.position[0]}: not XML: {error}") from error
    except Exception as error:
        raise UserError(f"{file}: {error}") from error
    objects = []
    for number, item in enumerate(root.iter("object"), start=1):
        name = (item.findtext("name") or "").strip()
        texts = [item.findtext(f"bndbox/{corner}") for corner in ("xmin", "ymin", "xmax", "ymax")]
        where = f"{file}: object {number} ({name}): bndbox {texts}"
        if not name:
            raise UserError(f"{file}: object {number} has no name")
        try:
            values = [float(text or "nan") for text in texts]
        except ValueError:
            values = [math.nan]
        if not all(map(math.isfinite, values)):
            raise UserError(f"{where}: not four numbers")
        if values[2] < values[0] or values[3] < values[1]:
            raise UserError(f"{where}: max is less than min")
        corners = tuple(int(value) if value.is_integer() else value for value in values)
        objects.append((name, corners, item.findtext("difficult", "").strip() == "1"))
    return objects


def _class_names(config: VocConfig, images: Sequence[VocImage]) -> tuple[str, ...]:
    found = {name: image.path for image in images for name, _, _ in image.objects}
    if not config.classes:
        return tuple(sorted(found))
    if len(set(config.classes)) < len(config.classes):
        raise UserError(f"--classes: a name is given twice: {' '.join(config.classes)}")
    for name, path in found.items():
        if name not in config.classes:
            hint = nearest(name, config.classes)
            raise UserError(f"{path.stem}.xml: class {name!r} is not one of --classes{hint}")
    return config.classes


def _coco(images: Sequence[VocImage], names: Sequence[str], supercategory: str) -> dict[str, Any]:
    ids = [int((re.findall(r"\d+", image.path.stem) or ["0"])[-1]) for image in images]
    if len(set(ids)) < len(ids):
        ids = list(range(1, len(ids) + 1))
    numbered = sorted(zip(ids, images, strict=True), key=lambda pair: pair[0])
    annotations = [
        {
            "image_id": image_id,
            "category_id": names.index(name) + 1,
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "area": (x2 - x1) * (y2 - y1),
            "iscrowd": int(difficult),
        }
        for image_id, image in numbered
        for name, (x1, y1, x2, y2), difficult in image.objects
    ]
    return {
        "images": [
            {"id": i, "file_name": im.path.name, "width": im.width, "height": im.height}
            for i, im in numbered
        ],
        "annotations": [{"id": i, **entry} for i, entry in enumerate(annotations, start=1)],
        "categories": [
            {"id": i, "name": name, "supercategory": supercategory}
            for i, name in enumerate(names, start=1)
        ],
    }


def main(argv: list[str] | None = None) -> None:
    """`python -m data.convert voc --images DIR --annotations DIR --split FILE ... --out DIR`."""
    kind, *rest = argv or ["--help"]
    if kind in {"-h", "--help"}:
        say("usage: python -m data.convert voc [options]; see python -m data.convert voc --help")
        return
    if kind != "voc":
        raise UserError(f"unknown format {kind!r}; known: voc")
    config = parse(VocConfig, rest, prog="python -m data.convert voc", description=__doc__ or "")
    for file in convert_voc(config):
        say(str(file))
