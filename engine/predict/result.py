"""What a detector found in one image: as numbers, text, COCO's results or a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.sources.frames import Frame
from engine.measure.bench import Speed
from utils.boxes import Detections
from utils.drawing import draw_boxes, write_image


@dataclass(frozen=True, repr=False)
class Result:
    """The detections of one image."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, as read
    detections: Detections  # xyxy pixels of `image`, on the CPU, best first
    names: tuple[str, ...]
    speed: Speed
    network_size: tuple[int, int]  # (height, width) the network saw
    frame: Frame | None = None  # where the image comes from, when it comes from a source
    path: str | None = None  # of the image file or source; None for an array

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        where = f"{self.path}, " if self.path else ""
        return f"<Result: {where}{height}x{width}, {self.text}>"

    def __len__(self) -> int:
        return len(self.detections)

    @property
    def text(self) -> str:
        """'4 persons, 1 bus', most certain class first, or '(no detections)'."""
        labels = self.detections.labels.tolist()
        counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
        parts = [f"{n} {_plural(self.names[label], n)}" for label, n in counts.items()]
        return ", ".join(parts) or "(no detections)"

    def to_dict(self) -> dict[str, Any]:
        """Plain values: path, frame, height, width, detections (class, name, confidence, box).

        A box is [x1, y1, x2, y2] in pixels of the image; `speed` in milliseconds.
        """
        found = self.detections
        columns = (found.labels.tolist(), found.scores.tolist(), found.boxes.tolist())
        return {
            "path": self.path,
            "frame": self.frame.number if self.frame else None,
            "height": self.image.shape[0],
            "width": self.image.shape[1],
            "speed": dict(self.speed._asdict()),
            "detections": [
                {"class": label, "name": self.names[label], "confidence": score, "box": box}
                for label, score, box in zip(*columns, strict=True)
            ],
        }

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=indent, ensure_ascii=False)

    def to_coco(
        self, image_id: int | str | None = None, *, category_ids: Sequence[int] | None = None
    ) -> list[dict[str, Any]]:
        """Rows of a COCO results file: image_id, category_id, bbox [x, y, width, height], score.

        `image_id` is by default the file's name without suffix, as a number where it is one;
        `category_ids` are the ids of the classes, by default their numbers from 0.
        Raises ValueError without `image_id` for an array.
        """
        if image_id is None:
            if self.path is None:
                raise ValueError("to_coco needs an image_id: this image comes from no file")
            stem = Path(self.path).stem
            image_id = int(stem) if stem.isdecimal() else stem
        ids = range(len(self.names)) if category_ids is None else category_ids
        return [
            {
                "image_id": image_id,
                "category_id": ids[item["class"]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "score": item["confidence"],
            }
            for item in self.to_dict()["detections"]
            for x1, y1, x2, y2 in [item["box"]]
        ]

    def plot(
        self,
        *,
        thickness: int | None = None,
        hide_labels: bool = False,
        hide_conf: bool = False,
    ) -> np.ndarray:
        """A copy of the image with its boxes, (H, W, 3) uint8 RGB."""
        return draw_boxes(
            self.image,
            self.detections.boxes.numpy(),
            self.detections.labels.numpy(),
            names=self.names,
            scores=self.detections.scores.numpy(),
            thickness=thickness,
            hide_labels=hide_labels,
            hide_conf=hide_conf,
        )

    def save(self, path: str | Path) -> None:
        """Write the annotated copy; the suffix chooses the format. Raises UserError."""
        write_image(Path(path), self.plot())


def _plural(name: str, count: int) -> str:
    if count == 1:
        return name
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")
