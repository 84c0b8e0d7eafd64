"""What val.py does: one evaluation, a timing, or a study over image sizes; and its files."""

from __future__ import annotations

import contextlib
import csv
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from data.index.dataset import load_dataset_config, load_split
from data.loading.loader import LoaderConfig, ValLoader
from data.loading.workers import dead_workers_named
from engine import distributed
from engine.checkpoint import TrainedWith
from engine.distributed import Distributed
from engine.evaluate.config import SPEED_CONF, ValConfig
from engine.evaluate.evaluator import check, evaluate
from engine.evaluate.metrics import DetectionMetrics, save_labels, save_metrics, save_predictions
from engine.evaluate.plots import BatchImages, plot_study, save_plots
from engine.export.runtime import Exported, Network, load_network, runtime_of, to_half
from models.detector import Detector
from utils.config import DEFAULT_SIZE, changed
from utils.errors import UserError
from utils.files import check_run_dir, find_config, new_run_dir, write_text
from utils.terminal import say_main, warn_main
from utils.yamlio import load_yaml

WARM_UPS = 3  # forward passes on CUDA before a timing
STUDY_COLUMNS = ("size", "mAP50", "mAP50-95", "pre-process ms", "inference ms", "NMS ms")
SHOWN = (
    "conf",
    "iou",
    "max_det",
    "image_size",
    "rect",
    "augment",
    "half",
    "batch_size",
    "device",
    "runtime",
)


def run(config: ValConfig) -> DetectionMetrics | None:
    """Carry out `config.task`, print the results and where the files are; None for a study.

    Works under torchrun, too: each rank takes its share, rank 0 prints and writes.
    Raises UserError for what cannot be read or does not fit together.
    """
    world = distributed.start(config.device, threads=config.threads)
    try:
        validation = Validation(config, world)
        settings = ", ".join(f"{key}={value}" for key, value in changed(config).items())
        say_main(f"val.py: {settings}")
        metrics = None
        with dead_workers_named():
            if config.task == "study":
                validation.study()
            else:
                metrics = validation.validate()
        if config.task != "speed":
            say_main(f"results: {validation.folder}")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: batch {config.batch_size} is too much for {world.device}; try"
            " half the --batch-size, a smaller --img or --half"
        ) from error
    else:
        return metrics
    finally:
        distributed.cleanup()


