"""The embedded data set 'shapes': drawn on first use, the same bits every time, in COCO's form.

`python -m data.shapes [--root datasets/shapes]` draws it by hand; train.py does so by itself.
"""

from __future__ import annotations

import json
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from data.shapes.outlines import Pose
from data.shapes.paint import background
from data.shapes.scene import NAMES, Figure, Item, Scene, compose, paint_figures, plan_figures
from utils.config import option, parse
from utils.errors import UserError
from utils.paths import ROOT
from utils.seeding import generator

VERSION = 1  # of the drawing; a folder with another one is drawn anew
SEED = 20240229
SPLITS = {"train": 480, "val": 80}
CATEGORY_IDS = (3, 5, 8, 13, 17, 21, 34, 40, 55, 89)  # with gaps, as COCO's own
PNG_EVERY = 8  # every 8th image is a PNG, the others JPEG
JPEG_QUALITY = 92
VIDEO_NAME = "shapes.avi"
_STAMP = "version.json"
_VIDEO_SIZE = (240, 320)  # height, width
_DEFAULT_ROOT = ROOT / "datasets" / "shapes"


@dataclass(frozen=True)
class ShapesConfig:
    """The command line of `python -m data.shapes`."""

    root: str = option(str(_DEFAULT_ROOT), help="folder of the data set")


def scene(split: str, index: int) -> Scene:
    """Image `index` of 'train' or 'val' with its annotations, before any encoding."""
    return compose(generator(SEED, list(SPLITS).index(split), index))


def ensure_shapes(root: Path = _DEFAULT_ROOT, *, progress: bool = True) -> Path:
    """Draw the data set into `root` unless it is there already; returns `root`.

    Layout: annotations/instances_{train,val}.json, train/, val/ and a short video.  The folder
    appears whole or not at all, and several processes may ask at once.  Raises UserError when
    `root` holds something else or cannot be written.
    """
    root = Path(root)
    try:
        while not _is_current(root):
            with _scratch_beside(root) as folder:
                _draw(folder, progress=progress)
                _put_in_place(folder, root)
    except OSError as error:
        raise UserError(f"{root}: cannot draw the data set: {error.strerror}") from error
    return root


def make_video(path: Path, *, frames: int = 30, seed: int = SEED) -> Path:
    """Write an .avi (Motion JPEG, 10 frames/s) of objects that drift and turn; returns `path`."""
    rng = generator(seed, len(SPLITS))
    ground = background(rng, _VIDEO_SIZE)
    figures = plan_figures(rng, _VIDEO_SIZE)
    drift = rng.uniform(-2.5, 2.5, (len(figures), 3))
    codec = cv2.VideoWriter.fourcc(*"MJPG")
    writer = cv2.VideoWriter(str(path), codec, 10.0, (_VIDEO_SIZE[1], _VIDEO_SIZE[0]))
    if not writer.isOpened():
        raise UserError(f"{path}: OpenCV cannot write this video")
    try:
        for frame in range(frames):
            canvas = replace(ground, image=ground.image.copy(), owner=ground.owner.copy())
            moved = [_moved(figure, drift[i] * frame) for i, figure in enumerate(figures)]
            paint_figures(generator(seed, len(SPLITS), 0), canvas, moved)
            image = canvas.finish(generator(seed, len(SPLITS), 1))
            writer.write(np.ascontiguousarray(image[..., ::-1]))
    finally:
        writer.release()
    return path


def _moved(figure: Figure, offset: np.ndarray) -> Figure:
    """The figure after drifting by (x, y) pixels and turning; it comes back from the edges."""
    height, width = _VIDEO_SIZE
    x = _bounced(figure.pose.centre[0] + offset[0], width)
    y = _bounced(figure.pose.centre[1] + offset[1], height)
    pose = Pose((x, y), figure.pose.size, figure.pose.angle + 0.02 * offset[2], figure.pose.squeeze)
    return replace(figure, pose=pose)


