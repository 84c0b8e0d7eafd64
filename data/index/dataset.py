"""Data set YAML -> DatasetConfig -> a scanned split."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.index.cache import cache_file, load_cache, save_cache
from data.index.coco import MAX_CLASSES, CocoSource, read_coco
from data.index.labels import build_index
from data.index.records import DataIndex
from data.index.scan import report_problems, scan_images
from data.index.yolo import YoloSource, read_yolo
from data.shapes.files import ensure_shapes
from utils.errors import UserError, nearest
from utils.paths import find_config
from utils.ranks import warn_main
from utils.yamlio import Document, load_yaml

SPLITS = ("train", "val", "test")
MAX_BAD = 0.5  # share of a split's images that may be unusable before it is refused
_KEYS = ("path", *SPLITS, "names", "nc", "generate")
_COCO_KEYS = ("images", "annotations")
_GENERATORS = {"shapes": ensure_shapes}


@dataclass(frozen=True)
class DatasetConfig:
    """A data set YAML, checked; whether its files exist is seen when a split is loaded."""

    file: Path
    root: Path
    splits: Mapping[str, YoloSource | CocoSource]
    names: tuple[str, ...] | None  # None: they come from the COCO JSON


def load_dataset_config(name_or_path: str) -> DatasetConfig:
    """Read a data set YAML: a path, or a name in cfg/data ('bccd', 'data/coco.yaml').

    A set with `generate: shapes` is drawn if it is not there. Raises UserError with file and line.
    """
    file = find_config(name_or_path, "data")
    document = load_yaml(file)
    data = document.mapping()
    for key in data:
        if key == "download":
            raise UserError(
                f"{document.at(key)}: 'download' is never run; fetch the data yourself, set "
                "'path' to its folder and remove this key"
            )
        if key not in _KEYS:
            raise UserError(f"{document.at(key)}: unknown key {key!r}{nearest(str(key), _KEYS)}")
    root = _path(document, file.parent.resolve(), data.get("path", "."), "path")
    splits = {
        key: _source(document, root, data[key], key) for key in SPLITS if data.get(key) is not None
    }
    if not splits:
        raise UserError(f"{file}: none of the keys {', '.join(SPLITS)} names any images")
    names = _names(document)
    if names is None and any(isinstance(item, YoloSource) for item in splits.values()):
        raise UserError(
            f"{file}: no key 'names'; YOLO label files do not hold the names of the classes"
        )
    if "generate" in data:
        generate = data["generate"]
        if generate not in list(_GENERATORS):
            known = ", ".join(_GENERATORS)
            raise UserError(
                f"{document.at('generate')}: generate: {generate!r}; the only value is {known}"
            )
        _GENERATORS[generate](root)
    return DatasetConfig(file, root, splits, names)


def load_split(
    config: DatasetConfig,
    split: str,
    *,
    progress: bool = True,
    single_cls: bool = False,
    max_bad: float = MAX_BAD,
) -> DataIndex:
    """Scan a split: read all labels, check all images, skip and report what is wrong.

    With `single_cls` all objects are of one class 'object'. The result of the scan is kept in the
    user's cache folder. Raises UserError when nothing is usable, or more than the share `max_bad`
    of the images is not.
    """
    source = config.splits.get(split)
    if source is None:
        raise UserError(f"{config.file}: no key {split!r}; it has {', '.join(config.splits)}")
    name = f"{config.file.stem}-{split}"
    file = cache_file(name, f"{config.root}\n{split}\n{source}")
    cached = load_cache(file)
    if isinstance(source, CocoSource):
        parsed = read_coco(source, config.names, known=cached.parsed)
    else:
        assert config.names is not None  # load_dataset_config has seen to it
        parsed = read_yolo(source, config.names, known=cached.parsed)
    checks = scan_images(parsed.entries, cached.checks, progress=progress)
    index = build_index(parsed, checks, single_cls=single_cls)
    # what could not even be read has no hash: it is not kept, and looked at each time
    fresh = any(
        check.edges and cached.checks.get(str(entry.path)) != check
        for entry, check in zip(parsed.entries, checks, strict=True)
    )
    if fresh or parsed is not cached.parsed:
        save_cache(file, parsed, checks)
    report = file.with_suffix(".txt")
    report_problems(index.problems, report)
    _check_usable(index, where=f"{config.file}: {split}", max_bad=max_bad)
    warn_main(f"{name}: {index.describe()}")
    return index


def _check_usable(index: DataIndex, *, where: str, max_bad: float) -> None:
    """Refuse a split with too few usable images; warn when it has no box."""
    skipped = index.skipped()
    total = skipped + len(index.records)
    first = next((p.text for p in index.problems if p.kind == "image"), "")
    if not total:
        raise UserError(f"{where}: no images found")
    if skipped / total > max_bad or not index.records:
        raise UserError(
            f"{where}: {skipped} of {total} images are unusable (limit {max_bad:.0%}); the first:"
            f" {first}"
        )
    if not index.boxes:
        warn_main(
            f"WARNING: {where}: NOT ONE BOX in {len(index.records)} images. Are the labels in the"
            " right folder (docs/data-formats.md)?"
        )


def _path(document: Document, base: Path, value: Any, *key: str | int) -> Path:
    name = ".".join(map(str, key))
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise UserError(f"{document.at(*key)}: {name}: expected a path, found {value!r}")
    try:
        return Path(os.path.normpath(base / Path(value).expanduser()))
    except RuntimeError as error:  # ~ of a user who does not exist
        raise UserError(f"{document.at(*key)}: {name}: {value}: {error}") from error


def _source(document: Document, root: Path, value: Any, key: str) -> YoloSource | CocoSource:
    if isinstance(value, dict):
        for name in value:
            if name not in _COCO_KEYS:
                hint = nearest(str(name), _COCO_KEYS)
                raise UserError(f"{document.at(key, name)}: unknown key {key}.{name}{hint}")
        images, annotations = (
            _path(document, root, value.get(name), key, name) for name in _COCO_KEYS
        )
        return CocoSource(images, annotations, f"{document.at(key)}: {key}")
    items = value if isinstance(value, list) else [value]
    if not items:
        raise UserError(f"{document.at(key)}: {key}: an empty list")
    keys = [(key, i) if isinstance(value, list) else (key,) for i in range(len(items))]
    return YoloSource(
        paths=tuple(_path(document, root, item, *at) for item, at in zip(items, keys, strict=True)),
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
    if not isinstance(found, dict | list):
        raise UserError(f"{document.at('names')}: names: expected a list, found {found!r}")
    if not 0 < len(found) <= MAX_CLASSES:
        raise UserError(
            f"{document.at('names')}: names: {len(found)} classes; expected 1 to {MAX_CLASSES}"
        )
    if isinstance(found, dict):
        for key in found:
            if type(key) is not int or not 0 <= key < len(found):
                raise UserError(
                    f"{document.at('names', str(key))}: names: {len(found)} classes have the keys "
                    f"0 to {len(found) - 1}, found {key!r}"
                )
        names = _unique(document, {i: (found[i], str(i)) for i in range(len(found))})
    else:
        names = _unique(document, {i: (name, i) for i, name in enumerate(found)})
    if count is not None and (type(count) is not int or count != len(names)):
        raise UserError(f"{document.at('nc')}: nc is {count!r}, but {len(names)} names are given")
    return names


def _unique(document: Document, found: Mapping[int, tuple[Any, str | int]]) -> tuple[str, ...]:
    """Names by class, each with its key in the document; text, and no two alike."""
    names: dict[str, int] = {}
    for i, (value, key) in found.items():
        where = document.at("names", key)
        # unquoted no, yes, on, off and ~ are not text to YAML
        if isinstance(value, bool) or not isinstance(value, str | int | float) or value == "":
            raise UserError(f"{where}: names: class {i} is {value!r}; put the name in quotes")
        if str(value) in names:
            raise UserError(f"{where}: names: {value!r} names both {names[str(value)]} and {i}")
        names[str(value)] = i
    return tuple(names)
