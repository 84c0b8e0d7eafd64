"""Cost of a detector or classifier by row, as `python -m models.profile FILE` prints it."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from models.builder import build_classifier, build_detector
from models.detector import Detector, RowGraph
from models.profile.cost import Cost, Recorder, parameters, record
from models.spec import IMAGE_CHANNELS, SECTIONS, GraphSpec, LayerSpec, ModelSpec
from utils.errors import UserError


@dataclass(frozen=True)
class RowProfile:
    """One row at the profiled size; `shape` is (channels, height, width), None for Detect."""

    index: int
    spec: LayerSpec
    params: int
    cost: Cost
    shape: tuple[int, int, int] | None

    @property
    def label(self) -> str:
        """'row 8 (C3Ghost)'."""
        return f"row {self.index} ({self.spec.block})"


@dataclass(frozen=True)
class Part:
    """Share of a section in the model."""

    params: int
    macs: int


@dataclass(frozen=True)
class ModelProfile:
    """Cost of a batch of square images through a model; `outside` is the cost of no row."""

    spec: GraphSpec
    image_size: int
    rows: tuple[RowProfile, ...]
    outside: Cost

    @property
    def params(self) -> int:
        """Parameters of all rows."""
        return sum(row.params for row in self.rows)

    @cached_property
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
        return self.cost.flops

    def part(self, section: str) -> Part:
        """'backbone': rows of `backbone:`; 'head': Detect; 'neck': the rest."""
        rows = [row for row in self.rows if row.spec.section == section]
        rest = self.outside.macs if section == "neck" else 0
        return Part(sum(row.params for row in rows), sum(row.cost.macs for row in rows) + rest)

    def notes(self) -> list[str]:
        """Unused rows, and operators without a count."""
        unused = [(index, self.spec.layers[index]) for index in self.spec.unused_rows()]
        lines = [f"row {i} ({row.name or row.block}) is used by no other row" for i, row in unused]
        calls = ", ".join(f"{name} ({n} calls)" for name, n in self.cost.uncounted.items())
        return [*lines, f"not counted: {calls}"] if calls else lines

    def to_dict(self, model: str) -> dict[str, Any]:
        """Plain values for JSON."""
        split = {section: vars(self.part(section)) for section in SECTIONS}
        totals = {"params": self.params, "macs": self.macs, "flops": self.flops}
        return {"model": model, "image_size": self.image_size, **totals, **split}


def profile(model: RowGraph, image_size: int = 640, *, batch: int = 1) -> ModelProfile:
    """Cost of a batch of square images through the model as it is (fused or not), by row.

    The model's weights, mode and device stay as they are; nothing is computed, so any size is
    cheap.  UserError when the size is not a multiple of the largest stride.
    """
    stride = model.max_stride if isinstance(model, Detector) else 1
    if image_size < 1 or image_size % stride:
        below = max(image_size // stride, 1) * stride
        raise UserError(
            f"image size {image_size} is not a multiple of the largest stride {stride}; "
            f"try {below} or {below + stride}"
        )
    recorder = Recorder()
    shapes: dict[int, tuple[int, int, int]] = {}

    def leave(index: int, _: nn.Module, inputs: Any, output: Any) -> None:
        recorder.enter(None)
        if isinstance(output, torch.Tensor) and output.ndim == 4:
            shapes[index] = (output.shape[1], output.shape[2], output.shape[3])

    with contextlib.ExitStack() as hooks:
        for index, layer in enumerate(model.layers):
            hooks.enter_context(layer.register_forward_pre_hook(partial(recorder.enter, index)))
            hooks.enter_context(layer.register_forward_hook(partial(leave, index)))
        record(model, recorder, (batch, IMAGE_CHANNELS, image_size, image_size))
    rows = tuple(
        RowProfile(index, spec, parameters(layer), recorder.cost(index), shapes.get(index))
        for index, (spec, layer) in enumerate(zip(model.spec.layers, model.layers, strict=True))
    )
    return ModelProfile(model.spec, image_size, rows, recorder.cost())


def profile_spec(spec: GraphSpec, *, image_size: int, classes: int) -> ModelProfile:
    """Profile a spec without giving memory to its weights."""
    with torch.device("meta"):
        model: RowGraph = (
            build_detector(spec, classes=classes)
            if isinstance(spec, ModelSpec)
            else build_classifier(spec)
        )
    return profile(model, image_size)