class Validation:
    """Weights and data (rank 0 reads first, the others use its cache) and the run's folder."""

    def __init__(self, config: ValConfig, world: Distributed) -> None:
        if config.half and world.device.type != "cuda":
            raise UserError(f"--half needs CUDA; on {world.device.type} leave it out")
        if config.task != "speed":
            check_run_dir(config.project, config.name)
        self.model, trained = load_network(
            config.weights,
            device=world.device,
            openvino_precision=config.openvino_precision,
            nms=config.nms,
        )
        where = runtime_of(self.model)
        if config.openvino_precision != "float32" and not where.startswith("openvino"):
            raise UserError(
                f"--openvino-precision is for OpenVINO's files; {config.weights} runs in {where}"
            )
        self.other: Network | None = None  # the head's other branch
        if isinstance(self.model, Detector) and self.model.has_branches:
            self.other, _ = load_network(config.weights, device=world.device, nms=not config.nms)
        for network in (self.model, self.other) if config.half else ():
            if network is not None:
                to_half(network)
        inside = self.model.metadata.suppression if isinstance(self.model, Exported) else None
        if inside is not None and config.conf_thres < inside.conf:
            raise UserError(
                f"{config.weights}: its in-graph suppression keeps nothing under {inside.conf:g},"
                f" so AP would differ: give --conf {inside.conf:g}, or export it with"
                f" --conf {config.conf_thres:g}"
            )
        config = _completed(config, trained)
        self.config, self.world = config, world
        with distributed.main_first():
            dataset = load_dataset_config(config.data)
            self.index = load_split(dataset, config.split, single_cls=config.single_cls)
            check(self.model, self.index, config.evaluation)
        self.folder = Path(config.project)  # of rank 0 alone: the others write nothing
        if world.is_main and config.task != "speed":
            self.folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok)

    def measure(
        self, size: int, images: BatchImages | None = None, *, model: Network | None = None
    ) -> DetectionMetrics:
        """One evaluation at `size` pixels (a multiple of the stride); a short warm-up on CUDA.

        `model`: another one than the settings mean.
        """
        model = model or self.model
        config, world = self.config, self.world
        loader = LoaderConfig(
            image_size=size,
            batch_size=config.batch_size,
            stride=model.max_stride,
            workers=config.workers,
            seed=0,
            rank=world.rank,
            world_size=world.world_size,
            rect=config.rect,
        )
        if world.device.type == "cuda":
            warm_up(model, size, config.batch_size, world.device)
        return evaluate(
            model,
            ValLoader(self.index, loader),
            self.index,
            config=config.evaluation,
            device=world.device,
            images=images,
        )

    def validate(self) -> DetectionMetrics:
        """Evaluate once; print tables and speed, write metrics, detections and plots as asked."""
        config, index, folder = self.config, self.index, self.folder
        assert config.imgsz is not None  # completed
        size = network_size(config.imgsz, self.model.max_stride)
        timing = config.task == "speed"
        writes = self.world.is_main and not timing
        images = BatchImages(index) if writes and not config.noplots else None
        metrics = self.measure(size, images)
        say_main(metrics.table(absent=config.verbose))
        if not timing:
            say_main(metrics.coco_text())
            if self.other is not None:
                metrics = metrics.with_branch(self.measure(size, model=self.other))
                say_main(metrics.branches_text(nms=config.nms))
        say_main(metrics.speed.text())
        settings = self.settings(size)
        say_main("at " + ", ".join(f"{key} {settings[key]}" for key in SHOWN))
        if writes:  # the plots come last: should the disk be full, the numbers are there
            save_metrics(metrics, folder / "metrics.json", settings)
            if config.save_json:
                save_predictions(metrics, index, folder / "predictions.json")
            if config.save_txt:
                save_labels(metrics, index, folder / "labels", scores=config.save_conf)
        if images is not None:
            save_plots(metrics, index, images, folder)
        return metrics

    def settings(self, size: int) -> dict[str, Any]:
        """What the metrics depend on, as plain values."""
        config, device = self.config, self.world.device
        own = ("rect", "nms", "half", "batch_size", "weights", "data", "split")
        return {
            **vars(config.evaluation),
            **{name: getattr(config, name) for name in own},
            "image_size": size,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "runtime": runtime_of(self.model),
            "ranks": self.world.world_size,
            "fingerprint": self.index.fingerprint,
        }

    def study(self) -> None:
        """Evaluate at each of the sizes; print a line for each, write study.csv and study.png."""
        rows: list[tuple[float, ...]] = []
        say_main("".join(f"{head:>16}" for head in STUDY_COLUMNS))
        sizes = [network_size(size, self.model.max_stride) for size in self.config.study_sizes]
        for size in dict.fromkeys(sizes):
            metrics = self.measure(size)
            rows.append((size, metrics.map50, metrics.map, *metrics.speed))
            say_main(f"{size:>16}" + "".join(f"{value:>16.4g}" for value in rows[-1][1:]))
            if not self.world.is_main:
                continue
            table = io.StringIO()
            csv.writer(table).writerows([STUDY_COLUMNS, *rows])
            write_text(self.folder / "study.csv", table.getvalue())
            if not self.config.noplots:
                columns = dict(zip(STUDY_COLUMNS, zip(*rows, strict=True), strict=True))
                accuracy = {name: columns[name] for name in STUDY_COLUMNS[1:3]}
                times = {name.removesuffix(" ms"): columns[name] for name in STUDY_COLUMNS[3:]}
                plot_study(columns["size"], accuracy, times, self.folder / "study.png")


def _completed(config: ValConfig, trained: TrainedWith) -> ValConfig:
    """`config` with the size and the data of the checkpoint's training where it names none.

    A checkpoint holds no path of the machine it was made on; its run's opt.yaml does.
    """
    size, data, taken = config.imgsz, config.data, []
    if size is None and config.task != "study":
        size = trained.image_size or DEFAULT_SIZE
        known = (
            "the size of its training"
            if trained.image_size
            else "the default: it does not state its own"
        )
        taken.append(f"--img {size} ({known})")
    if not data:
        options_file = Path(config.weights).absolute().parent.parent / "opt.yaml"
        names = [trained.data] if trained.data else []
        if names and options_file.is_file():
            names.insert(0, str(load_yaml(options_file).mapping().get("data")))
        for name in names:
            with contextlib.suppress(UserError):
                find_config(name, "data")
                data = name
                break
        else:
            cause = "it does not state what it was trained on"
            if names:
                cause = f"it was trained on {names[0]}, which is not found here"
            raise UserError(f"{config.weights}: {cause}; name the data set by --data")
        taken.append(f"--data {data} (the data of its training)")
    if taken:
        say_main(f"{config.weights}: {', '.join(taken)}")
    return replace(config, imgsz=size, data=data)


@torch.inference_mode()
def warm_up(model: Network, size: int, batch_size: int, device: torch.device) -> None:
    """Let allocators and libraries settle, so that the first batch is timed like the others."""
    images = torch.zeros(batch_size, 3, size, size, device=device, dtype=model.input_type)
    for _ in range(WARM_UPS):
        model.detect(images.contiguous(memory_format=torch.channels_last), SPEED_CONF)


def network_size(size: int, stride: int) -> int:
    """`size`, or the next multiple of `stride` (reported on stderr)."""
    rounded = -(-size // stride) * stride
    if rounded != size:
        warn_main(f"image size {size} is not a multiple of the stride {stride}: {rounded} is used")
    return rounded
