"""From an image to its detections:

from engine.predict.predictor import Predictor
predictor = Predictor("best.pt")
print(predictor("image.jpg").text)
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeAlias

import numpy as np
import torch
from PIL import Image

from data.sources.capture import StreamConfig
from data.sources.frames import Frame, Sources
from engine.checkpoint import TrainedWith
from engine.distributed import select_device
from engine.evaluate.tta import decode_augmented
from engine.export.cached import in_runtime
from engine.export.runtime import Exported, Network, load_network, to_half
from engine.measure.bench import Speed, Stopwatch
from engine.predict.result import Result
from models.detector import Detector
from utils.boxes import Detections, Letterbox
from utils.config import DEFAULT_SIZE
from utils.errors import UserError, nearest
from utils.images import ImageError, as_rgb
from utils.nms import NmsConfig, nms, non_finite

# One class per object, unlike evaluation, where every class over the threshold counts.
DETECT_NMS = NmsConfig(conf=0.25, iou=0.45, max_det=1000, multi_label=False)
Picture: TypeAlias = np.ndarray | str | Path | bytes | Image.Image
WARM_UPS = 3  # blank images on CUDA before the first timing


class Predictor:
    """A detector with everything between an image and its detections.

    `weights` is a checkpoint of this project, a genuine YOLOv5 one, a file of export.py, or a built
    Detector (copied).
    `image_size` in pixels, in multiples of the largest stride: a number to which the image's long
    side is scaled, before it is padded to multiples of that stride; or (height, width), which it
    is scaled to fit and padded to; None: the number that the checkpoint was trained at, else 640.
    `conf` and `iou` replace the thresholds of `nms`.
    `device` is '' (CUDA if present), 'cpu' or a GPU number.  `half` computes in float16, on CUDA
    only; `augment` adds scaled and mirrored views; `use_nms` takes of an end-to-end head the branch
    whose boxes are suppressed; `runtime` is what computes on a CPU: torch, onnxruntime, openvino,
    or auto for the fastest of them (engine.export.cached), and `openvino_precision` float32, bf16
    or auto, OpenVINO's own choice; `names` replace the class names in the checkpoint; only
    `classes`, by number or name, are reported unless a call says otherwise.
    Raises UserError for unusable weights or settings.

    Nothing changes after construction: threads may share a predictor.
    """

    # with these alone, `predictor.conf = 0.4`, as in YOLOv5, is an error and not without effect
    __slots__ = ("_augment", "_stride", "device", "image_size", "model", "names", "nms", "trained")

    def __init__(  # noqa: PLR0913  keywords of its users
        self,
        weights: str | Path | Detector,
        *,
        image_size: int | tuple[int, int] | None = None,
        device: str = "",
        nms: NmsConfig = DETECT_NMS,
        conf: float | None = None,
        iou: float | None = None,
        half: bool = False,
        augment: bool = False,
        use_nms: bool = False,
        runtime: str = "torch",
        openvino_precision: str = "float32",
        names: Sequence[str] | None = None,
        classes: Sequence[int | str] = (),
    ) -> None:
        nms = replace(
            nms,
            conf=nms.conf if conf is None else conf,
            iou=nms.iou if iou is None else iou,
        )
        self.device = select_device(device)
        if half and self.device.type != "cuda":
            raise UserError(f"half precision needs a CUDA device, this is {self.device.type}")
        self.trained = TrainedWith()
        self.model: Network
        if isinstance(weights, Detector):
            model = copy.deepcopy(weights).fuse(nms=use_nms).to(self.device)
            self.model = model.to(memory_format=torch.channels_last).eval().requires_grad_(False)
        else:
            self.model, self.trained = load_network(
                weights,
                device=self.device,
                openvino_precision=openvino_precision,
                nms=use_nms,
            )
        self.names = tuple(names or self.model.names)
        self._augment = augment
        self._stride = self.model.max_stride
        if image_size is None and isinstance(self.model, Exported):
            image_size = self.model.metadata.size
        if image_size is None:
            own = self.trained.image_size or DEFAULT_SIZE
            image_size = -(-own // self._stride) * self._stride
        self.image_size = image_size
        sides = (image_size,) if isinstance(image_size, int) else image_size
        for side in sides:
            if side < self._stride or side % self._stride:
                lower = max(side // self._stride, 1) * self._stride
                raise UserError(
                    f"image size {side} is not a multiple of the model's largest "
                    f"stride {self._stride}; the nearest are {lower} and {lower + self._stride}"
                )
        if len(self.names) != len(self.model.names):
            raise UserError(
                f"{len(self.names)} class names given, the model has {len(self.model.names)}"
            )
        nms = replace(nms, suppress=augment or not self.model.end_to_end)  # views overlap
        self.nms = self._only(classes or nms.classes or (), nms)
        if half:
            to_half(self.model)
        self.model = in_runtime(
            weights, self.model, runtime, max(sides), openvino_precision=openvino_precision
        )
        for _ in range(WARM_UPS if self.device.type == "cuda" else 0):
            self(np.zeros((sides[0], sides[-1], 3), np.uint8))

    def _only(self, classes: Sequence[int | str], nms: NmsConfig) -> NmsConfig:
        """`nms` for these classes alone, all of them when empty; UserError for an unknown one."""
        indices = [index for item in classes for index in _class_indices(item, self.names)]
        return replace(nms, classes=tuple(indices) or None)

    def __call__(
        self, image: Picture, *, classes: Sequence[int | str] | None = None, bgr: bool = False
    ) -> Result:
        """One image -> its detections, of `classes` alone if given (an empty list: of all).

        A path, a PIL image, the bytes of an image file, or a uint8 array: (H, W) or (H, W, 1) grey,
        (H, W, 3) RGB, (H, W, 4) RGBA; with `bgr` (for OpenCV's arrays) BGR and BGRA.
        Raises UserError for a file that is not a whole image, ValueError for what is no image.
        """
        return self.batch([image], classes=classes, bgr=bgr)[0]

    def stream(
        self,
        source: str | Path | Sequence[str | Path] | Sources,
        *,
        vid_stride: int = 1,
        stream: StreamConfig | None = None,
        classes: Sequence[int | str] | None = None,
        batch: int = 1,
    ) -> Iterator[Result]:
        """The results of all frames of `source`, as for `--source` of detect.py, one after another.

        `batch` frames go through the network together, of live streams one.
        See data.sources.frames.Sources for the kinds, what is skipped and which errors end it.
        """
        if not isinstance(source, Sources):
            source = Sources(source, stride=vid_stride, stream=stream)
        yield from self.on_frames(source, classes=classes, batch=batch)

    def on_frames(
        self, frames: Iterable[Frame], *, classes: Sequence[int | str] | None = None, batch: int = 1
    ) -> Iterator[Result]:
        """As `stream`, of frames that were read."""
        group: list[Frame] = []
        for frame in frames:
            group.append(frame)
            if len(group) >= batch or frame.kind == "stream":
                yield from self.batch([f.image for f in group], frames=group, classes=classes)
                group = []
        if group:
            yield from self.batch([f.image for f in group], frames=group, classes=classes)

    def batch(
        self,
        images: Sequence[Picture],
        *,
        frames: Sequence[Frame] | None = None,
        classes: Sequence[int | str] | None = None,
        bgr: bool = False,
    ) -> list[Result]:
        """Images as `__call__` takes them -> one result each, in order.

        Images whose canvases agree in shape go through the network together; their times are shared
        evenly.  The detections do not depend on the grouping.  Raises ValueError for no images.
        """
        if not len(images):
            raise ValueError("no images given")
        suppression = self.nms if classes is None else self._only(classes, self.nms)
        origins = [None] * len(images) if frames is None else frames
        paths = [
            frame.label if frame else str(image) if isinstance(image, str | Path) else None
            for image, frame in zip(images, origins, strict=True)
        ]
        titles = [path or f"image {n} of {len(images)}" for n, path in enumerate(paths, 1)]
        arrays = [_rgb(*pair, bgr=bgr) for pair in zip(images, titles, strict=True)]
        boxes = [self.letterbox(image) for image in arrays]
        results: dict[int, Result] = {}
        for shape in dict.fromkeys(box.dst for box in boxes):
            rows = [row for row, box in enumerate(boxes) if box.dst == shape]
            detections, speed = self._run(
                [arrays[row] for row in rows],
                [boxes[row] for row in rows],
                [titles[row] for row in rows],
                suppression,
            )
            for row, found in zip(rows, detections, strict=True):
                results[row] = Result(
                    *(arrays[row], found, self.names, speed, shape, origins[row], paths[row])
                )
        return [results[row] for row in range(len(arrays))]

    def letterbox(self, image: np.ndarray) -> Letterbox:
        """Where an RGB image lies in the network's input."""
        source = (image.shape[0], image.shape[1])
        if isinstance(self.image_size, int):
            return Letterbox.tight(source, self.image_size, self._stride)
        return Letterbox(source, self.image_size)

    @torch.inference_mode()
    def _run(
        self,
        images: Sequence[np.ndarray],
        boxes: Sequence[Letterbox],
        titles: Sequence[str],
        suppression: NmsConfig,
    ) -> tuple[list[Detections], Speed]:
        watch = Stopwatch(self.device, stages=3)
        watch.mark()
        canvases = np.stack([box.apply(image) for box, image in zip(boxes, images, strict=True)])
        pixels = torch.from_numpy(canvases).to(self.device)  # as bytes: a quarter of the floats
        batch = pixels.permute(0, 3, 1, 2).to(self.model.input_type).div_(255)
        watch.mark()
        conf = suppression.conf
        decoded = self.model.detect(batch, conf)
        if self._augment:
            decoded = decode_augmented(self.model, batch, decoded, conf)
        watch.mark()
        for bad in non_finite(*decoded):
            cure = "" if batch.dtype == torch.float32 else "; try without --half"
            raise UserError(f"{titles[bad]}: the model's outputs are not finite{cure}")
        found = Detections.to_cpu(nms(*decoded, suppression, images=len(images)))
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


def _rgb(image: Picture, title: str, *, bgr: bool) -> np.ndarray:
    try:
        return as_rgb(image, bgr=bgr)
    except ImageError as error:
        raise UserError(f"{title}: {error}") from error
    except ValueError as error:
        raise ValueError(f"{title}: {error}") from error
