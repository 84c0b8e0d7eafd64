"""How much of the bare step's speed training keeps: `python -m benchmarks.train`.

End to end: loading, augmentation, copy, forward, loss, backward, optimizer and averaging, as
train.py does them, over a whole epoch that follows another.  Bare: forward, sum of the raw maps,
backward, with the same model, batch and threads, in the faster of the two memory formats, and no
loss or optimizer.  Both alternate in one process; medians and their ratio are what counts on a
shared machine.
"""

from __future__ import annotations

import copy
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain

import torch

from data.loading.sample import Batch
from engine import distributed
from engine.measure.bench import synchronize
from engine.train.config import TrainConfig
from engine.train.interrupts import StopRequest
from engine.train.loading import delivered
from engine.train.loop import reproducible
from engine.train.model import to_network
from engine.train.setup import prepare_run
from engine.train.state import TrainRun
from engine.train.step import train_epoch
from models.detector import Detector
from utils.config import option, parse
from utils.errors import run_script

PAUSE = 1.0  # seconds in which loading processes finish what they make ahead


@dataclass(frozen=True)
class BenchConfig:
    """The command line: the run to time."""

    cfg: str = option("yolov5n", help="model YAML, by path or name")
    data: str = option("bccd", help="data set YAML, by path or name")
    imgsz: int = option(320, flags=("--img",), help="network size in pixels")
    batch_size: int = option(16, flags=("--batch",), help="images per step")
    workers: int = option(TrainConfig().workers, help="loading processes")
    cache: str = option("none", choices=("none", "ram", "disk"), help="as in train.py")
    device: str = option("", help="cpu or a GPU number; '': CUDA if present")
    repeats: int = option(5, help="timings of each kind")


def main(argv: list[str] | None = None) -> None:
    """Print both rates and their ratio."""
    config = parse(BenchConfig, argv, prog="benchmarks.train", description=__doc__ or "")
    world = distributed.start(config.device)
    with (
        tempfile.TemporaryDirectory() as folder,
        reproducible(world.device, benchmark=True),
        ExitStack() as locks,
    ):
        shared = {key: value for key, value in vars(config).items() if key != "repeats"}
        train_config = TrainConfig(**shared, project=folder, noplots=True)
        run = prepare_run(train_config, world, locks)
        images = to_network(next(_batches(run, 0)).images)
        model = copy.deepcopy(run.state.model)
        formats = (torch.channels_last, torch.contiguous_format)
        for memory_format in formats:  # warm-up, and the choice of the faster one
            _bare(run, model, images, layout=memory_format, steps=2)
        layout = max(formats, key=lambda item: _bare(run, model, images, layout=item, steps=4))
        end_to_end, first_waits, bare = [], [], []
        for repeat in range(config.repeats + 1):
            steps = len(run.loader)
            rate, waited = _end_to_end(run, 2 * repeat)
            time.sleep(PAUSE)
            bare_rate = _bare(run, model, images, layout=layout, steps=steps)
            if repeat:  # the first round starts the workers and fills caches
                end_to_end.append(rate)
                first_waits.append(waited)
                bare.append(bare_rate)
                sys.stderr.write(
                    f"{repeat}: end to end {rate:.2f}, bare {bare_rate:.2f} images/s\n"
                )
    ratio = statistics.median(a / b for a, b in zip(end_to_end, bare, strict=True))
    print(f"{config.cfg} at {config.imgsz} px, batch {config.batch_size}, {world.device}, "
          f"{torch.get_num_threads()} threads, {config.workers} workers, "
          f"bare in {layout}")  # fmt: skip
    print(f"end to end {statistics.median(end_to_end):.2f} images/s")
    print(f"bare       {statistics.median(bare):.2f} images/s")
    print(f"ratio      {ratio:.3f} (median of {config.repeats} pairs)")
    print(f"first batch of an epoch after {statistics.median(first_waits):.3f} s")


def _end_to_end(run: TrainRun, epoch: int) -> tuple[float, float]:
    """Images per second and seconds until the first batch, of the epoch after `epoch`.

    As train.py runs it: what the workers make ahead is made in an epoch of the same kind.
    """
    for number in (epoch, epoch + 1):
        run.state.start_epoch(number)
        synchronize(run.world.device)
        start = time.perf_counter()
        batches = _batches(run, number)
        first = next(batches)
        waited = time.perf_counter() - start
        train_epoch(run, chain([first], batches), StopRequest())
        synchronize(run.world.device)
    return len(run.train.records) / (time.perf_counter() - start), waited


def _batches(run: TrainRun, epoch: int) -> Iterator[Batch]:
    return delivered(run.loader.batches(epoch), run.world.device, run.device_images)


def _bare(
    run: TrainRun,
    model: Detector,
    images: torch.Tensor,
    *,
    layout: torch.memory_format,
    steps: int,
) -> float:
    """Images per second of forward, sum, backward on one batch that is already there."""
    model.to(memory_format=layout)
    images = images.contiguous(memory_format=layout)
    autocast = run.autocast
    synchronize(run.world.device)
    start = time.perf_counter()
    for _ in range(steps):
        with torch.autocast(run.world.device.type, autocast, enabled=autocast is not None):
            total = torch.stack([y.float().sum() for y in model(images)]).sum()
        total.backward()
        model.zero_grad(set_to_none=True)
    synchronize(run.world.device)
    return steps * len(images) / (time.perf_counter() - start)


if __name__ == "__main__":
    run_script(main)
