"""Find objects in images, videos and streams."""

from __future__ import annotations

from dataclasses import dataclass

from data.index.dataset import load_dataset_config
from data.sources.frames import Sources
from data.sources.streams import StreamConfig
from engine.predict import display
from engine.predict.console import Console
from engine.predict.outputs import OutputConfig, Outputs
from engine.predict.predictor import Predictor
from utils.config import MAX_PIXELS, check_options, option, parse
from utils.errors import PartlyDoneError, UserError, run_script
from utils.nms import MAX_CANDIDATES, NmsConfig


@dataclass(frozen=True)
class DetectConfig:
    """The command line of detect.py."""

    weights: str = option(help="checkpoint: of train.py, or a YOLOv5 .pt; it names the classes")
    source: tuple[str, ...] = option(
        help="image, video, folder, 'glob*', list file (.txt), webcam number, http(s) or rtsp URL"
    )
    data: str = option("", help="data set YAML whose class names are shown instead")
    imgsz: int = option(
        640,
        flags=("--img", "--img-size"),
        min=1,
        max=MAX_PIXELS,
        help="long side of the network's input",
    )
    conf_thres: float = option(0.25, min=0, max=1, help="confidence threshold")
    iou_thres: float = option(0.45, min=0, max=1, help="IoU threshold of non-maximum suppression")
    max_det: int = option(
        1000, min=1, max=MAX_CANDIDATES, help="maximum number of detections per image"
    )
    device: str = option("", help="cpu or a GPU's number; the default is a GPU if present")
    view_img: bool = option(False, help="show the results in a window (q or Escape ends the run)")
    save_txt: bool = option(False, help="write labels/*.txt, YOLO's format")
    save_conf: bool = option(False, help="append the confidence to the rows of --save-txt")
    save_csv: bool = option(False, help="write predictions.csv")
    save_crop: bool = option(False, help="write every object to crops/<class>/")
    nosave: bool = option(False, help="write no annotated copies")
    classes: tuple[str, ...] = option((), help="only these classes, by number or name")
    agnostic_nms: bool = option(False, help="suppress overlaps across classes")
    augment: bool = option(False, help="test-time augmentation: two more views of each image")
    line_thickness: int | None = option(
        None, min=1, max=1000, help="of the boxes, in pixels; else by image size"
    )
    hide_labels: bool = option(False, help="draw boxes only")
    hide_conf: bool = option(False, help="draw names without confidences")
    half: bool = option(False, help="compute in float16 (CUDA only)")
    vid_stride: int = option(
        1, min=1, max=10_000, help="take every n-th frame of videos and streams"
    )
    stream_timeout: float = option(
        30.0, min=0.1, max=86_400, help="seconds for which a lost stream is tried again"
    )
    project: str = option("runs/detect", help="folder of the runs")
    name: str = option("exp", help="name of the run: project/name, then name2, name3, ...")
    exist_ok: bool = option(False, help="write into an existing project/name")

    def __post_init__(self) -> None:
        check_options(self)
        if not all(self.source):
            raise ValueError("detect: --source has an empty name; . is the current folder")
        if self.save_conf and not self.save_txt:
            raise ValueError("detect: --save-conf does nothing without --save-txt")


def main(argv: list[str] | None = None) -> int:
    """Detect as `argv` says; 0, or the error that run_script turns into an exit code."""
    config = parse(DetectConfig, argv, prog="detect.py", description=__doc__ or "")
    if config.view_img:
        display.require_display()
    console = Console(stride=config.vid_stride)
    stream = StreamConfig(give_up=config.stream_timeout)
    sources = Sources(
        config.source, stride=config.vid_stride, stream=stream, report=console.problem
    )
    predictor = build_predictor(config)
    with build_outputs(config, sources, console) as outputs, console:
        for result in predictor.stream(sources):
            console.show(result)
            drawn = outputs.write(result, draw=config.view_img)
            if config.view_img and not display.show(result, drawn):
                break
    if sources.problems:
        raise PartlyDoneError(f"{len(sources.problems)} sources skipped or cut short, see above")
    return 0


def build_predictor(config: DetectConfig) -> Predictor:
    """The model with its thresholds, for the classes asked for."""
    names = load_dataset_config(config.data).names if config.data else None
    if config.data and names is None:
        raise UserError(f"--data {config.data}: it names no classes itself; leave it out")
    predictor = Predictor(
        config.weights,
        image_size=config.imgsz,
        device=config.device,
        nms=NmsConfig(
            conf=config.conf_thres,
            iou=config.iou_thres,
            max_det=config.max_det,
            agnostic=config.agnostic_nms,
            multi_label=False,
        ),
        half=config.half,
        augment=config.augment,
        names=names,
    )
    predictor.only(config.classes)
    return predictor


def build_outputs(config: DetectConfig, sources: Sources, console: Console) -> Outputs:
    """The writer of the files asked for."""
    wanted = OutputConfig(
        save=not config.nosave,
        txt=config.save_txt,
        conf=config.save_conf,
        csv=config.save_csv,
        crop=config.save_crop,
        thickness=config.line_thickness,
        hide_labels=config.hide_labels,
        hide_conf=config.hide_conf,
        stride=config.vid_stride,
    )
    return Outputs(
        config.project,
        config.name,
        wanted,
        inputs=sources.files,
        exist_ok=config.exist_ok,
        report=console.line,
    )


if __name__ == "__main__":
    run_script(main)
