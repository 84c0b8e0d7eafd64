"""What the scripts that time training share: copies of images, a run, and its two speeds."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Any

import torch
import yaml

from data.index.records import DataIndex
from engine import distributed
from engine.measure.bench import LAYOUTS, synchronize
from engine.train.config import TrainConfig
from engine.train.interrupts import StopRequest
from engine.train.loop import epoch_batches, reproducible
from engine.train.setup import prepare_run
from engine.train.state import TrainRun
from engine.train.step import train_epoch


def copied(index: DataIndex, number: int, folder: Path) -> tuple[DataIndex, Path]:
    """`number` images in `folder`, with YOLO labels, and the YAML file for them.

    Those of `index`, again and again.
    """
    records = []
    for name in ("images", "labels"):
        (folder / name).mkdir(parents=True)
    for position, record in enumerate(islice(cycle([*index.records]), number)):
        path = folder / "images" / f"{position:06}{record.path.suffix}"
        shutil.copyfile(record.path, path)
        x1, y1, x2, y2 = record.boxes.T
        width, height = record.width, record.height
        columns = (record.labels, (x1 + x2) / 2 / width, (y1 + y2) / 2 / height,
                   (x2 - x1) / width, (y2 - y1) / height)  # fmt: skip
        rows = (" ".join(map(str, row)) + "\n" for row in zip(*columns, strict=True))
        (folder / "labels" / f"{position:06}.txt").write_text("".join(rows), encoding="utf-8")
        records.append(replace(record, file=str(path)))
    file = folder / "data.yaml"
    content = {"path": str(folder), "train": "images", "val": "images", "names": [*index.names]}
    file.write_text(yaml.safe_dump(content), encoding="utf-8")
    return replace(index, records=tuple(records)), file


@contextmanager
def training_run(**flags: Any) -> Iterator[TrainRun]:
    """A run as train.py makes it of these flags, in a folder that goes away afterwards.

    Its recipe is YOLOv5's, whatever the number of images: times do not depend on --hyp auto.
    """
    world = distributed.start(flags.get("device", ""))
    with (
        tempfile.TemporaryDirectory() as folder,
        reproducible(world.device, benchmark=True),
        ExitStack() as locks,
    ):
        recipe = {"hyp": "default", "optimizer": "SGD"}
        config = TrainConfig(**recipe, **flags, project=folder, noplots=True)
        yield prepare_run(config, world, locks)


def end_to_end(run: TrainRun, epoch: int) -> tuple[float, float]:
    """Images per second and seconds until the first batch, of the epoch after `epoch`.

    As train.py runs it: what the workers make ahead is made in an epoch of the same kind.
    """
    for number in (epoch, epoch + 1):
        run.state.start_epoch(number)
        synchronize(run.world.device)
        start = time.perf_counter()
        run.clock.start()
        batches = epoch_batches(run, validate=False)
        first = next(batches)
        waited = time.perf_counter() - start
        train_epoch(run, chain([first], batches), StopRequest())
        synchronize(run.world.device)
    return len(run.train.records) / (time.perf_counter() - start), waited


class BareStep:
    """Forward, sum of the raw maps, backward: a model in its run's type, in its faster layout."""

    def __init__(self, run: TrainRun, model: torch.nn.Module, *, batch: int) -> None:
        self._run, self._model = run, model
        size = run.config.imgsz
        self._images = torch.rand(batch, 3, size, size, device=run.world.device)
        for name in LAYOUTS:  # warm-up
            self._seconds(name, steps=2)
        self.layout = min(LAYOUTS, key=lambda name: self._seconds(name, steps=4))

    def rate(self, steps: int) -> float:
        """Images per second over `steps` steps."""
        return steps * len(self._images) / self._seconds(self.layout, steps=steps)

    def _seconds(self, layout: str, *, steps: int) -> float:
        run, model = self._run, self._model
        model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        images = self._images.contiguous(memory_format=LAYOUTS[layout])
        device, autocast = run.world.device, run.autocast
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            with torch.autocast(device.type, autocast, enabled=autocast is not None):
                total = torch.stack([y.float().sum() for y in model(images)]).sum()
            total.backward()
            model.zero_grad(set_to_none=True)
        synchronize(device)
        return time.perf_counter() - start
