"""Depthwise nets by memory layout, MixConv in parts and merged: `python -m benchmarks.layouts`.

Milliseconds of CPU per image, the median of passes in which all forms take turns: inference fused,
or, with --train, a training step (forward, sum of squares, backward).  CPU time, not the clock's,
so that a busy machine disturbs less.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from engine.measure.bench import LAYOUTS, prepare, sample_images
from models.blocks import mixconv
from models.builder import build_detector
from models.detector import Detector
from models.yaml.parser import load_spec
from utils.config import option, parse
from utils.errors import run_script
from utils.terminal import say

CPU = torch.device("cpu")
NETS = ("yolov5n", "yolov5n-ghost", "yolov5n-shuffle", "yolov5n-osa", "yolov5n-mixconv")


@dataclass(frozen=True)
class BenchConfig:
    """The command line: what to time."""

    cfg: tuple[str, ...] = option(NETS, help="model YAMLs")
    imgsz: tuple[int, ...] = option((320, 640), flags=("--img",), min=32, help="network sizes")
    batches: tuple[int, ...] = option((1, 8), min=1, help="images per pass")
    rounds: int = option(8, min=1, help="passes of each form")
    train: bool = option(False, help="time training steps instead")


def main(argv: list[str] | None = None) -> int:
    """Print a line for each model, size and batch."""
    config = parse(BenchConfig, argv, prog="benchmarks.layouts", description=__doc__ or "")
    say(f"{torch.get_num_threads()} threads; ms of CPU per image")
    for name in config.cfg:
        for size in config.imgsz:
            for batch in config.batches:
                steps = (training_steps if config.train else forward_steps)(name, size, batch)
                times: dict[str, list[float]] = {form: [] for form in steps}
                for _ in range(config.rounds + 1):
                    for form, step in steps.items():
                        start = time.process_time()
                        step()
                        times[form].append((time.process_time() - start) * 1000 / batch)
                found = (f"{form} {statistics.median(t[1:]):.1f}" for form, t in times.items())
                say(f"{name} at {size} px, batch {batch}: {', '.join(found)}")
    return 0


def forward_steps(name: str, size: int, batch: int) -> dict[str, Callable[[], Any]]:
    """Inference in both layouts; where there is a MixConv, also with its kernels apart."""
    torch.manual_seed(0)
    model = build_detector(load_spec(name), classes=80)
    steps = {layout: inference(model, layout, size, batch) for layout in LAYOUTS}
    if any(isinstance(part, mixconv.MixConv) for part in model.modules()):
        with mock.patch.object(mixconv, "MAX_MERGED", 0):
            steps |= {f"{key} in parts": inference(model, key, size, batch) for key in LAYOUTS}
    return steps


def inference(model: Detector, layout: str, size: int, batch: int) -> Callable[[], Any]:
    """One forward pass of the fused model."""
    ready = prepare(model, CPU, layout=layout)
    images = sample_images(batch, size, CPU, like=model, layout=layout)
    return torch.inference_mode()(lambda: ready(images))


def training_steps(name: str, size: int, batch: int) -> dict[str, Callable[[], Any]]:
    """Forward and backward in both layouts."""

    def step(layout: str) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = build_detector(load_spec(name), classes=80).train()
        model.to(memory_format=LAYOUTS[layout])  # type: ignore[call-overload]
        images = sample_images(batch, size, CPU, like=model, layout=layout)

        def run() -> None:
            model.zero_grad()
            torch.stack([raw.square().mean() for raw in model(images)]).sum().backward()

        return run

    return {layout: step(layout) for layout in LAYOUTS}


if __name__ == "__main__":
    run_script(main)
