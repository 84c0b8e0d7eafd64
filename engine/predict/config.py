"""The settings of detect.py as flags, checked."""

from __future__ import annotations

from dataclasses import dataclass

from engine.export.config import openvino_precision_option
from utils.config import MAX_PIXELS, check_options, option, threads_option

RUNTIMES = ("auto", "torch", "onnxruntime", "openvino")
MANY = 100  # frames: to export for fewer takes longer than it saves
MAX_DETECTIONS = 30_000  # as many candidates enter suppression at most


@dataclass(frozen=True)
class DetectConfig:
    """One run of detect.py; the defaults are those of the YOLO ecosystem."""

    weights: str = option(help="checkpoint of train.py, or a YOLOv5 .pt; it names the classes")
    source: tuple[str, ...] = option(
        help="image, video, folder, 'glob*', list file (.txt), webcam number, http(s) or rtsp URL"
    )
    data: str = option("", help="data set YAML whose class names replace the checkpoint's")
    imgsz: tuple[int, ...] = option(
        (),
        flags=("--img", "--img-size"),
        metavar="PIXELS",
        min=1,
        max=MAX_PIXELS,
        help="long side of the network's input, or its height and width; by default the size of"
        " the checkpoint's training, else 640",
    )
    batch_size: int = option(
        1,
        flags=("--batch",),
        min=1,
        max=1024,
        help="frames that go through the network together; of live streams one",
    )
    conf_thres: float = option(0.25, flags=("--conf",), min=0, max=1, help="confidence threshold")
    iou_thres: float = option(
        0.45, flags=("--iou",), min=0, max=1, help="IoU threshold of non-maximum suppression"
    )
    max_det: int = option(
        1000, min=1, max=MAX_DETECTIONS, help="maximum number of detections per image"
    )
    device: str = option("", help="cpu, mps or a GPU number; '': CUDA if present")
    threads: int = threads_option()
    runtime: str = option(
        "auto",
        choices=RUNTIMES,
        help="inference runtime on a CPU; auto: the fastest one installed, for 100 frames or more,"
        " by an export that is kept",
    )
    openvino_precision: str = openvino_precision_option()
    view_img: bool = option(False, help="show the results in a window (q or Escape ends the run)")
    save_txt: bool = option(False, help="write labels/*.txt, YOLO's format")
    save_conf: bool = option(False, help="append the confidence to the rows of --save-txt")
    save_csv: bool = option(False, help="write predictions.csv")
    save_crop: bool = option(False, help="save a crop of every object in crops/<class>/")
    nosave: bool = option(False, help="write no annotated copies")
    classes: tuple[str, ...] = option((), help="only these classes, by number or name")
    agnostic_nms: bool = option(False, help="suppress overlaps across classes")
    nms: bool = option(
        False, help="of an end-to-end head use the branch for non-maximum suppression"
    )
    augment: bool = option(False, help="test-time augmentation: two more views of each image")
    line_thickness: int | None = option(
        None,
        min=1,
        max=1000,
        help="line width of the boxes in pixels; by default from the image size",
    )
    hide_labels: bool = option(False, help="draw boxes only")
    hide_conf: bool = option(False, help="draw names without confidences")
    half: bool = option(False, help="half precision (CUDA only)")
    vid_stride: int = option(
        1, min=1, max=10_000, help="take every n-th frame of videos and streams"
    )
    stream_timeout: float = option(
        30.0, min=0.1, max=86_400, help="seconds to keep reconnecting to a lost stream"
    )
    project: str = option("runs/detect", help="folder of the runs")
    name: str = option("exp", help="folder of this run; a number is added if it exists")
    exist_ok: bool = option(False, help="write into an existing folder")

    def __post_init__(self) -> None:
        check_options(self)
        if len(self.imgsz) > 2:
            raise ValueError(f"--imgsz takes a long side, or height and width, got {self.imgsz}")
        if not all(self.source):
            raise ValueError("--source has an empty name; . is the current folder")
        if self.save_conf and not self.save_txt:
            raise ValueError("--save-conf does nothing without --save-txt")

    @property
    def image_size(self) -> int | tuple[int, int] | None:
        """As `Predictor` takes it."""
        if len(self.imgsz) == 2:
            return (self.imgsz[0], self.imgsz[1])
        return self.imgsz[0] if self.imgsz else None

    @property
    def writes(self) -> bool:
        """Whether any file is asked for."""
        return not self.nosave or self.save_txt or self.save_csv or self.save_crop
