"""From an image to its detections:

from engine.predict.predictor import Predictor
predictor = Predictor("best.pt")
print(predictor("image.jpg").text)
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from data.sources.capture import StreamConfig
from data.sources.frames import Frame, Sources
from engine.checkpoint import load_detector
from engine.distributed import select_device
from engine.evaluate.tta import decode_augmented
from engine.measure.bench import Speed, Stopwatch
from models.detector import Detector
from utils.boxes import Detections, Letterbox
from utils.drawing import draw_boxes, write_image
from utils.errors import UserError, nearest
from utils.images import ImageError, read_image
from utils.nms import NmsConfig, nms, non_finite

# One class per object, unlike evaluation, where every class over the threshold counts.
DETECT_NMS = NmsConfig(conf=0.25, iou=0.45, max_det=1000, multi_label=False)
WARM_UPS = 3  # blank images on CUDA before the first timing


@dataclass(frozen=True)
class Result:
    """The detections of one image."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, as read
    detections: Detections  # xyxy pixels of `image`, on the CPU, best first
    names: tuple[str, ...]
    speed: Speed
    network_size: tuple[int, int]  # (height, width) the network saw
    frame: Frame | None = None  # where the image comes from, when it comes from a source

    @property
    def text(self) -> str:
        """'4 persons, 1 bus', most certain class first, or '(no detections)'."""
        labels = self.detections.labels.tolist()
        counts = {label: labels.count(label) for label in dict.fromkeys(labels)}
        parts = [f"{n} {_plural(self.names[label], n)}" for label, n in counts.items()]
        return ", ".join(parts) or "(no detections)"

    def draw(
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
        write_image(Path(path), self.draw())


class Predictor:
    """A detector with everything between an image and its detections.

    `weights` is a checkpoint of this project, a genuine YOLOv5 one, or a built Detector (copied).
    The image's long side is scaled to `image_size`, a multiple of the largest stride, and padded
    to multiples of that stride, or to a square with `square`.  `device` is '' (CUDA if present),
    'cpu' or a GPU number.  `half` computes in float16, on CUDA only; `augment` adds scaled and
    mirrored views; `names` replace the class names in the checkpoint.
    Raises UserError for unusable weights or settings.
    """

    def __init__(
        self,
        weights: str | Path | Detector,
        *,
        image_size: int = 640,
        device: str = "",
        nms: NmsConfig = DETECT_NMS,
        half: bool = False,
        augment: bool = False,
        square: bool = False,
        names: Sequence[str] | None = None,
    ) -> None:
        self.device = select_device(device)
        if half and self.device.type != "cuda":
            raise UserError(f"half precision needs a CUDA device, this is {self.device.type}")
        if isinstance(weights, Detector):
            model = copy.deepcopy(weights).to(self.device).fuse()
            model = model.to(memory_format=torch.channels_last)
        else:
            model = load_detector(str(weights), device=self.device, fuse=True)
        self.model = model.eval().requires_grad_(False)
        self.names = tuple(names or self.model.names)
        self.nms = nms
        self._size = image_size
        self._stride = self.model.max_stride
        self._augment = augment
        self._square = square
        if image_size < self._stride or image_size % self._stride:
            lower = max(image_size // self._stride, 1) * self._stride
            raise UserError(
                f"image size {image_size} is not a multiple of the model's largest "
                f"stride {self._stride}; the nearest are {lower} and {lower + self._stride}"
            )
        if len(self.names) != len(self.model.names):
            raise UserError(
                f"{len(self.names)} class names given, the model has {len(self.model.names)}"
            )
        self.only(nms.classes or ())
        if half:
            self.model.to_half()
        for _ in range(WARM_UPS if self.device.type == "cuda" else 0):
            self(np.zeros((image_size, image_size, 3), np.uint8))

    def only(self, classes: Sequence[int | str]) -> None:
        """Report these classes alone, by number or name; all of them when empty.

        Raises UserError for an unknown class, with the nearest name.
        """
        indices = [index for item in classes for index in _class_indices(item, self.names)]
        self.nms = replace(self.nms, classes=tuple(indices) or None)

    def __call__(self, image: np.ndarray | str | Path) -> Result:
        """An (H, W, 3) uint8 RGB array or an image file -> its detections.

        Raises UserError for a file that is not a whole image, ValueError for another array.
        """
        return self.batch([image])[0]

    def stream(
        self,
        source: str | Path | Sequence[str | Path] | Sources,
        *,
        vid_stride: int = 1,
        stream: StreamConfig | None = None,
    ) -> Iterator[Result]:
        """The results of all frames of `source`, as for `--source` of detect.py, one after another.

        See data.sources.frames.Sources for the kinds, what is skipped and which errors end it.
        """
        if not isinstance(source, Sources):
            source = Sources(source, stride=vid_stride, stream=stream)
        for frame in source:
            yield self.batch([frame.image], [frame])[0]

    def batch(
        self,
        images: Sequence[np.ndarray | str | Path],
        frames: Sequence[Frame | None] | None = None,
    ) -> list[Result]:
        """Images as `__call__` takes them -> one result each, in order.

        Images whose canvases agree in shape go through the network together; their times are shared
        evenly.  The detections do not depend on the grouping.
        """
        arrays = [_read(image) if isinstance(image, str | Path) else image for image in images]
        boxes = [self._letterbox(image) for image in arrays]
        origins = list(frames) if frames is not None else [None] * len(arrays)
        results: dict[int, Result] = {}
        for shape in dict.fromkeys(box.dst for box in boxes):
            rows = [row for row, box in enumerate(boxes) if box.dst == shape]
            named = {row: frame.label for row, frame in enumerate(origins) if frame is not None}
            titles = [named.get(row, f"image {row + 1} of {len(arrays)}") for row in rows]
            detections, speed = self._run(
                [arrays[row] for row in rows], [boxes[row] for row in rows], titles
            )
            for row, found in zip(rows, detections, strict=True):
                results[row] = Result(arrays[row], found, self.names, speed, shape, origins[row])
        return [results[row] for row in range(len(arrays))]

    def _letterbox(self, image: np.ndarray) -> Letterbox:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise ValueError(f"an image is (H, W, 3) uint8 RGB, not {image.dtype} {image.shape}")
        source = (image.shape[0], image.shape[1])
        if self._square:
            return Letterbox(source, (self._size, self._size))
        return Letterbox.tight(source, self._size, self._stride)

    @torch.inference_mode()
    def _run(
        self, images: Sequence[np.ndarray], boxes: Sequence[Letterbox], titles: Sequence[str]
    ) -> tuple[list[Detections], Speed]:
        watch = Stopwatch(self.device, stages=3)
        watch.mark()
        canvases = np.stack([box.apply(image) for box, image in zip(boxes, images, strict=True)])
        pixels = torch.from_numpy(canvases).to(self.device)  # as bytes: a quarter of the floats
        batch = pixels.permute(0, 3, 1, 2).to(next(self.model.parameters()).dtype).div_(255)
        watch.mark()
        conf = self.nms.conf
        decoded = self.model.head.decode(self.model(batch), conf)
        if self._augment:
            decoded = decode_augmented(self.model, batch, decoded, conf)
        watch.mark()
        for bad in non_finite(*decoded):
            cure = "" if batch.dtype == torch.float32 else "; try without --half"
            raise UserError(f"{titles[bad]}: the model's outputs are not finite{cure}")
        found = Detections.to_cpu(nms(*decoded, self.nms, images=len(images)))
        found = [
            replace(item, boxes=box.to_image(item.boxes))
            for item, box in zip(found, boxes, strict=True)
        ]
        watch.mark()
        return found, Speed(*(1000 * value / len(images) for value in watch.seconds()))


def _class_indices(wanted: int | str, names: Sequence[str]) -> list[int]:
    """The class of a number, or the classes of a name."""
    text = str(wanted)
    if wanted in names:
        return [index for index, name in enumerate(names) if name == wanted]
    if text.isdecimal() and int(text) < len(names):
        return [int(text)]
    known = f"0 to {len(names) - 1}, or a name such as {names[0]!r}"
    raise UserError(f"class {text!r} is unknown ({known}){nearest(text, names)}")


def _read(path: str | Path) -> np.ndarray:
    try:
        return read_image(Path(path))
    except ImageError as error:
        raise UserError(f"{path}: {error}") from error


def _plural(name: str, count: int) -> str:
    if count == 1:
        return name
    return name + ("es" if name.endswith(("s", "x", "z", "ch", "sh")) else "s")
