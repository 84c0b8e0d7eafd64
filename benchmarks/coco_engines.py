"""COCO's metrics: this project and pycocotools. `python -m benchmarks.coco_engines`.

A synthetic load of the size of COCO val2017: 5000 images, 80 classes, 36,781 boxes, 100 detections
per image.  Each engine starts from the same arrays, so building its inputs counts; faster-coco-eval
is timed, too, if it is installed.  Prints seconds, AP, and how far the twelve metrics differ.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from engine.evaluate.coco import coco_metrics, from_tables
from engine.evaluate.matching import BoxTable
from utils.config import option, parse
from utils.errors import run_script

BOXES_PER_IMAGE = 36_781 / 5_000  # of COCO val2017
CROWDS = 0.012  # its share of crowd regions


@dataclass(frozen=True)
class Load:
    """The size of the problem."""

    images: int = option(5000, help="images")
    classes: int = option(80, help="classes")
    detections: int = option(100, help="detections per image")
    seed: int = option(0, help="random seed of the boxes")


def made_up(load: Load) -> tuple[BoxTable, BoxTable]:
    """Boxes from 4 to 400 px; six of ten detections lie near one of them."""
    rng = np.random.default_rng(load.seed)
    count, total = round(load.images * BOXES_PER_IMAGE), load.images * load.detections

    def corners(number: int) -> np.ndarray:
        size = np.exp(rng.uniform(np.log(4), np.log(400), (number, 2)))
        low = rng.uniform(0, 640 - size)
        return np.concatenate((low, low + size), 1)

    boxes, labels = corners(count), rng.integers(0, load.classes, count)
    owner = rng.integers(0, load.images, count)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    truth = BoxTable.ground_truth(owner, labels, boxes, rng.random(count) < CROWDS, area)
    found, image = corners(total), rng.integers(0, load.images, total)
    label = rng.integers(0, load.classes, total)
    near, source = rng.random(total) < 0.6, rng.integers(0, count, total)
    side = np.repeat(np.sqrt(area)[source, None], 4, 1)
    found[near] = (boxes[source] + rng.normal(0, 0.05, (total, 4)) * side)[near]
    found[:, 2:] = np.maximum(found[:, 2:], found[:, :2] + 1)
    image[near], label[near] = owner[source][near], labels[source][near]
    detections = BoxTable.detections(image, label, found, rng.random(total).astype(np.float32))
    return truth, detections.take(np.argsort(image, kind="stable"))


def ours(load: Load, truth: BoxTable, found: BoxTable) -> list[float]:
    """The twelve metrics by engine/evaluate/coco.py."""
    result = coco_metrics(found, truth, images=load.images, classes=load.classes)
    return list(result.twelve.values())


def by_pycocotools(
    load: Load, truth: BoxTable, found: BoxTable, interface: tuple[Any, Any] = (COCO, COCOeval)
) -> list[float]:
    """The twelve metrics by the reference, or by another engine with its two classes."""
    evaluation = from_tables(found, truth, load.images, load.classes, *interface)
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    return list(evaluation.stats[:12])


def main(argv: list[str] | None = None) -> None:
    """Time the engines one after another on one load."""
    load = parse(Load, argv, prog="benchmarks.coco_engines", description=__doc__ or "")
    truth, found = made_up(load)
    engines: dict[str, Callable[[Load, BoxTable, BoxTable], list[float]]] = {"featherdet": ours}
    if importlib.util.find_spec("faster_coco_eval") is not None:
        other = importlib.import_module("faster_coco_eval")
        interface = other.COCO, other.COCOeval_faster
        engines["faster-coco-eval"] = partial(by_pycocotools, interface=interface)
    engines["pycocotools"] = by_pycocotools
    first: list[float] = []
    for name, engine in engines.items():
        start = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            metrics = engine(load, truth, found)
        seconds = time.perf_counter() - start
        first = first or metrics
        difference = float(np.abs(np.subtract(metrics, first)).max())
        print(f"{name:20} {seconds:8.2f} s   AP {metrics[0]:.4f}   differs by {difference:.1e}")


if __name__ == "__main__":
    run_script(main)
