"""Cost of a detector or classifier by row: parameters, MACs, other operations, stride, channels.

`python -m models.profile cfg/yolov5n.yaml` prints it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.builder import build_classifier, build_detector
from models.detector import Detector
from models.graph import RowGraph
from models.profile.cost import Cost, CostCounter, parameters, run_on_meta
from models.spec import IMAGE_CHANNELS, SECTIONS, GraphSpec, ModelSpec
from models.yaml.parser import load_spec
from utils.errors import UserError


def compact(value: Any) -> str:
    """A value of a row as short text: [3,5,7], 0.5."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(compact(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


@dataclass(frozen=True)
class RowProfile:
    """One row at the profiled size; `shape` is (channels, height, width), None for Detect."""

    index: int
    name: str | None
    sources: tuple[int, ...]
    repeats: int
    block: str
    args: Mapping[str, Any]
    section: str
    params: int
    cost: Cost
    shape: tuple[int, int, int] | None
    used: bool  # by another row, or as the result

    @property
    def arguments(self) -> str:
        """'c_out=128 kernel=3', as the block gets them."""
        return " ".join(f"{key}={compact(value)}" for key, value in self.args.items())


@dataclass(frozen=True)
class Part:
    """Share of a section in the model."""

    params: int
    macs: int


@dataclass(frozen=True)
class ModelProfile:
    """Cost of one image through a detector; `outside` is what ran in no row."""

    image_size: int
    rows: tuple[RowProfile, ...]
    outside: Cost

    @property
    def params(self) -> int:
        """Parameters of all rows."""
        return sum(row.params for row in self.rows)

    @property
    def cost(self) -> Cost:
        """Cost of all rows and of what ran outside them."""
        return sum((row.cost for row in self.rows), self.outside)

    @property
    def macs(self) -> int:
        """Multiply-adds of Conv2d and Linear."""
        return self.cost.macs

    @property
    def flops(self) -> int:
        """2 * MACs."""
        return 2 * self.macs

    @property
    def operations(self) -> int:
        """BN, activations, pooling, additions, multiplications, upsampling."""
        return self.cost.operations

    @property
    def unused(self) -> tuple[RowProfile, ...]:
        """Rows whose output nobody reads."""
        return tuple(row for row in self.rows if not row.used)

    def part(self, section: str) -> Part:
        """'backbone': rows of `backbone:`; 'head': Detect; 'neck': the rest."""
        rows = [row for row in self.rows if row.section == section]
        rest = self.outside.macs if section == "neck" else 0
        return Part(sum(row.params for row in rows), sum(row.cost.macs for row in rows) + rest)

    def notes(self) -> list[str]:
        """What deserves a look: rows without use, operators without a count."""
        lines = [
            f"row {row.index} ({row.name or row.block}) is used by no other row"
            for row in self.unused
        ]
        calls = ", ".join(f"{name} ({n} calls)" for name, n in self.cost.uncounted.items())
        return [*lines, f"not counted: {calls}"] if calls else lines

    def to_dict(self, model: str) -> dict[str, Any]:
        """Plain values for JSON."""
        split = {section: vars(self.part(section)) for section in SECTIONS}
        totals = {"params": self.params, "macs": self.macs, "flops": self.flops}
        return {"model": model, "image_size": self.image_size, **totals, **split}


def profile(model: RowGraph, image_size: int = 640) -> ModelProfile:
    """Count one square image of `image_size` pixels through the model, on the meta device.

    The model's weights, mode and device stay as they are; nothing is computed, so any size is
    cheap.  UserError when the size is no multiple of the largest stride.
    """
    largest = model.max_stride if isinstance(model, Detector) else 1
    if image_size < 1 or image_size % largest:
        below = max(image_size // largest, 1) * largest
        raise UserError(
            f"image size {image_size} is not a multiple of the largest stride {largest}; "
            f"try {below} or {below + largest}"
        )
    counter = CostCounter()
    shapes: dict[int, tuple[int, int, int]] = {}
    handles = [
        handle
        for index, layer in enumerate(model.layers)
        for handle in _watch(layer, index, counter, shapes)
    ]
    dtype = next(model.parameters()).dtype
    image = torch.empty(1, IMAGE_CHANNELS, image_size, image_size, dtype=dtype, device="meta")
    try:
        with counter:
            run_on_meta(model, image)
    finally:
        for handle in handles:
            handle.remove()
    return _collect(model, image_size, counter, shapes)


def _watch(
    layer: nn.Module, index: int, counter: CostCounter, shapes: dict[int, tuple[int, int, int]]
) -> list[Any]:
    def enter(*_: Any) -> None:
        counter.label = index

    def leave(_: nn.Module, inputs: Any, output: Any) -> None:
        counter.label = None
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            channels, height, width = output.shape[1:]
            shapes[index] = (channels, height, width)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def _collect(
    model: RowGraph,
    image_size: int,
    counter: CostCounter,
    shapes: Mapping[int, tuple[int, int, int]],
) -> ModelProfile:
    unused = set(model.spec.unused_rows())
    rows = tuple(
        RowProfile(
            index=index,
            name=spec.name,
            sources=spec.sources,
            repeats=spec.repeats,
            block=spec.block,
            args=spec.args,
            section=spec.section,
            params=parameters(layer),
            cost=counter.cost(index),
            shape=shapes.get(index),
            used=index not in unused,
        )
        for index, (spec, layer) in enumerate(zip(model.spec.layers, model.layers, strict=True))
    )
    return ModelProfile(image_size, rows, counter.cost(None))


def profile_spec(spec: GraphSpec, *, image_size: int, classes: int) -> ModelProfile:
    """Profile a spec without giving memory to its weights."""
    with torch.device("meta"):
        model: RowGraph = (
            build_detector(spec, classes=classes)
            if isinstance(spec, ModelSpec)
            else build_classifier(spec)
        )
    return profile(model, image_size)


def profile_file(name: str, *, image_size: int, classes: int) -> ModelProfile:
    """The same of a model file, by path or by its name in cfg/."""
    return profile_spec(load_spec(name), image_size=image_size, classes=classes)
