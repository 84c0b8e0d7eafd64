"""What val.py does: one evaluation, a timing, or a study over image sizes; and its files."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from data.loading.loader import LoaderConfig, ValLoader
from data.loading.workers import dead_workers_named
from engine import distributed
from engine.checkpoint import load_detector
from engine.distributed import Distributed
from engine.evaluate.batch_images import BatchImages
from engine.evaluate.config import ValConfig
from engine.evaluate.evaluator import check, evaluate
from engine.evaluate.results import DetectionMetrics, save_labels, save_metrics, save_predictions
from models.detector import Detector
from utils.config import changed
from utils.errors import UserError
from utils.files import write_text
from utils.paths import new_run_dir
from utils.terminal import say, warn

WARM_UPS = 3  # forward passes on CUDA before a timing
STUDY_COLUMNS = ("size", "mAP50", "mAP50-95", "pre-process ms", "inference ms", "NMS ms")


def run(config: ValConfig) -> None:
    """Carry out `config.task`, print the results and where the files are.

    Works under torchrun, too: each rank takes its share, rank 0 prints and writes.
    Raises UserError for what cannot be read or does not fit together.
    """
    world = distributed.start(config.device)
    try:
        task = load(config, world)
        task.say("val.py: " + ", ".join(f"{key}={value}" for key, value in changed(config).items()))
        with dead_workers_named():
            if config.task == "study":
                task.study()
            else:
                task.validate()
        if config.task != "speed":
            task.say(f"results: {task.folder}")
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"out of GPU memory: batch {config.batch_size} at {config.imgsz} px is too much for"
            f" {world.device}; try half the --batch-size or --half"
        ) from error
    finally:
        distributed.cleanup()


def load(config: ValConfig, world: Distributed) -> Validation:
    """Read weights and data (rank 0 first, the others use its cache), make the folder."""
    if config.half and world.device.type != "cuda":
        raise UserError(f"--half needs CUDA; on {world.device.type} leave it out")
    model = load_detector(config.weights, device=world.device, fuse=True)
    if config.half:
        model.to_half()
    if not world.is_main:
        distributed.barrier()
    index = load_split(
        load_dataset_config(config.data),
        config.split,
        progress=world.is_main,
        single_cls=config.single_cls,
    )
    check(model, index, config.evaluation)
    folder = Path(config.project)
    if world.is_main:
        distributed.barrier()
        if config.task != "speed":
            folder = new_run_dir(config.project, config.name, exist_ok=config.exist_ok)
    return Validation(config, world, model, index, distributed.broadcast_object(folder))


@dataclass(frozen=True)
class Validation:
    """All that is read before an evaluation begins."""

    config: ValConfig
    world: Distributed
    model: Detector
    index: DataIndex
    folder: Path

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.is_main:
            say(text)

    def measure(self, size: int, images: BatchImages | None = None) -> DetectionMetrics:
        """One evaluation at `size` pixels (a multiple of the stride); a short warm-up on CUDA."""
        config, world = self.config, self.world
        loader = LoaderConfig(
            image_size=size,
            batch_size=config.batch_size,
            stride=self.model.max_stride,
            workers=config.workers,
            seed=0,
            rank=world.rank,
            world_size=world.world_size,
            rect=config.rect,
        )
        if world.device.type == "cuda":
            warm_up(self.model, size, config.batch_size)
        return evaluate(
            self.model,
            ValLoader(self.index, loader),
            self.index,
            config=config.evaluation,
            device=world.device,
            images=images,
        )

    def validate(self) -> None:
        """Evaluate once; print tables and speed, write metrics, detections and plots as asked."""
        config, index, folder = self.config, self.index, self.folder
        size = network_size(config.imgsz, self.model.max_stride)
        timing = config.task == "speed"
        writes = self.world.is_main and not timing
        images = BatchImages(index.names) if writes and not config.noplots else None
        metrics = self.measure(size, images)
        self.say(metrics.table(absent=config.verbose))
        if not timing:
            self.say(metrics.coco_text())
        settings = self.settings(size)
        shown = "conf iou max_det image_size rect augment half batch_size device"
        self.say(metrics.speed.text())
        self.say("at " + ", ".join(f"{key} {settings[key]}" for key in shown.split()))
        if writes:  # the plots come last: should the disk be full, the numbers are there
            save_metrics(metrics, folder / "metrics.json", settings)
            if config.save_json:
                save_predictions(metrics, folder / "predictions.json")
            if config.save_txt:
                save_labels(metrics, index, folder / "labels", scores=config.save_conf)
        if images is not None:
            from engine.evaluate.plots import save_plots  # imports matplotlib

            save_plots(metrics, index, images, folder)

    def settings(self, size: int) -> dict[str, Any]:
        """What the metrics depend on, as plain values."""
        config, evaluation, device = self.config, self.config.evaluation, self.world.device
        names = ("rect", "augment", "half", "single_cls", "batch_size")
        return {
            **{name: getattr(evaluation, name) for name in ("conf", "iou", "max_det")},
            "image_size": size,
            **{name: getattr(config, name) for name in names},
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "ranks": self.world.world_size,
            **{name: getattr(config, name) for name in ("weights", "data", "split")},
            "fingerprint": self.index.fingerprint,
        }

    def study(self) -> None:
        """Evaluate at each of the sizes; print a line for each, write study.csv and study.png."""
        rows: list[tuple[float, ...]] = []
        self.say("".join(f"{head:>16}" for head in STUDY_COLUMNS))
        sizes = [network_size(size, self.model.max_stride) for size in self.config.study_sizes]
        for size in dict.fromkeys(sizes):
            metrics = self.measure(size)
            rows.append((size, metrics.map50, metrics.map, *metrics.speed))
            self.say(f"{size:>16}" + "".join(f"{value:>16.4g}" for value in rows[-1][1:]))
            if not self.world.is_main:
                continue
            table = io.StringIO()
            csv.writer(table).writerows([STUDY_COLUMNS, *rows])
            write_text(self.folder / "study.csv", table.getvalue())
            if not self.config.noplots:
                from engine.evaluate.plots import plot_study  # imports matplotlib

                columns = dict(zip(STUDY_COLUMNS, zip(*rows, strict=True), strict=True))
                sizes_so_far = [int(value) for value in columns.pop("size")]
                plot_study(sizes_so_far, columns, self.folder / "study.png")


@torch.inference_mode()
def warm_up(model: Detector, size: int, batch_size: int) -> None:
    """Let allocators and libraries settle, so that the first batch is timed like the others."""
    like = next(model.parameters())
    images = torch.zeros(batch_size, 3, size, size, device=like.device, dtype=like.dtype)
    for _ in range(WARM_UPS):
        model.head.decode(model(images.contiguous(memory_format=torch.channels_last)))


def network_size(size: int, stride: int) -> int:
    """`size`, or the next multiple of `stride` (reported on stderr)."""
    rounded = -(-size // stride) * stride
    if rounded != size and distributed.is_main():
        warn(f"image size {size} is not a multiple of the stride {stride}: {rounded} is used")
    return rounded