def _bounced(value: float, limit: int) -> float:
    return limit - abs(limit - value % (2 * limit))


def _is_current(root: Path) -> bool:
    """Whether `root` holds this version; False when it is free or holds an older version."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        stamp = json.loads((root / _STAMP).read_text(encoding="utf-8"))
        return bool(stamp["shapes"] == VERSION)
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"{root}: not the data set 'shapes'; move this folder away or choose another one"
        ) from None


@contextmanager
def _scratch_beside(root: Path) -> Iterator[Path]:
    """A new folder on the same file system, gone afterwards unless it was renamed."""
    root.parent.mkdir(parents=True, exist_ok=True)
    folder = root.with_name(f".{root.name}-{secrets.token_hex(6)}")
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _put_in_place(folder: Path, root: Path) -> None:
    """Rename `folder` to `root`; where another process was first, leave its folder."""
    if root.exists() and any(root.iterdir()) and not _is_current(root):
        old = folder.with_name(folder.name + "-old")
        root.rename(old)
        shutil.rmtree(old, ignore_errors=True)
    try:
        folder.rename(root)
    except OSError:
        if not _is_current(root):
            raise


def _draw(folder: Path, *, progress: bool) -> None:
    (folder / "annotations").mkdir()
    total = sum(SPLITS.values())
    with tqdm(
        total=total, desc="drawing shapes", dynamic_ncols=True, leave=False, disable=not progress
    ) as bar:
        for split, count in SPLITS.items():
            (folder / split).mkdir()
            document = _empty_document(split)
            for index in range(count):
                drawn = scene(split, index)
                image = _image_entry(split, index, drawn)
                _write_image(folder / split / image["file_name"], drawn.image)
                document["images"].append(image)
                _append_annotations(document["annotations"], image["id"], drawn.items)
                bar.update()
            path = folder / "annotations" / f"instances_{split}.json"
            path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    make_video(folder / VIDEO_NAME)
    (folder / _STAMP).write_text(json.dumps({"shapes": VERSION}), encoding="utf-8")


def _empty_document(split: str) -> dict[str, Any]:
    return {
        "info": {"description": f"FeatherDet shapes, split {split}, version {VERSION}"},
        "categories": [
            {"id": category, "name": name}
            for category, name in zip(CATEGORY_IDS, NAMES, strict=True)
        ],
        "images": [],
        "annotations": [],
    }


def _image_entry(split: str, index: int, drawn: Scene) -> dict[str, Any]:
    suffix = "png" if index % PNG_EVERY == 0 else "jpg"
    return {
        "id": 1000 * (1 + list(SPLITS).index(split)) + index,
        "file_name": f"{index:04d}.{suffix}",
        "width": drawn.image.shape[1],
        "height": drawn.image.shape[0],
    }


def _append_annotations(
    annotations: list[dict[str, Any]], image_id: int, items: tuple[Item, ...]
) -> None:
    """Add COCO's form of `items`: boxes as x, y, width, height."""
    for item in items:
        left, top, right, bottom = item.box
        annotations.append(
            {
                "id": len(annotations) + 1,
                "image_id": image_id,
                "category_id": CATEGORY_IDS[item.label],
                "bbox": [left, top, right - left, bottom - top],
                "area": item.area,
                "iscrowd": int(item.crowd is not None),
                "segmentation": item.crowd or item.polygons,
            }
        )


def _write_image(path: Path, image: np.ndarray) -> None:
    options = [] if path.suffix == ".png" else [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
    done, data = cv2.imencode(path.suffix, np.ascontiguousarray(image[..., ::-1]), options)
    if not done:
        raise OSError(None, f"cannot encode {path.name}")
    path.write_bytes(data.tobytes())


def main(argv: list[str] | None = None) -> int:
    """Draw the data set and say where it lies."""
    config = parse(ShapesConfig, argv, prog="python -m data.shapes", description=__doc__ or "")
    root = ensure_shapes(Path(config.root))
    sys.stdout.write(f"shapes: {root}\n")
    return 0
