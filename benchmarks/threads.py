"""What waiting OpenMP threads cost, on an idle and on a busy CPU: `python -m benchmarks.threads`.

A training step of 8 images at 320 px and an inference of one at 640 px, yolov5n.  OpenMP reads its
environment when torch is loaded, so each setting has processes of its own, which take turns.
`--busy N` starts N programs that only loop.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

from utils.config import check_options, option, parse
from utils.errors import WAITING, run_script
from utils.files import ROOT

SETTINGS = {
    "OpenMP's default": {},
    "as the scripts set it": {"GOMP_SPINCOUNT": "10000", "KMP_BLOCKTIME": "1"},
    "passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


@dataclass(frozen=True)
class ThreadsConfig:
    """The command line."""

    busy: int = option(0, min=0, max=64, help="programs that only loop meanwhile")
    rounds: int = option(5, min=1, max=1000, help="processes of each setting")
    seconds: float = option(1.5, min=0, help="of each timing")
    alone: bool = option(False, help="print the two times of this process as JSON, nothing else")

    def __post_init__(self) -> None:
        check_options(self)


def main(argv: list[str] | None = None) -> None:
    """Print the medians of each setting."""
    config = parse(ThreadsConfig, argv, prog="benchmarks.threads", description=__doc__ or "")
    if config.alone:
        print(json.dumps(measure(config.seconds)))
        return
    clean = {k: v for k, v in os.environ.items() if k not in {*WAITING, "OMP_NUM_THREADS"}}
    command = [sys.executable, "-c", "from benchmarks.threads import main; main()"]
    command += ["--alone", "--seconds", str(config.seconds)]
    loops = [
        subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(config.busy)
    ]
    times: dict[str, list[list[float]]] = {name: [] for name in SETTINGS}
    try:
        for _ in range(config.rounds):
            for name, environment in SETTINGS.items():
                found = subprocess.check_output(command, cwd=ROOT, env={**clean, **environment})
                times[name].append(json.loads(found))
    finally:
        for process in loops:
            process.kill()
    for name, found in times.items():
        rate, latency = map(statistics.median, zip(*found, strict=True))
        print(f"{name:22} training {rate:6.1f} images/s   inference {latency:7.1f} ms")


def measure(seconds: float) -> tuple[float, float]:
    """Images per second of training and milliseconds of an inference, in this process."""
    import torch  # after the environment is set

    from models.builder import build_detector
    from models.losses.anchor import AnchorLoss
    from models.yaml.parser import load_spec
    from utils.boxes import Targets
    from utils.hyp import Hyperparameters

    model = build_detector(load_spec("yolov5n"), classes=80).train()
    loss = AnchorLoss(model, Hyperparameters(), image_size=320)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, fused=True)
    images, number = torch.rand(8, 3, 320, 320), torch.arange(40)
    targets = Targets(number % 8, number, torch.tensor([[50.0, 50.0, 200.0, 200.0]] * 40))

    def step() -> None:
        loss(model(images), targets)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    rate = len(images) / _median(step, seconds)
    model.eval().fuse()
    image = torch.rand(1, 3, 640, 640)
    with torch.inference_mode():
        return rate, 1e3 * _median(lambda: model(image), seconds)


def _median(work: Callable[[], object], seconds: float) -> float:
    """Seconds of one call, after a first one."""
    work()
    times, end = list[float](), time.perf_counter() + seconds
    while time.perf_counter() < end or not times:
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


if __name__ == "__main__":
    run_script(main)
