"""Operators that one training step dispatches, by part: `python -m benchmarks.launches`.

A small network on a fast GPU waits for launches, and their number needs no GPU to be counted.
Views and empty tensors are left out: they start nothing on the device.  The model's part holds
forward and backward; cuDNN and fused kernels start less than is counted here, sorts more.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from engine.train.ema import ModelEma
from engine.train.optimizer import build_optimizer, update_weights
from models.builder import build_detector
from models.losses.build import build_loss
from models.spec import HEAD_ROWS
from models.yaml.parser import load_spec
from utils.boxes import Targets
from utils.config import option, parse
from utils.errors import run_script
from utils.hyp import Hyperparameters

EMPTY = ("empty", "_unsafe_view")


@dataclass(frozen=True)
class LaunchConfig:
    """The command line: the step to count."""

    cfg: str = option("yolov5n", help="model YAML, by path or name")
    head: str = option("", choices=tuple(HEAD_ROWS), help="head in place of the model's own")
    imgsz: int = option(320, flags=("--img",), help="network size in pixels")
    batch_size: int = option(4, flags=("--batch",), help="images")
    classes: int = option(80, help="classes")


class Operators(TorchDispatchMode):
    """Counts what is dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        views = any(
            item.alias_info and not item.alias_info.is_write for item in func._schema.returns
        )
        if not views and not any(word in func.__name__ for word in EMPTY):
            self.names[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count(config: LaunchConfig) -> dict[str, int]:
    """Operators of one step of SGD, on the CPU, by part."""
    torch.manual_seed(0)
    model = build_detector(
        load_spec(config.cfg, head=config.head or None), classes=config.classes
    ).train()
    hyp = Hyperparameters()
    optimizer = build_optimizer(model, "SGD", hyp, weight_decay=hyp.weight_decay)
    loss, ema = build_loss(model, hyp, image_size=config.imgsz), ModelEma(model)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    size, number = config.imgsz, 8 * config.batch_size
    images = torch.rand(config.batch_size, 3, size, size)
    corners = torch.rand(number, 2, 2).sort(1).values.flatten(1) * size
    owners = torch.arange(number) // 8
    targets = Targets(owners, torch.zeros(number, dtype=torch.int64), corners)
    counts: dict[str, int] = {}
    for _ in range(2):  # the first step makes what later ones find
        parts = {name: Operators() for name in ("model", "loss", "optimizer", "average")}
        with parts["model"]:
            raw = model(images)
        leaves = [y.detach().requires_grad_() for y in raw]
        with parts["loss"]:
            total, _ = loss(leaves, targets)
            total.backward()
        with parts["model"]:
            torch.autograd.backward(raw, [leaf.grad for leaf in leaves])
        with parts["optimizer"]:
            update_weights(optimizer, scaler, max_norm=10.0)
        with parts["average"]:
            ema.update()
        counts = {name: sum(part.names.values()) for name, part in parts.items()}
    return counts


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    config = parse(LaunchConfig, argv, prog="benchmarks.launches", description=__doc__ or "")
    counts = count(config)
    for name, number in {**counts, "step": sum(counts.values())}.items():
        print(f"{name:10} {number:6}")


if __name__ == "__main__":
    run_script(main)
