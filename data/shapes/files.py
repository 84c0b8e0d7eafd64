"""Draw the embedded data set 'shapes', in COCO's format and with the same pixels everywhere.

train.py, val.py and compare.py draw it on first use.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from data.shapes.scene import NAMES, compose
from utils.config import option, parse
from utils.errors import UserError
from utils.files import home
from utils.seeding import generator
from utils.terminal import say

VERSION = 2  # of the drawing; a folder with another one is drawn anew
SEED = 20240229
SPLITS = {"train": 480, "val": 80}
CATEGORY_IDS = (3, 5, 8, 13, 17, 21, 34, 40, 55, 89)  # with gaps, as COCO's own
PNG_EVERY, JPEG_QUALITY = 8, 92  # every 8th image is a PNG, the others JPEG
VIDEO_NAME = "shapes.avi"
_STAMP = "version.json"
_DEFAULT_ROOT = Path("datasets", "shapes")  # in home()


@dataclass(frozen=True)
class ShapesConfig:
    """The command line of `python -m data.shapes`."""

    root: str = option("", help="folder of the data set; '': datasets/shapes in the project")


def scene(split: str, index: int) -> tuple[np.ndarray, list[dict[str, Any]]]:
    """Image `index` of 'train' or 'val' with its annotations, before any encoding."""
    return compose(generator(SEED, list(SPLITS).index(split), index))


def ensure_shapes(root: Path | None = None) -> Path:
    """Draw the data set into `root` unless it is there already; returns `root`.

    Layout: annotations/instances_{train,val}.json, train/, val/ and a short video.  The folder
    appears whole or not at all, and several processes may ask at once.  Raises UserError when
    `root` holds something else or cannot be written.
    """
    root = root or home() / _DEFAULT_ROOT
    try:
        while not _is_current(root):
            root.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{root.name}-", dir=root.parent) as scratch:
                folder = Path(scratch, "new")
                _draw(folder)
                if root.exists() and any(root.iterdir()) and not _is_current(root):
                    root.rename(folder.with_name("old"))
                try:
                    folder.rename(root)
                except OSError:  # another process may have been first
                    if not _is_current(root):
                        raise
    except OSError as error:
        raise UserError(f"{root}: cannot draw the data set: {error.strerror}") from error
    return root


def _is_current(root: Path) -> bool:
    """Whether `root` holds this version; False when it is free or holds an older version."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        return bool(json.loads((root / _STAMP).read_text(encoding="utf-8"))["shapes"] == VERSION)
    except Exception as error:
        raise UserError(
            f"{root}: not the data set 'shapes'; move this folder away or choose another one"
        ) from error


def _draw(folder: Path) -> None:
    """Write images, annotations and video into a new folder."""
    (folder / "annotations").mkdir(parents=True)
    categories = [{"id": i, "name": name} for i, name in zip(CATEGORY_IDS, NAMES, strict=True)]
    for number, (split, count) in enumerate(SPLITS.items(), 1):
        (folder / split).mkdir()
        images: list[dict[str, Any]] = []
        entries: list[dict[str, Any]] = []
        for index in tqdm(range(count), f"drawing {split}", dynamic_ncols=True, leave=False):
            image, annotations = scene(split, index)
            suffix, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
            if index % PNG_EVERY == 0:
                suffix, options = ".png", []
            _, data = cv2.imencode(suffix, np.ascontiguousarray(image[..., ::-1]), options)
            name, image_id = f"{index:04d}{suffix}", 1000 * number + index
            (folder / split / name).write_bytes(data.tobytes())
            height, width, _ = image.shape
            images.append({"id": image_id, "file_name": name, "width": width, "height": height})
            for entry in annotations:
                ids = {"id": len(entries) + 1, "image_id": image_id}
                entries.append({**entry, **ids, "category_id": CATEGORY_IDS[entry["category_id"]]})
        content = {"images": images, "annotations": entries, "categories": categories}
        text = json.dumps(content, separators=(",", ":"))
        (folder / "annotations" / f"instances_{split}.json").write_text(text, encoding="utf-8")
    _write_video(folder / VIDEO_NAME)
    (folder / _STAMP).write_text(json.dumps({"shapes": VERSION}), encoding="utf-8")


def _write_video(path: Path, *, frames: int = 30) -> None:
    """An .avi (Motion JPEG, 10 frames/s, 320x240): a camera moves over one wide scene."""
    image, _ = compose(generator(SEED, len(SPLITS)), (240 + 2 * frames, 320 + 4 * frames))
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (320, 240))
    if not writer.isOpened():
        raise UserError(f"{path}: OpenCV cannot write this video")
    for frame in range(frames):
        view = image[2 * frame : 2 * frame + 240, 4 * frame : 4 * frame + 320, ::-1]
        writer.write(np.ascontiguousarray(view))
    writer.release()


def main(argv: list[str] | None = None) -> int:
    """Draw the data set and print its folder."""
    config = parse(ShapesConfig, argv, prog="python -m data.shapes", description=__doc__ or "")
    say(f"shapes: {ensure_shapes(Path(config.root) if config.root else None)}")
    return 0
