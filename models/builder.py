"""ModelSpec to Detector; every mistake is reported with file, line and row."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from models import blocks, heads, registry  # noqa: F401  importing these fills the registry
from models.blocks.conv import row_defaults
from models.detector import Detector, RowGraph
from models.profile.cost import ShapesOnly
from models.spec import DETECT, IMAGE, IMAGE_CHANNELS, GraphSpec, ModelSpec
from utils.errors import UserError

PROBE = 256  # pixels; a multiple of every stride up to P8
MAX_PARAMETERS = 5 * 10**8  # 2 GB; the largest shipped detector has 141 million
MAX_TENSORS = 10_000  # of parameters; the largest shipped backbone has some 700


def build_detector(
    spec: ModelSpec, *, classes: int, names: Sequence[str] | None = None
) -> Detector:
    """Build the modules, measure the strides, set anchors and biases.

    `names` are the classes' names (numbers where None).  Raises UserError for a row that does not
    fit: unknown block, impossible argument, channels or sizes that disagree.
    """
    layers = _build_rows(spec, classes)
    if names is None:
        names = [str(index) for index in range(classes)]
    model = Detector(spec, layers, names=names)
    model.head.set_stride(_measure_strides(model), spec.anchors)
    return model


def build_classifier(spec: GraphSpec) -> RowGraph:
    """The modules of a spec that ends in no Detect, e.g. of `parser.load_classifier`."""
    return RowGraph(spec, _build_rows(spec, 0))


def _build_rows(spec: GraphSpec, classes: int) -> list[nn.Module]:
    channels: dict[int, int] = {IMAGE: IMAGE_CHANNELS}
    layers: list[nn.Module] = []
    with _limited_size():
        for index, row in enumerate(spec.layers):
            inputs = [channels[source] for source in row.sources]
            try:
                with row_defaults(row.activation or spec.activation, row.norm):
                    if row.block in registry.HEADS:
                        assert isinstance(spec, ModelSpec)
                        own: Any = row.args
                        if row.block == DETECT:
                            own = {"anchors_per_level": spec.anchors_per_level}
                        head: Any = registry.HEADS[row.block]
                        layers.append(head(inputs, classes=classes, **own))
                        continue
                    module, channels[index] = registry.build(
                        row.block, inputs, row.repeats, row.args
                    )
                layers.append(module)
            except (RuntimeError, TypeError, ValueError) as error:
                raise UserError(f"{row.where}: row {index} {row.block}: {error}") from error
    return layers


@contextlib.contextmanager
def _limited_size() -> Iterator[None]:
    """While inside, this thread's modules may have MAX_PARAMETERS in MAX_TENSORS; else ValueError.

    torch registers a tensor before it is initialised, when it takes no memory yet.
    """
    thread, numbers, tensors = threading.get_ident(), 0, 0

    def count(_module: nn.Module, _name: str, parameter: nn.Parameter) -> None:
        nonlocal numbers, tensors
        if threading.get_ident() != thread or parameter is None:
            return
        numbers, tensors = numbers + parameter.numel(), tensors + 1
        if numbers > MAX_PARAMETERS:
            raise ValueError(f"over {MAX_PARAMETERS:,} parameters so far; refused")
        if tensors > MAX_TENSORS:
            raise ValueError(f"over {MAX_TENSORS:,} weights and biases so far; refused")

    handle = register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _measure_strides(model: Detector) -> list[int]:
    """Run sizes (no pixels: the meta device) through the rows and see what Detect reads."""
    maps = {IMAGE: torch.zeros(1, IMAGE_CHANNELS, PROBE, PROBE, device="meta")}
    *rows, detect = zip(model.spec.layers, model.layers, strict=True)
    with torch.no_grad():
        for index, (row, layer) in enumerate(rows):
            inputs = [maps[source] for source in row.sources]
            state = {key: tensor.to("meta") for key, tensor in layer.state_dict().items()}
            value = inputs if registry.BLOCKS[row.block].reads_several else inputs[0]
            try:
                with ShapesOnly():  # not around the copies to meta, which it would slow down
                    maps[index] = torch.func.functional_call(layer.eval(), state, (value,))
            except (RuntimeError, ValueError) as error:
                shapes = ", ".join("x".join(map(str, item.shape[1:])) for item in inputs)
                cause = str(error).splitlines()[0]
                raise UserError(
                    f"{row.where}: row {index} {row.block} cannot take maps of {shapes} "
                    f"(channels x height x width at {PROBE} px): {cause}"
                ) from error
    model.train()
    row = detect[0]
    strides = []
    for source in row.sources:
        height, width = maps[source].shape[-2:]
        if height != width or height < 1 or PROBE % height:
            raise UserError(
                f"{row.where}: {row.block} reads a map of {height}x{width} for an image of "
                f"{PROBE}x{PROBE}; every level must divide the image evenly"
            )
        strides.append(PROBE // int(height))
    return strides
