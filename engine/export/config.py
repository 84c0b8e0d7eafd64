"""The settings of export.py as flags, checked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from utils.config import MAX_PIXELS, changed, check_options, flag, option, threads_option

OPENVINO_PRECISIONS = ("float32", "bf16", "auto")
FORMATS = ("onnx", "openvino", "torchscript")
MOST_DETECTIONS = 4096  # as many boxes enter suppression in the graph


def openvino_precision_option() -> Any:
    """The field of `--openvino-precision`."""
    return option(
        OPENVINO_PRECISIONS[0],
        choices=OPENVINO_PRECISIONS,
        help="what OpenVINO computes in; auto: its own choice, bf16 where the processor has it",
    )


@dataclass(frozen=True)
class ExportConfig:
    """One run of export.py; the files are written next to the weights."""

    weights: str = option("", help="checkpoint, FeatherDet's or YOLOv5's")
    cfg: str = option(
        "", help="model YAML, by path or name, with random weights instead of --weights"
    )
    include: tuple[str, ...] = option(("onnx",), choices=FORMATS, help="the formats to write")
    imgsz: tuple[int, ...] = option(
        (),
        flags=("--img", "--img-size"),
        min=1,
        max=MAX_PIXELS,
        help="network size: one number for a square, or height and width; by default that of the"
        " weights' training, else 640",
    )
    batch_size: int = option(1, flags=("--batch",), min=1, max=1024, help="images per call")
    dynamic: bool = option(False, help="any batch, height and width instead of --img and --batch")
    half: bool = option(False, help="weights in float16; inputs and outputs stay float32")
    int8: bool = option(
        False, help="weights and maps in 8 bits, with ranges from the training images of --data"
    )
    data: str = option("", help="data set YAML, by path or name, for --int8")
    max_ap_loss: float = option(
        1.0,
        min=0,
        max=1,
        help="refuse an --int8 file that loses more AP than this on the val split",
    )
    nms: str = option(
        "none",
        choices=("none", "in-graph"),
        help="outputs: boxes and scores of all cells (of an end-to-end head its detections), or the"
        " detections that suppression keeps",
    )
    conf_thres: float = option(
        0.25, flags=("--conf",), min=0, max=1, help="confidence threshold of --nms in-graph"
    )
    iou_thres: float = option(
        0.45, flags=("--iou",), min=0, max=1, help="IoU threshold of --nms in-graph"
    )
    max_det: int = option(
        300, min=1, max=MOST_DETECTIONS, help="rows of --nms in-graph for each image"
    )
    threads: int = threads_option()

    def __post_init__(self) -> None:
        check_options(self)
        if bool(self.weights) == bool(self.cfg):
            raise ValueError("give --weights, or --cfg for random weights")
        if len(self.imgsz) > 2:
            raise ValueError(f"--img is one number or height and width, got {len(self.imgsz)}")
        if self.nms == "in-graph" and "torchscript" in self.include:
            raise ValueError("--nms in-graph is for onnx and openvino")
        if self.int8 and not self.data:
            raise ValueError("--int8 needs --data, whose training images tell the ranges")
        if self.int8 and (self.half or "torchscript" in self.include):
            raise ValueError("--int8 is for onnx and openvino, without --half")
        if self.int8 and len(set(self.imgsz)) > 1:
            raise ValueError("--int8 measures AP, which needs a square: one number for --img")
        if not self.int8 and {"data", "max_ap_loss"} & changed(self).keys():
            raise ValueError("--data and --max-ap-loss do nothing without --int8; leave them out")
        idle = {"conf_thres", "iou_thres", "max_det"} & changed(self).keys()
        if self.nms == "none" and idle:
            raise ValueError(f"{flag(min(idle))} does nothing without --nms in-graph")
