"""What a detection run leaves behind: annotated copies, label files, a table, crops."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

import cv2
import numpy as np

from data.sources.frames import Frame
from engine.predict.predictor import Result
from utils.drawing import write_image
from utils.errors import UserError
from utils.paths import new_run_dir
from utils.terminal import warn

# Copies keep their format; the rest (.gif) becomes JPEG.
SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})
CODEC = "mp4v"  # in every OpenCV build; H.264 is not
USUAL_FPS = 30.0  # where a source names none
COLUMNS = ("source", "frame", "class", "name", "confidence", "x1", "y1", "x2", "y2")


@dataclass(frozen=True)
class OutputConfig:
    """Which files are written, and how boxes are drawn."""

    save: bool = True
    txt: bool = False
    conf: bool = False
    csv: bool = False
    crop: bool = False
    thickness: int | None = None
    hide_labels: bool = False
    hide_conf: bool = False
    stride: int = 1  # of video frames, so that a copy plays as long as its source

    @property
    def any(self) -> bool:
        """Whether there is anything to write."""
        return self.save or self.txt or self.csv or self.crop


class Outputs:
    """The files of one run, in project/name, a folder made when the first one is due.

    A context manager: leaving it, by an error too, finishes videos and the table.  `inputs` are the
    files to be read; an existing run folder that holds one of them is refused (UserError).
    `report` is told where the results are.
    """

    def __init__(
        self,
        project: str,
        name: str,
        config: OutputConfig,
        *,
        inputs: Sequence[Path] = (),
        exist_ok: bool = False,
        report: Callable[[str], None] = warn,
    ) -> None:
        self.folder: Path | None = None
        self._place = (project, name, exist_ok)
        self._config = config
        self._report = report
        self._stems: dict[int, str] = {}
        self._taken: set[str] = set()
        self._videos: dict[int, _Video] = {}
        self._table: IO[str] | None = None
        if exist_ok and config.any:
            _refuse_inputs_in(Path(project) / name, inputs)

    def __enter__(self) -> Outputs:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        videos = list(self._videos.values())
        self._videos.clear()
        for video in videos:
            video.close()
        if self._table is not None:
            self._table.close()
            self._table = None
        if self.folder is not None:
            self._report(f"Results saved to {self.folder}")
        if error is None:
            for video in videos:
                video.check()

    def write(self, result: Result, *, draw: bool = False) -> np.ndarray:
        """Write everything asked for about one frame.

        Back comes the annotated image if it is saved, or asked for by `draw`; else the plain one.
        """
        frame = result.frame
        if frame is None:
            raise ValueError("Outputs.write needs a result that knows its frame")
        drawn = self._draw(result) if draw or self._config.save else result.image
        if self._config.any:
            self._write(self._make_folder(), frame, result, drawn)
        return drawn

    def _write(self, folder: Path, frame: Frame, result: Result, drawn: np.ndarray) -> None:
        stem = self._stem(frame)
        name = stem if frame.kind == "image" else self._unique(f"{stem}_{frame.number}")
        if self._config.save:
            self._save(folder, stem, frame, drawn)
        if self._config.txt:
            text = label_rows(result, conf=self._config.conf)
            (_subfolder(folder, "labels") / f"{name}.txt").write_text(text, encoding="utf-8")
        if self._config.csv:
            self._append(folder, result, frame)
        if self._config.crop:
            _write_crops(_subfolder(folder, "crops"), name, result)

    def _draw(self, result: Result) -> np.ndarray:
        config = self._config
        return result.draw(
            thickness=config.thickness,
            hide_labels=config.hide_labels,
            hide_conf=config.hide_conf,
        )

    def _make_folder(self) -> Path:
        if self.folder is None:
            project, name, exist_ok = self._place
            self.folder = new_run_dir(project, name, exist_ok=exist_ok)
        return self.folder

    def _stem(self, frame: Frame) -> str:
        """The name of a source's files, different for each source of the run."""
        if frame.item not in self._stems:
            wanted = frame.path.stem if frame.path else safe_name(frame.label.split("://")[-1])
            self._stems[frame.item] = self._unique(wanted)
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
        if frame.kind == "video":  # the ones before it are complete; streams run side by side
            for item in [item for item in self._videos if item != frame.item]:
                video = self._videos.pop(item)
                video.close()
                video.check()
        if frame.item not in self._videos:
            fps = (frame.fps or USUAL_FPS) / self._config.stride
            self._videos[frame.item] = _Video(folder / f"{stem}.mp4", fps, image.shape[:2])
        self._videos[frame.item].write(image)

    def _append(self, folder: Path, result: Result, frame: Frame) -> None:
        if self._table is None:
            path = folder / "predictions.csv"
            self._table = path.open("w", newline="", encoding="utf-8")
            csv.writer(self._table).writerow(COLUMNS)
        found = result.detections
        csv.writer(self._table).writerows(
            (
                *(frame.label, frame.number, label, result.names[label], f"{score:.5f}"),
                *(f"{value:.2f}" for value in box),
            )
            for box, score, label in zip(
                found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
            )
        )


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
        """Finish the file."""
        self._writer.release()

    def check(self) -> None:
        """Read it back. UserError for a file without end: OpenCV says nothing of a full disk."""
        written = cv2.VideoCapture(str(self._path))
        whole = written.isOpened() and written.read()[0]
        written.release()
        if not whole:
            raise UserError(f"{self._path}: the video could not be written; is the disk full?")


def label_rows(result: Result, *, conf: bool) -> str:
    """YOLO's rows `class cx cy w h`, normalised, and the confidence with `conf`; '' for none."""
    height, width = result.image.shape[:2]
    found = result.detections
    rows = []
    for box, score, label in zip(
        found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True
    ):
        left, top, right, bottom = box
        values = (
            *((left + right) / 2 / width, (top + bottom) / 2 / height),
            *((right - left) / width, (bottom - top) / height),
            *((score,) if conf else ()),
        )
        rows.append(" ".join((str(label), *(f"{value:.6f}" for value in values))) + "\n")
    return "".join(rows)


def safe_name(text: str) -> str:
    """`text` as one part of a path: letters, digits, '-', '.', ' ' and '_' only."""
    return re.sub(r"[^\w\-. ]+", "_", text).strip("._ ")[:100] or "unnamed"


def _write_crops(folder: Path, name: str, result: Result) -> None:
    """crops/<class>/<name>_<n>.jpg of the untouched pixels, n counted from 1 per image."""
    height, width = result.image.shape[:2]
    found = result.detections
    for number, (box, label) in enumerate(
        zip(found.boxes.round().int().tolist(), found.labels.tolist(), strict=True), 1
    ):
        left, top = min(box[0], width - 1), min(box[1], height - 1)
        right, bottom = max(box[2], left + 1), max(box[3], top + 1)
        place = _subfolder(folder, safe_name(result.names[label]))
        write_image(place / f"{name}_{number}.jpg", result.image[top:bottom, left:right])


def _subfolder(folder: Path, name: str) -> Path:
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    return path


def _refuse_inputs_in(folder: Path, inputs: Sequence[Path]) -> None:
    home = folder.resolve()
    for path in inputs:
        if home in path.resolve().parents or home in path.absolute().parents:
            raise UserError(
                f"{folder}: the run folder holds the source {path}; choose another --project or "
                "--name, so that nothing is overwritten"
            )
