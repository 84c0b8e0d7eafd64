"""Cost of a detector or classifier by row, and ShuffleNetV2's guidelines about it as numbers."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn

from models.builder import build_classifier, build_detector
from models.detector import Detector, RowGraph
from models.profile.cost import Cost, Recorder, parameters, record
from models.profile.kernels import Convolution
from models.spec import IMAGE_CHANNELS, SECTIONS, GraphSpec, LayerSpec, ModelSpec
from utils.errors import UserError

LIGHT = ("element-wise", "depthwise")  # kernels of few operations per element


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
        return sum(row.params for row in self.rows)

    @cached_property
    def cost(self) -> Cost:
        """Cost of all rows and of what ran outside them."""
        return sum((row.cost for row in self.rows), self.outside)

    @property
    def macs(self) -> int:
        return self.cost.macs

    @property
    def flops(self) -> int:
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
    """Profile a spec, of a detector what inference needs, without giving memory to its weights."""
    with torch.device("meta"):
        if isinstance(spec, ModelSpec):
            return profile(build_detector(spec, classes=classes).deploy(), image_size)
        return profile(build_classifier(spec), image_size)


@dataclass(frozen=True)
class Findings:
    """ShuffleNetV2's guidelines G1-G4: costs that FLOPs do not show (arXiv:1807.11164, section 2).

    Ratios to the best case (1 is best), kernels, a share of all elements.
    """

    unequal_widths: float | None  # G1: access of 1x1 convolutions / minimum at their MACs
    groups: float | None  # G2: access of group convolutions / at one group and the same MACs
    kernels: int  # G3: launched
    branches: int  # G3: maximum of parallel kernels in a row
    elementwise: float  # G4: element-wise operators and depthwise convolutions, of all elements


def findings(cost: Cost) -> Findings:
    """The guidelines' numbers of some kernels."""
    convolutions = [k.convolution for k in cost.kernels if k.convolution]
    narrow = [c for c in convolutions if c.pointwise]
    grouped = [c for c in convolutions if c.kind == "group"]
    return Findings(
        unequal_widths=_ratio(narrow, [c.min_access for c in narrow]),
        groups=_ratio(grouped, [c.ungrouped.access for c in grouped]),
        kernels=len(cost.kernels),
        branches=cost.branches,
        elementwise=cost.elements_of(*LIGHT) / cost.elements if cost.elements else 0.0,
    )


def _ratio(convolutions: Sequence[Convolution], best: Sequence[float]) -> float | None:
    return sum(c.access for c in convolutions) / sum(best) if convolutions else None


def sentences(model: ModelProfile) -> tuple[str, str, str, str]:
    """A sentence for each of the guidelines G1-G4."""
    total = findings(model.cost)
    rows = [(row.label, findings(row.cost)) for row in model.rows]

    def most(key: str) -> tuple[str, Any]:
        """The row in which this number is highest, and the number."""
        label, found = max(rows, key=lambda row: getattr(row[1], key) or 0)
        return label, getattr(found, key)

    widths, groups = "G1: no 1x1 convolutions", "G2: no group convolutions besides depthwise"
    if total.unequal_widths is not None:
        widths = (
            f"G1: the 1x1 convolutions move {total.unequal_widths:.2f} times what equal widths "
            "would; most in {}, {:.2f}".format(*most("unequal_widths"))
        )
    if total.groups is not None:
        groups = (
            f"G2: the group convolutions move {total.groups:.2f} times what one group would at "
            "the same FLOPs; most in {}, {:.2f}".format(*most("groups"))
        )
    light = max(model.rows, key=lambda row: row.cost.elements_of(*LIGHT))
    return (
        widths,
        groups,
        f"G3: {total.kernels} kernels, {total.kernels / len(rows):.1f} per row, up to "
        f"{total.branches} in parallel; most in {', '.join(map(str, most('kernels')))}",
        f"G4: element-wise operators and depthwise convolutions move {total.elementwise:.0%} of "
        f"all elements; most in {light.label}",
    )
