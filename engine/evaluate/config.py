"""The settings of val.py as flags, checked."""

from __future__ import annotations

from dataclasses import dataclass

from engine.export.config import openvino_precision_option
from utils.config import (
    MAX_PIXELS,
    MAX_WORKERS,
    check_options,
    default_workers,
    option,
    threads_option,
)

TASKS = ("val", "train", "test", "speed", "study")
STUDY_SIZES = tuple(range(256, 1537, 128))
SPEED_CONF, SPEED_IOU = 0.25, 0.45  # what detection uses


@dataclass(frozen=True)
class EvalConfig:
    """Settings that change the metrics; the defaults are those of published YOLOv5 results."""

    conf: float = 0.001
    iou: float = 0.6  # of NMS
    max_det: int = 300  # of an image; COCO counts the best 100 of each image and class
    augment: bool = False  # test-time augmentation, engine/evaluate/tta.py
    single_cls: bool = False  # boxes count, classes do not; the index must have one class


@dataclass(frozen=True)
class ValConfig:
    """One run of val.py; the defaults are those of the YOLO ecosystem."""

    weights: str = option(help="checkpoint, FeatherDet's or YOLOv5's")
    data: str = option(
        "", help="data set YAML, by path or name; by default that of the checkpoint's training"
    )
    batch_size: int = option(
        32, flags=("--batch",), min=1, max=2**31, help="images per step on each rank"
    )
    imgsz: int | None = option(
        None,
        flags=("--img", "--img-size"),
        min=1,
        max=MAX_PIXELS,
        help="network size in pixels; by default that of the checkpoint's training, else 640",
    )
    rect: bool = option(False, help="keep each image's shape instead of padding to a square")
    device: str = option("", help="cpu, mps or a GPU number; '': CUDA if present")
    threads: int = threads_option()
    conf_thres: float = option(0.001, flags=("--conf",), min=0, max=1, help="confidence threshold")
    iou_thres: float = option(
        0.6, flags=("--iou",), min=0, max=1, help="IoU threshold of non-maximum suppression"
    )
    max_det: int = option(300, min=1, max=2**31, help="maximum number of detections per image")
    task: str = option(
        "val",
        choices=TASKS,
        help="the split to evaluate, or: speed = time at conf 0.25 and IoU 0.45; "
        "study = metrics over image sizes (both on the val split)",
    )
    study_sizes: tuple[int, ...] = option(
        STUDY_SIZES, metavar="PIXELS", min=1, max=MAX_PIXELS, help="image sizes of --task study"
    )
    nms: bool = option(
        False, help="of an end-to-end head use the branch for non-maximum suppression"
    )
    augment: bool = option(False, help="test-time augmentation: three scales, one mirrored")
    half: bool = option(False, help="half precision (CUDA only)")
    openvino_precision: str = openvino_precision_option()
    save_txt: bool = option(False, help="write the detections as YOLO labels")
    save_conf: bool = option(False, help="append the scores to the labels of --save-txt")
    save_json: bool = option(False, help="write the detections as COCO results, predictions.json")
    verbose: bool = option(False, help="also list classes without objects in the data")
    single_cls: bool = option(False, help="treat all classes as one")
    noplots: bool = option(False, help="write no plots and no images")
    workers: int = option(
        default_workers(), min=0, max=MAX_WORKERS, help="loading processes per rank; 0: none"
    )
    project: str = option("runs/val", help="folder of the runs")
    name: str = option("exp", help="folder of this run; a number is added if it exists")
    exist_ok: bool = option(False, help="write into an existing folder")

    def __post_init__(self) -> None:
        check_options(self)
        if self.save_conf and not self.save_txt:
            raise ValueError("--save-conf adds to the labels of --save-txt; give both")
        saving = self.save_txt or self.save_json
        if saving and self.task in {"speed", "study"}:
            raise ValueError(f"--save-txt and --save-json do not go with --task {self.task}")
        if self.study_sizes != STUDY_SIZES and self.task != "study":
            raise ValueError("--study-sizes goes with --task study")

    @property
    def split(self) -> str:
        """Which images."""
        return self.task if self.task in {"train", "test"} else "val"

    @property
    def evaluation(self) -> EvalConfig:
        """What the evaluator needs of these settings."""
        speed = self.task == "speed"
        return EvalConfig(
            conf=SPEED_CONF if speed else self.conf_thres,
            iou=SPEED_IOU if speed else self.iou_thres,
            max_det=self.max_det,
            augment=self.augment,
            single_cls=self.single_cls,
        )
