"""Row table and cost of a detector: parameters, MACs, other operations, stride and channels.

`python -m models.profile cfg/yolov5n.yaml [--img 640] [--classes 80] [--json]` also checks a model
file and names the rows nobody uses.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from models.builder import build_detector
from models.cost import Cost, CostCounter, parameters, run_on_meta
from models.detector import Detector
from models.parser import load_spec
from models.spec import IMAGE_CHANNELS, SECTIONS
from utils.config import ArgumentParser
from utils.errors import UserError, run_script

MEGA, GIGA = 1e6, 1e9


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
        return " ".join(f"{key}={_compact(value)}" for key, value in self.args.items())


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

    def table(self) -> str:
        """The rows as text, one line each, with a heading."""
        lines = [_cells(row, self.image_size) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(*lines, HEADING, strict=True)]
        return "\n".join(
            "  ".join(
                cell.ljust(width) if title in LEFT else cell.rjust(width)
                for cell, width, title in zip(line, widths, HEADING, strict=True)
            ).rstrip()
            for line in (HEADING, *lines)
        )

    def summary(self, model: str) -> str:
        """One line: totals and the split into backbone, neck and head."""
        parts = ", ".join(
            f"{section} {part.params:,} / {part.macs / GIGA:.3f} GMACs"
            for section, part in ((section, self.part(section)) for section in SECTIONS)
        )
        return (
            f"{model}: {len(self.rows)} rows, {self.params:,} parameters; at {self.image_size} px "
            f"{self.macs / GIGA:.3f} GMACs = {self.flops / GIGA:.3f} GFLOPs, "
            f"{self.operations / GIGA:.3f} G other operations; {parts}"
        )

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
        return {"model": model, **totals, **split}


HEADING = (
    "row", "name", "from", "n", "params", "MMACs", "Mops", "stride", "channels", "H x W",
    "block", "arguments",
)  # fmt: skip
LEFT = frozenset({"name", "from", "block", "arguments"})


def _compact(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(_compact(item) for item in value) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _cells(row: RowProfile, image_size: int) -> tuple[str, ...]:
    sources = [source - row.index if source == row.index - 1 else source for source in row.sources]
    stride = channels = size = "-"
    if row.shape is not None:
        channels, size = str(row.shape[0]), f"{row.shape[1]}x{row.shape[2]}"
        stride = f"{image_size / row.shape[1]:g}"
    return (
        str(row.index), row.name or "", ",".join(map(str, sources)), str(row.repeats),
        f"{row.params:,}", f"{row.cost.macs / MEGA:.2f}", f"{row.cost.operations / MEGA:.2f}",
        stride, channels, size, row.block, row.arguments,
    )  # fmt: skip


def profile(model: Detector, image_size: int = 640) -> ModelProfile:
    """Count one square image of `image_size` pixels through the model, on the meta device.

    The model's weights, mode and device stay as they are; nothing is computed, so any size is
    cheap.  UserError when the size is no multiple of the largest stride.
    """
    largest = model.max_stride
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
        if isinstance(output, torch.Tensor):
            channels, height, width = output.shape[1:]
            shapes[index] = (channels, height, width)

    return [layer.register_forward_pre_hook(enter), layer.register_forward_hook(leave)]


def _collect(
    model: Detector,
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


def profile_file(name: str, *, image_size: int, classes: int) -> ModelProfile:
    """Profile a model file (path or name in cfg/) without giving memory to its weights."""
    with torch.device("meta"):
        model = build_detector(load_spec(name), classes=classes)
    return profile(model, image_size)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = ArgumentParser(
        prog="python -m models.profile", description=__doc__, allow_abbrev=False
    )
    parser.known = ("--img", "--imgsz", "--classes", "--json")
    parser.add_argument(
        "files", nargs="+", metavar="FILE", help="model YAML: a path or a name in cfg/"
    )
    parser.add_argument(
        "--img", "--imgsz", type=int, default=640, help="side of the image in pixels"
    )
    parser.add_argument("--classes", type=int, default=80, help="number of classes")
    parser.add_argument("--json", action="store_true", help="print a JSON list and nothing else")
    options = parser.parse_args(argv)
    if options.classes < 1:
        raise UserError(f"--classes must be at least 1, got {options.classes}")
    profiles = [
        (file, profile_file(file, image_size=options.img, classes=options.classes))
        for file in options.files
    ]
    if options.json:
        print(json.dumps([result.to_dict(file) for file, result in profiles], indent=2))
    for file, result in profiles:
        if not options.json:
            print(result.table())
            print(result.summary(file))
        for note in result.notes():
            print(f"{file}: {note}", file=sys.stderr if options.json else sys.stdout)


if __name__ == "__main__":
    run_script(main)
