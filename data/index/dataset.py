"""Data set YAML -> DatasetConfig -> a scanned split."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.index.cache import cache_file, load_cache, save_cache
from data.index.coco import MAX_CLASSES, CocoSource, read_coco
from data.index.columns import Records, Texts
from data.index.records import SKIPPED_IMAGE, DataIndex, build_index
from data.index.scan import report_problems, scan_images
from data.index.yolo import YoloSource, read_yolo
from data.shapes.files import ensure_shapes
from utils.errors import UserError, nearest
from utils.files import ROOT, find_config, home
from utils.terminal import warn_main
from utils.yamlio import Document, load_yaml

SPLITS = ("train", "val", "test")
SHIPPED = ROOT / "cfg" / "data"
MAX_BAD = 0.5  # share of a split's images that may be unusable before it is refused
_KEYS = ("path", *SPLITS, "names", "nc", "generate")
_COCO_KEYS = ("images", "annotations")
_NAMED = 5  # classes that a warning names
_MISSPELT = 0.75  # similarity of a key to one of ours from which it is not another program's


@dataclass(frozen=True)
class DatasetConfig:
    """A data set YAML, checked; whether its files exist is seen when a split is loaded."""

    file: Path
    root: Path
    splits: Mapping[str, YoloSource | CocoSource]
    names: tuple[str, ...] | None  # None: they come from the COCO JSON


def load_dataset_config(name_or_path: str) -> DatasetConfig:
    """Read a data set YAML: a path, its folder, or a name in cfg/data ('bccd', 'data/coco.yaml').

    Keys that other programs write ('roboflow', 'license', ...) are ignored with one line; one that
    looks like a misspelt key is an error. A set with `generate: shapes` is drawn if it is not
    there. Raises UserError with file and line.
    """
    file = find_config(name_or_path, "data")
    document = load_yaml(file)
    data = document.mapping()
    foreign = [str(key) for key in data if key not in _KEYS]
    for key in foreign:
        if hint := nearest(key, _KEYS, cutoff=_MISSPELT):
            raise UserError(f"{document.at(key)}: unknown key {key!r}{hint}")
    if foreign:
        never = " ('download' is never run: fetch the data yourself)" if "download" in data else ""
        warn_main(f"{file}: ignored: {', '.join(foreign)}{never}")
    base = file.parent.resolve()
    if base == SHIPPED:  # not into the folder of installed packages
        base = home() / SHIPPED.relative_to(ROOT)
    root = _path(document, base, data.get("path", "."), "path")
    splits = {
        key: _source(document, root, data[key], key) for key in SPLITS if data.get(key) is not None
    }
    if not splits:
        raise UserError(f"{file}: none of the keys {', '.join(SPLITS)} names any images")
    names = _names(document)
    if names is None and any(isinstance(item, YoloSource) for item in splits.values()):
        raise UserError(f"{file}: no key 'names'; YOLO label files hold no class names")
    if "generate" in data:
        if data["generate"] != "shapes":
            where = document.at("generate")
            raise UserError(f"{where}: generate: {data['generate']!r}; the only value is shapes")
        ensure_shapes(root)
    return DatasetConfig(file, root, splits, names)


def load_split(
    config: DatasetConfig, split: str, *, single_cls: bool = False, decode: bool = False
) -> DataIndex:
    """Scan a split: read all labels, check all images, skip and report what is wrong.

    With `single_cls` all objects are of one class 'object'. The result of the scan is kept in the
    user's cache folder; with `decode` it is made anew, and every image is decoded. Raises UserError
    when nothing is usable, or more than the share MAX_BAD of the images is not.
    """
    source = config.splits.get(split)
    if source is None:
        raise UserError(
            f"{config.file}: no key {split!r}; it has {', '.join(config.splits)} "
            "(python -m data.convert splits a data set anew)"
        )
    name = f"{config.file.stem}-{split}"
    file = cache_file(name, f"{config.root}\n{split}\n{source}")
    known, known_checks = load_cache(file)
    if isinstance(source, CocoSource):
        parsed = read_coco(source, config.names, known=known)
    else:
        assert config.names is not None  # load_dataset_config has seen to it
        parsed = read_yolo(source, config.names, known=known)
    paths = parsed.entries.paths
    known_paths = known.entries.paths if known else Texts.of(())
    checks = scan_images(paths, known_paths, known_checks, decode=decode)
    if parsed is not known or checks != known_checks:
        save_cache(file, parsed, checks)
    index = build_index(parsed, checks, single_cls=single_cls)
    report_problems(index.problems, file.with_suffix(".txt"))
    where, skipped = f"{config.file}: {split}", index.skipped()
    total = skipped + len(index.records)
    if not total:
        raise UserError(f"{where}: no images found")
    if skipped / total > MAX_BAD or not index.records:
        first = next(problem.text for problem in index.problems if problem.kind == SKIPPED_IMAGE)
        raise UserError(
            f"{where}: {skipped} of {total} images are unusable (limit {MAX_BAD:.0%}); the first:"
            f" {first}"
        )
    if not index.boxes:
        warn_main(
            f"WARNING: {where}: no box in any of the {len(index.records)} images; are the labels in"
            " the right folder (docs/data-formats.md)?"
        )
    elif split == "train":  # a class that is never trained is never found
        columns = Records.of(index.records)
        present = np.bincount(columns.labels[~columns.crowd], minlength=len(index.names))
        if missing := [text for text, n in zip(index.names, present, strict=True) if not n]:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            warn_main(f"WARNING: {where}: no box of {', '.join(missing[:_NAMED])}{more}")
    warn_main(f"{name}: {index.describe()}")
    return index


def _path(document: Document, base: Path, value: Any, *key: str | int) -> Path:
    name = ".".join(map(str, key))
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{document.at(*key)}: {name}: expected a path, found {value!r}")
    try:
        return Path(os.path.normpath(base / Path(value).expanduser()))
    except RuntimeError as error:  # ~ of a user who does not exist
        raise UserError(f"{document.at(*key)}: {name}: {value}: {error}") from error


def _split_path(document: Document, root: Path, value: Any, *key: str | int) -> Path:
    """As `_path`; Roboflow writes ../train/images for the train/images next to its data.yaml."""
    path = _path(document, root, value, *key)
    inside = Path(os.path.normpath(root / value.removeprefix("../")))
    if inside != path and not os.path.lexists(path) and os.path.lexists(inside):
        warn_main(f"{document.at(*key)}: {value} does not exist; {inside} is used")
        return inside
    return path


def _source(document: Document, root: Path, value: Any, key: str) -> YoloSource | CocoSource:
    if isinstance(value, dict):
        for name in value:
            if name not in _COCO_KEYS:
                hint = nearest(str(name), _COCO_KEYS)
                raise UserError(f"{document.at(key, name)}: unknown key {key}.{name}{hint}")
        for name in _COCO_KEYS:
            if value.get(name) is None:
                raise UserError(
                    f"{document.at(key)}: {key}.{name} is missing; a COCO split is "
                    f"{key}: {{images: DIR, annotations: FILE.json}}"
                )
        images, annotations = (
            _split_path(document, root, value[name], key, name) for name in _COCO_KEYS
        )
        return CocoSource(images, annotations, f"{document.at(key)}: {key}")
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError(f"{document.at(key)}: {key}: an empty list")
    keys = [(key, i) if isinstance(value, list) else (key,) for i in range(len(items))]
    return YoloSource(
        paths=tuple(
            _split_path(document, root, item, *at) for item, at in zip(items, keys, strict=True)
        ),
        where=tuple(f"{document.at(*at)}: {key}" for at in keys),
        root=root,
    )


def _names(document: Document) -> tuple[str, ...] | None:
    """Class names from a list or a mapping 0..n-1, agreeing with `nc`."""
    data = document.mapping()
    found, count = data.get("names"), data.get("nc")
    if found is None:
        if count is not None:
            raise UserError(f"{document.at('nc')}: 'nc' without 'names'")
        return None
    if not isinstance(found, dict | list) or not 0 < len(found) <= MAX_CLASSES:
        where, wrong = document.at("names"), len(found) if isinstance(found, dict | list) else found
        raise UserError(
            f"{where}: names: expected a list of 1 to {MAX_CLASSES} names, found {wrong!r}"
        )
    keys = [*found] if isinstance(found, dict) else [*range(len(found))]
    for key in keys:
        if type(key) is not int or not 0 <= key < len(found):
            raise UserError(
                f"{document.at('names', str(key))}: names: {len(found)} classes have the keys "
                f"0 to {len(found) - 1}, found {key!r}"
            )
    names: dict[str, int] = {}
    for i in range(len(found)):
        name, where = found[i], document.at("names", str(i) if isinstance(found, dict) else i)
        # unquoted no, yes, on, off and ~ are not text to YAML
        if isinstance(name, bool) or not isinstance(name, str | int | float) or name == "":
            raise UserError(f"{where}: names: class {i} is {name!r}; put the name in quotes")
        if str(name) in names:
            raise UserError(f"{where}: names: {name!r} names both {names[str(name)]} and {i}")
        names[str(name)] = i
    if count is not None and (type(count) is not int or count != len(names)):
        raise UserError(f"{document.at('nc')}: nc is {count!r}, but {len(names)} names are given")
    return tuple(names)
