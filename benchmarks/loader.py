"""Training images per second that one CPU core loads and augments: `python -m benchmarks.loader`.

The images of a data set are copied --copies times.  What counts is CPU time in one process without
workers, after a warm-up: with --augment cpu as `--cache none` and `--cache ram`, and what is left
with --augment device as `--cache none` and `--cache device`.  With --peer, Ultralytics' own loader
does the first two in turn, in the environment of that Python.  Medians; ratios count on a busy
machine.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain, count, islice
from pathlib import Path

import cv2
import torch

from benchmarks.common import copied
from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from data.loading.loader import LoaderConfig, TrainLoader
from utils.config import option, parse
from utils.errors import FeatherDetError, run_script
from utils.hyp import load_hyp

WARM_UP = 4  # batches that the peer makes before the first timing
PEER = """
import sys, time
import cv2, torch
from ultralytics.cfg import get_cfg
from ultralytics.data import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

torch.set_num_threads(1)
cv2.setNumThreads(0)
file, cache, size, batch, warm_up = sys.argv[1:]
config = get_cfg(overrides={"imgsz": int(size), "cache": False if cache == "none" else cache})
data = check_det_dataset(file)
dataset = build_yolo_dataset(config, data["train"], int(batch), data, mode="train")
loader = build_dataloader(dataset, int(batch), workers=0, shuffle=True)

def endless():
    while True:
        yield from loader

batches = endless()
for _ in range(int(warm_up)):
    next(batches)
print("rate ready", flush=True)
for line in sys.stdin:
    start = time.process_time()
    images = sum(len(next(batches)["img"]) for _ in range(int(line)))
    print("rate", images / (time.process_time() - start), flush=True)
"""


@dataclass(frozen=True)
class LoaderBenchConfig:
    """The command line: what to load."""

    data: str = option("coco128", help="data set YAML, by path or name")
    imgsz: int = option(640, flags=("--img",), help="network size in pixels")
    batch_size: int = option(64, flags=("--batch",), help="images per batch")
    copies: int = option(16, min=1, help="copies of each image")
    batches: int = option(8, min=1, help="batches of one timing")
    repeats: int = option(3, min=1, help="timings of each kind")
    peer: str = option("", metavar="PYTHON", help="Python with ultralytics to compare with")


def main(argv: list[str] | None = None) -> None:
    """Print a line for each cache: images per second and the ratio to the peer's."""
    config = parse(LoaderBenchConfig, argv, prog="benchmarks.loader", description=__doc__ or "")
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    index = load_split(load_dataset_config(config.data), "train")
    print(f"{config.data} x {config.copies} at {config.imgsz} px, batch {config.batch_size},"
          " images per second of one core")  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        index, file = copied(index, config.copies * len(index), Path(folder))
        kinds = (("cpu", "none"), ("cpu", "ram"), ("device", "none"), ("device", "device"))
        for augment, cache in kinds:
            with ExitStack() as stack:
                timings = {"own": own(index, config, augment, cache)}
                if config.peer and augment == "cpu":
                    timings["peer"] = peer(file, config, cache, stack)
                rates: dict[str, list[float]] = {name: [] for name in timings}
                for _ in range(config.repeats):
                    for name, timing in timings.items():
                        rates[name].append(timing())
            line = f"augment {augment:7} cache {cache:7}" + "".join(
                f"{name} {statistics.median(found):7.1f}  " for name, found in rates.items()
            )
            if "peer" in rates:
                pairs = zip(rates["own"], rates["peer"], strict=True)
                line += f"ratio {statistics.median(a / b for a, b in pairs):.2f}"
            print(line, flush=True)


def own(
    index: DataIndex, config: LoaderBenchConfig, augment: str, cache: str
) -> Callable[[], float]:
    """A timing of this project's loader, which has seen every image once."""
    loader_config = LoaderConfig(
        image_size=config.imgsz,
        batch_size=config.batch_size,
        stride=32,
        workers=0,
        seed=0,
        cache=cache,
        on_device=augment == "device",
        device_memory=sys.maxsize,
    )
    loader = TrainLoader(index, loader_config, load_hyp("default"))
    batches = chain.from_iterable(map(loader.batches, count()))
    for _ in range(2 * len(loader)):  # with --cache device the first ones bring images only
        next(batches)

    def timing() -> float:
        start = time.process_time()
        images = sum(map(len, islice(batches, config.batches)))
        return images / (time.process_time() - start)

    return timing


def peer(
    file: Path, config: LoaderBenchConfig, cache: str, stack: ExitStack
) -> Callable[[], float]:
    """A timing of Ultralytics' loader, in a process of its own that `stack` ends."""
    sizes = map(str, (config.imgsz, config.batch_size, WARM_UP))
    child = stack.enter_context(
        subprocess.Popen(
            [config.peer, "-c", PEER, str(file), cache, *sizes],
            env={**os.environ, "YOLO_CONFIG_DIR": str(file.parent), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    to_child, lines = child.stdin, child.stdout
    assert to_child is not None
    assert lines is not None

    def answer() -> str:
        for line in lines:  # others are its own messages
            if line.startswith("rate "):
                return line.split()[1]
        raise FeatherDetError("the peer's process has ended without an answer; see above")

    answer()

    def timing() -> float:
        print(config.batches, file=to_child, flush=True)
        return float(answer())

    return timing


if __name__ == "__main__":
    run_script(main)
