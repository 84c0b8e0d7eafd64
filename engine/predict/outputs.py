"""What a detection run leaves behind: annotated copies, label files, a table, crops."""

from __future__ import annotations

import csv
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.sources.frames import Frame
from engine.predict.config import DetectConfig
from engine.predict.result import Result
from utils.boxes import yolo_rows
from utils.drawing import write_image
from utils.errors import UserError
from utils.files import new_run_dir, writing
from utils.terminal import say

# Copies keep their format; the rest (.gif) becomes JPEG.
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
CODEC = "mp4v"  # in every OpenCV build; H.264 is not
USUAL_FPS = 30.0  # where a source names none
COLUMNS = ("source", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2")
NAME_BYTES = 200  # of a file name's stem; file systems allow 255 with numbers and suffix


class Outputs:
    """The files of one run, in project/name, a folder made when the first one is due.

    A context manager: leaving it, by an error too, finishes videos and the table and prints where
    the results are.  `inputs` are the files to be read; an existing run folder that contains one of
    them is refused (UserError).
    """

    def __init__(self, config: DetectConfig, *, inputs: Sequence[Path] = ()) -> None:
        self.folder: Path | None = None
        self._config = config
        self._stems: dict[int, str] = {}
        self._taken: set[str] = set()
        self._videos: dict[int, _Video] = {}
        self._has_table = False
        base = Path(config.project) / config.name
        for path in inputs if config.exist_ok and config.writes else ():
            if base.resolve() in {*path.resolve().parents, *path.absolute().parents}:
                raise UserError(
                    f"{base}: the run folder contains the source {path}; choose another --project "
                    "or --name, so that nothing is overwritten"
                )

    def __enter__(self) -> Outputs:
        return self

    def __exit__(self, *exception: object) -> None:
        for video in self._videos.values():
            video.close()
        if self.folder is not None:
            say(f"Results saved to {self.folder}")
        if exception[0] is None:
            for video in self._videos.values():
                video.check()

    def write(self, result: Result, *, draw: bool = False) -> np.ndarray:
        """Write everything asked for about one frame of a source.

        Returns the annotated image if it is saved, or asked for by `draw`; else the plain one.
        UserError names a file that cannot be written.
        """
        frame, config = result.frame, self._config
        assert frame is not None  # of a source
        drawn = result.image
        if draw or not config.nosave:
            drawn = result.plot(
                thickness=config.line_thickness,
                hide_labels=config.hide_labels,
                hide_conf=config.hide_conf,
            )
        if not config.writes:
            return drawn
        if self.folder is None:
            self.folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok)
        stem = self._stem(frame)
        name = stem if frame.kind == "image" else self._unique(f"{stem}_{frame.number}")
        if not config.nosave:
            self._save(self.folder, stem, frame, drawn)
        if config.save_txt:
            path = self.folder / "labels" / f"{name}.txt"
            found = result.detections
            rows = yolo_rows(
                found.boxes.numpy(),
                found.labels.tolist(),
                (result.image.shape[0], result.image.shape[1]),
                scores=found.scores.numpy() if config.save_conf else None,
                digits=".6f",
            )
            with writing(path):
                path.parent.mkdir(exist_ok=True)
                path.write_text(rows, encoding="utf-8")
        if config.save_csv:
            self._append(self.folder / "predictions.csv", result, frame)
        if config.save_crop:
            _write_crops(self.folder / "crops", name, result)
        return drawn

    def _stem(self, frame: Frame) -> str:
        """The name of a source's files, different for each source of the run."""
        if frame.item not in self._stems:
            wanted = frame.path.stem if frame.path else safe_name(frame.label.split("://")[-1])
            self._stems[frame.item] = self._unique(_short(wanted))
        return self._stems[frame.item]

    def _unique(self, wanted: str) -> str:
        name, number = wanted, 1
        while name.casefold() in self._taken:
            number += 1
            name = f"{wanted}_{number}"
        self._taken.add(name.casefold())
        return name

    def _save(self, folder: Path, stem: str, frame: Frame, image: np.ndarray) -> None:
        if frame.kind == "image":
            suffix = frame.path.suffix.lower() if frame.path else ".jpg"
            write_image(folder / (stem + (suffix if suffix in SUFFIXES else ".jpg")), image)
            return
        if frame.kind == "video":  # the ones before it are complete; streams run in parallel
            for item in self._videos.keys() - {frame.item}:
                video = self._videos.pop(item)
                video.close()
                video.check()
        if frame.item not in self._videos:
            fps = (frame.fps or USUAL_FPS) / self._config.vid_stride  # as long as its source
            self._videos[frame.item] = _Video(folder / f"{stem}.mp4", fps, image.shape[:2])
        self._videos[frame.item].write(image)

    def _append(self, path: Path, result: Result, frame: Frame) -> None:
        mode = "a" if self._has_table else "w"
        with writing(path), path.open(mode, newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            if not self._has_table:
                table.writerow(COLUMNS)
            self._has_table = True
            columns = (item.tolist() for item in vars(result.detections).values())
            for box, score, label in zip(*columns, strict=True):
                values = (f"{score:.5f}", *(f"{value:.2f}" for value in box))
                table.writerow((frame.label, frame.number, label, result.names[label], *values))


class _Video:
    """An mp4 file; frames of another size than the first are scaled to it."""

    def __init__(self, path: Path, fps: float, size: tuple[int, ...]) -> None:
        self._path = path
        self._size = (size[1], size[0])
        code = cv2.VideoWriter.fourcc(*CODEC)
        self._writer = cv2.VideoWriter(str(path), code, fps, self._size)
        if not self._writer.isOpened():
            raise UserError(f"{path}: cannot write a video of {size[1]}x{size[0]} pixels here")

    def write(self, image: np.ndarray) -> None:
        if (image.shape[1], image.shape[0]) != self._size:
            image = cv2.resize(image, self._size, interpolation=cv2.INTER_AREA)
        self._writer.write(cv2.cvtColor(image, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()

    def check(self) -> None:
        """Read it back. UserError for an incomplete file: OpenCV does not report a full disk."""
        written = cv2.VideoCapture(str(self._path))
        whole = written.isOpened() and written.read()[0]
        written.release()
        if not whole:
            raise UserError(f"{self._path}: the video could not be written; is the disk full?")


def safe_name(text: str) -> str:
    """`text` as one part of a path: letters, digits, '-', '.', ' ' and '_' only."""
    return _short(re.sub(r"[^\w\-. ]+", "_", text).strip("._ ")[:100]) or "unnamed"


def _short(name: str) -> str:
    """`name`, cut to what every file system takes with a number and a suffix behind it."""
    data = name.encode("utf-8", "surrogateescape")
    return name if len(data) <= NAME_BYTES else data[:NAME_BYTES].decode("utf-8", "ignore")


def _write_crops(folder: Path, name: str, result: Result) -> None:
    """crops/<class>/<name>_<n>.jpg of the untouched pixels, n counted from 1 per image."""
    height, width = result.image.shape[:2]
    boxes, labels = result.detections.boxes.round().int().tolist(), result.detections.labels
    for number, (box, label) in enumerate(zip(boxes, labels.tolist(), strict=True), 1):
        left, top = min(box[0], width - 1), min(box[1], height - 1)
        right, bottom = max(box[2], left + 1), max(box[3], top + 1)
        path = folder / safe_name(result.names[label]) / f"{name}_{number}.jpg"
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_image(path, result.image[top:bottom, left:right])
