"""What a forward moves through memory, on paper: the cost that FLOPs do not show.

Memory access cost and the guidelines G1-G4 are ShuffleNetV2's, arXiv:1807.11164, section 2; counted
on the meta device from the kernels of models/profile/kernels.py.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.graph import RowGraph
from models.profile.cost import run_on_meta
from models.profile.kernels import KINDS, Convolution, Kernel, KernelRecorder
from models.spec import IMAGE_CHANNELS


@dataclass(frozen=True)
class Findings:
    """G1-G4 as numbers: ratios to the best case (1 is best), kernels, a share of all elements."""

    unequal_widths: float | None  # G1: access of 1x1 convolutions / least at their MACs
    groups: float | None  # G2: access of group convolutions / at one group and the same MACs
    kernels: int  # G3: launched
    branches: int  # G3: most kernels side by side in a row
    elementwise: float  # G4: element-wise operators and depthwise convolutions, of all elements


@dataclass(frozen=True)
class Traffic:
    """What some kernels move together, and the most that lived in memory meanwhile."""

    kernels: tuple[Kernel, ...]
    peak_bytes: int  # images and live results; not weights, nor a library's work space
    branches: int

    @property
    def macs(self) -> int:
        """Multiply-adds of convolutions and linear layers."""
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def flops(self) -> int:
        """2 * MACs."""
        return 2 * self.macs

    @property
    def access(self) -> int:
        """Memory access cost of the convolutions alone, in elements (see Convolution)."""
        return sum(k.convolution.access for k in self.kernels if k.convolution)

    @property
    def access_bytes(self) -> int:
        """The same in bytes."""
        return sum(k.convolution.access * k.itemsize for k in self.kernels if k.convolution)

    @property
    def elements(self) -> int:
        """Read and written by all kernels."""
        return sum(kernel.elements for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        """The same in bytes."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def intensity(self) -> float:
        """FLOP per byte; 0 where nothing is moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    def by_kind(self) -> dict[str, int]:
        """Elements read and written by each of KINDS."""
        counter: Counter[str] = Counter()
        for kernel in self.kernels:
            counter[kernel.kind] += kernel.elements
        return {kind: counter[kind] for kind in KINDS}

    def findings(self) -> Findings:
        """The guidelines' numbers of these kernels."""
        convolutions = [k.convolution for k in self.kernels if k.convolution]
        narrow = [c for c in convolutions if c.pointwise]
        grouped = [c for c in convolutions if c.kind == "group"]
        elements = self.by_kind()
        light = elements["element-wise"] + elements["depthwise"]
        return Findings(
            unequal_widths=_ratio(narrow, [c.least_access for c in narrow]),
            groups=_ratio(grouped, [c.ungrouped.access for c in grouped]),
            kernels=len(self.kernels),
            branches=self.branches,
            elementwise=light / self.elements if self.elements else 0.0,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON: totals and findings, not each kernel."""
        return {
            "macs": self.macs,
            "flops": self.flops,
            "access": self.access,
            "access_bytes": self.access_bytes,
            "elements": self.elements,
            "bytes": self.bytes,
            "elements_by_kind": self.by_kind(),
            "intensity": self.intensity,
            "peak_bytes": self.peak_bytes,
            **vars(self.findings()),
        }


def _ratio(convolutions: Sequence[Convolution], best: Sequence[float]) -> float | None:
    return sum(c.access for c in convolutions) / sum(best) if convolutions else None


@dataclass(frozen=True)
class RowTraffic:
    """One row of a model."""

    index: int
    name: str | None
    block: str
    section: str
    traffic: Traffic

    @property
    def label(self) -> str:
        """'row 8 (C3Ghost)'."""
        return f"row {self.index} ({self.block})"


@dataclass(frozen=True)
class ModelTraffic:
    """A batch of square images through a model; `total` counts what ran outside rows, too."""

    image_size: int
    batch: int
    rows: tuple[RowTraffic, ...]
    total: Traffic

    def notes(self) -> tuple[str, str, str, str]:
        """A sentence for each of the guidelines G1-G4."""
        return (*_width_notes(self), *_kernel_notes(self))

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        rows = [
            {"index": r.index, "name": r.name, "block": r.block, "section": r.section}
            | r.traffic.to_dict()
            for r in self.rows
        ]
        size = {"image_size": self.image_size, "batch": self.batch}
        return {**size, **self.total.to_dict(), "notes": list(self.notes()), "rows": rows}


def _width_notes(model: ModelTraffic) -> tuple[str, str]:
    found = model.total.findings()
    widths, groups = "G1: no 1x1 convolutions", "G2: no group convolutions besides depthwise"
    if found.unequal_widths is not None:
        worst = max(model.rows, key=lambda row: row.traffic.findings().unequal_widths or 0)
        widths = (
            f"G1: the 1x1 convolutions move {found.unequal_widths:.2f} times what equal widths "
            f"would; most {worst.label}, {worst.traffic.findings().unequal_widths or 0:.2f}"
        )
    if found.groups is not None:
        worst = max(model.rows, key=lambda row: row.traffic.findings().groups or 0)
        groups = (
            f"G2: the group convolutions move {found.groups:.2f} times what one group would at "
            f"the same FLOPs; most {worst.label}, {worst.traffic.findings().groups or 0:.2f}"
        )
    return widths, groups


def _kernel_notes(model: ModelTraffic) -> tuple[str, str]:
    found = model.total.findings()
    most = max(model.rows, key=lambda row: len(row.traffic.kernels))
    light = max(model.rows, key=lambda row: _light_elements(row.traffic))
    return (
        f"G3: {found.kernels} kernels, {found.kernels / len(model.rows):.1f} a row, up to "
        f"{found.branches} side by side; most {most.label}, {len(most.traffic.kernels)}",
        f"G4: element-wise operators and depthwise convolutions move {found.elementwise:.0%} of "
        f"all elements; most {light.label}",
    )


def _light_elements(traffic: Traffic) -> int:
    elements = traffic.by_kind()
    return elements["element-wise"] + elements["depthwise"]


def count_traffic(module: nn.Module, *shapes: Sequence[int]) -> Traffic:
    """Traffic of one forward of any module in eval mode on inputs of these shapes (with batch).

    The inputs have the weights' type (float32 without weights) and live until the end, as their
    caller holds them.  Nothing is computed; the module stays as it is.
    """
    recorder = KernelRecorder()
    _record(module, recorder, *shapes)
    return _traffic(recorder, None)


def model_traffic(model: RowGraph, image_size: int = 640, *, batch: int = 1) -> ModelTraffic:
    """Traffic of a batch of square images, by row, of the model as it is (fused or not).

    The size must be one that the model takes; `counting.profile` says so in plain words.
    """
    recorder = KernelRecorder()
    handles = [
        handle
        for index, layer in enumerate(model.layers)
        for handle in _watch(layer, index, recorder)
    ]
    try:
        _record(model, recorder, (batch, IMAGE_CHANNELS, image_size, image_size))
    finally:
        for handle in handles:
            handle.remove()
    rows = tuple(
        RowTraffic(index, spec.name, spec.block, spec.section, _traffic(recorder, index))
        for index, spec in enumerate(model.spec.layers)
    )
    parts = [_traffic(recorder, None), *(row.traffic for row in rows)]
    total = Traffic(
        kernels=tuple(kernel for part in parts for kernel in part.kernels),
        peak_bytes=max(part.peak_bytes for part in parts),
        branches=max(part.branches for part in parts),
    )
    return ModelTraffic(image_size, batch, rows, total)


def _record(module: nn.Module, recorder: KernelRecorder, *shapes: Sequence[int]) -> None:
    weight = next(module.parameters(), None)
    dtype = torch.float32 if weight is None else weight.dtype
    inputs = [torch.empty(tuple(shape), dtype=dtype, device="meta") for shape in shapes]

    def begin(*_: Any) -> None:  # the shapes of the weights, made before, are no results
        recorder.start(inputs)

    handle = module.register_forward_pre_hook(begin)
    try:
        with torch.inference_mode(False), recorder:  # else composite operators arrive whole
            run_on_meta(module, *inputs)
    finally:
        handle.remove()


def _watch(layer: nn.Module, index: int, recorder: KernelRecorder) -> list[Any]:
    def enter(*_: Any) -> None:
        recorder.enter(index)

    def leave(*_: Any) -> None:
        recorder.enter(None)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def _traffic(recorder: KernelRecorder, label: int | None) -> Traffic:
    kernels = recorder.kernels(label)
    levels = Counter(kernel.depth for kernel in kernels)
    return Traffic(kernels, recorder.peak_bytes(label), max(levels.values(), default=0))
