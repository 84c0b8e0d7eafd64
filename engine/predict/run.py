"""What detect.py does: every frame of the sources through the model, on the screen, into files."""

from __future__ import annotations

from data.index.dataset import load_dataset_config
from data.sources.capture import StreamConfig
from data.sources.frames import Sources
from engine.export.runtime import runtime_of
from engine.predict.config import MANY, DetectConfig
from engine.predict.console import Console, require_display, show_window
from engine.predict.outputs import Outputs
from engine.predict.pipeline import DEPTH, ReadAhead, WriteBehind
from engine.predict.predictor import Predictor
from utils.environment import keep_freed_memory, use_threads
from utils.errors import PartlyDoneError, UserError
from utils.files import check_run_dir
from utils.nms import NmsConfig
from utils.terminal import say, warn


def run(config: DetectConfig) -> None:
    """Detect as `config` asks; UserError, PartlyDoneError or SourceLostError where that fails."""
    keep_freed_memory()
    use_threads(config.threads)
    if config.view_img:
        require_display()
    if config.writes:
        check_run_dir(config.project, config.name)
    console = Console(stride=config.vid_stride)
    reader = ReadAhead(console.problem, depth=DEPTH + config.batch_size)
    sources = Sources(
        config.source,
        stride=config.vid_stride,
        stream=StreamConfig(give_up=config.stream_timeout),
        report=reader.report,
    )
    names = load_dataset_config(config.data).names if config.data else None
    if config.data and names is None:
        raise UserError(f"--data {config.data}: it names no classes itself; leave it out")
    runtime = config.runtime
    if runtime == "auto" and not sources.has_at_least(MANY):
        runtime = "torch"
    predictor = Predictor(
        config.weights,
        image_size=config.image_size,
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
        use_nms=config.nms,
        runtime=runtime,
        openvino_precision=config.openvino_precision,
        names=names,
        classes=config.classes,
    )
    where = runtime_of(predictor.model)
    if config.openvino_precision != "float32" and not where.startswith("openvino"):
        warn(f"warning: --openvino-precision does nothing: {config.weights} runs in {where}")
    if not config.imgsz:
        known = "the size of its training" if predictor.trained.image_size else "the default"
        say(f"{config.weights}: --img {predictor.image_size} ({known})")
    follow(config, predictor, sources, reader=reader, console=console)
    if sources.problems:
        raise PartlyDoneError(f"{len(sources.problems)} sources skipped or cut short, see above")


def follow(
    config: DetectConfig,
    predictor: Predictor,
    sources: Sources,
    *,
    reader: ReadAhead,
    console: Console,
) -> None:
    """Detect on all frames; show and write what `config` asks for."""
    # a live stream gives its newest frame, which must not wait
    files_only = len(sources.files) == len(sources)
    frames = reader.frames(sources) if files_only else sources
    with Outputs(config, inputs=sources.files) as outputs, console, WriteBehind() as later, reader:
        for result in predictor.on_frames(frames, batch=config.batch_size):
            console.show(result)
            if not config.view_img:
                later(outputs.write, result)
            elif not show_window(result, outputs.write(result, draw=True)):
                break
