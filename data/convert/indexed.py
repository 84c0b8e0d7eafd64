"""YOLO and COCO data sets as annotation tools export them, read as for training."""

from __future__ import annotations

import json
from pathlib import Path

from data.convert.splits import Converted
from data.index.coco import CocoSource, image_file
from data.index.dataset import SPLITS, DatasetConfig, load_dataset_config, load_split
from data.index.yolo import YoloSource
from utils.errors import UserError
from utils.images import ImageError, read_bytes

_ALIASES = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
_FOLDERS = ("images/{}", "{}/images", "{}", "obj_{}_data")  # the last of CVAT and darknet
# Of Label Studio and labelImg; of CVAT and darknet
_NAME_FILES = ("classes.txt", "labels/classes.txt", "obj.names")
_MAX_BYTES = 8 << 30


def read_yolo_folder(src: Path, classes: tuple[str, ...]) -> Converted:
    """A folder with a data set YAML, or with images, label files and the names of the classes."""
    if not classes and any(item.suffix in {".yaml", ".yml"} for item in src.iterdir()):
        return _load(load_dataset_config(str(src.resolve())))
    files = [src / name for name in _NAME_FILES if (src / name).is_file()]
    if not classes and not files:
        raise UserError(
            f"{src}: neither a data.yaml nor {' nor '.join(_NAME_FILES[::2])}; name the classes in"
            " the order of their numbers: --classes cat dog"
        )
    if not classes:
        try:
            lines = read_bytes(files[0]).decode("utf-8-sig").splitlines()
        except (ImageError, UnicodeDecodeError) as error:
            raise UserError(f"{files[0]}: {error}") from error
        classes = tuple(line.strip() for line in lines if line.strip())
        if not classes or len({*classes}) < len(classes):
            raise UserError(f"{files[0]}: expected one name per line, all different")
    folders = {split: _folder(src, split) for split in SPLITS}
    if not (folders["train"] and folders["val"]):
        folders = {"train": src}
    splits = {
        split: YoloSource((folder,), (str(src),), src)
        for split, folder in folders.items()
        if folder
    }
    return _load(DatasetConfig(src / "data", src, splits, classes))


def read_coco_folder(src: Path, images: Path | None) -> Converted:
    """A COCO JSON, or a folder with one for each split and the images.

    Raises UserError where it is not clear which JSON is which split or where the images are.
    """
    files = [src] if src.is_file() else sorted(src.rglob("*.json"))
    files = [file for file in files if file.name.startswith("instances_")] or files
    splits: dict[str, CocoSource] = {}
    for file in files:
        name = _first_image(file)
        if name is None:
            continue
        texts = (file.stem.lower(), file.parent.name.lower())
        split = next((s for text in texts for s in SPLITS if s in text), "train")
        split = "train" if len(files) == 1 else split
        if split in splits:
            raise UserError(
                f"{src}: {splits[split].annotations} and {file} could both be {split}; give one"
                " file as SRC"
            )
        folder = images or _image_folder(file, src, split, name)
        splits[split] = CocoSource(folder, file, str(file))
    if "train" not in splits:
        raise UserError(f"{src}: no COCO JSON ('images', 'categories') of a training set")
    return _load(DatasetConfig(src, src, splits, None))


def _folder(src: Path, split: str) -> Path | None:
    """Where the images of a split are by their folder's name."""
    names = (pattern.format(alias) for alias in _ALIASES[split] for pattern in _FOLDERS)
    return next((src / name for name in names if (src / name).is_dir()), None)


def _first_image(file: Path) -> str | None:
    """The first file name in a COCO JSON; None for another JSON."""
    try:
        data = json.loads(read_bytes(file, limit=_MAX_BYTES))
        assert isinstance(data["categories"], list)
        return str(data["images"][0]["file_name"])
    except (ImageError, ValueError, RecursionError, LookupError, TypeError, AssertionError):
        return None


def _image_folder(file: Path, src: Path, split: str, name: str) -> Path:
    """The folder where image `name` is, straight or by the last part of its name."""
    part = file.stem.removeprefix("instances_")
    homes = [file.parent, file.parent / "images"]
    if src.is_dir():
        homes += [
            src,
            src / part,
            src / "images",
            src / "images" / part,
            _folder(src, split) or src,
        ]
    for home in homes:
        if image_file(home, name).is_file():
            return home
    raise UserError(
        f"{file}: its first image {name} is not in {homes[0]} or its folder images; say where the "
        "images are: --images DIR"
    )


def _load(config: DatasetConfig) -> Converted:
    found = {split: load_split(config, split) for split in config.splits}
    first, *others = found.values()
    if any((i.names, i.category_ids) != (first.names, first.category_ids) for i in others):
        raise UserError(
            f"{config.root}: the splits have different classes; convert each one separately"
        )
    problems = tuple(problem for index in found.values() for problem in index.problems)
    records = {split: index.records for split, index in found.items()}
    return Converted(records, first.names, first.category_ids, problems)
