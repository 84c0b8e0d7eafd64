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
import time
from dataclasses import dataclass

import torch

from benchmarks.common import BareStep, end_to_end, training_run
from engine.train.config import CACHES, TrainConfig
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
    cache: str = option("none", choices=CACHES, help="as in train.py")
    augment: str = option("auto", choices=("auto", "cpu", "device"), help="as in train.py")
    device: str = option("", help="cpu or a GPU number; '': CUDA if present")
    repeats: int = option(5, help="timings of each kind")


def main(argv: list[str] | None = None) -> None:
    """Print both rates and their ratio."""
    config = parse(BenchConfig, argv, prog="benchmarks.train", description=__doc__ or "")
    shared = {key: value for key, value in vars(config).items() if key != "repeats"}
    with training_run(**shared) as run:
        bare_step = BareStep(run, copy.deepcopy(run.state.model), batch=config.batch_size)
        end_to_ends, first_waits, bare = [], [], []
        for repeat in range(config.repeats + 1):
            rate, waited = end_to_end(run, 2 * repeat)
            time.sleep(PAUSE)
            bare_rate = bare_step.rate(len(run.loader))
            if repeat:  # the first round starts the workers and fills caches
                end_to_ends.append(rate)
                first_waits.append(waited)
                bare.append(bare_rate)
                sys.stderr.write(
                    f"{repeat}: end to end {rate:.2f}, bare {bare_rate:.2f} images/s\n"
                )
    ratio = statistics.median(a / b for a, b in zip(end_to_ends, bare, strict=True))
    print(f"{config.cfg} at {config.imgsz} px, batch {config.batch_size}, {run.world.device}, "
          f"{torch.get_num_threads()} threads, {config.workers} workers, "
          f"bare in {bare_step.layout}")  # fmt: skip
    print(f"end to end {statistics.median(end_to_ends):.2f} images/s")
    print(f"bare       {statistics.median(bare):.2f} images/s")
    print(f"ratio      {ratio:.3f} (median of {config.repeats} pairs)")
    print(f"first batch of an epoch after {statistics.median(first_waits):.3f} s")


if __name__ == "__main__":
    run_script(main)
