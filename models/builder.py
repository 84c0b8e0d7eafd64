"""ModelSpec to Detector, with every mistake told by file, line and row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from models import blocks, registry  # noqa: F401  importing blocks fills the registry
from models.blocks.conv import default_activation, default_norm
from models.detector import Detector
from models.graph import RowGraph
from models.heads.anchor import Detect
from models.profile.cost import ShapesOnly
from models.spec import DETECT, IMAGE, IMAGE_CHANNELS, GraphSpec, LayerSpec, ModelSpec
from utils.errors import UserError

PROBE = 256  # pixels; a multiple of every stride up to P8
MOST_REPEATS = 1000  # of a row; the deepest published stage has some forty


def build_detector(
    spec: ModelSpec, *, classes: int, names: Sequence[str] | None = None
) -> Detector:
    """Build the modules, measure the strides, set anchors and biases.

    `names` are the classes' names (numbers where None).  Raises UserError for a row that does not
    fit: unknown block, impossible argument, channels or sizes that disagree.
    """
    if names is None:
        names = [str(index) for index in range(classes)]
    if len(names) != classes:
        raise ValueError(f"{classes} classes, but {len(names)} names")
    model = Detector(spec, _build_rows(spec, classes), names=names)
    model.head.set_stride(_measure_strides(model), spec.anchors)
    return model


def build_classifier(spec: GraphSpec) -> RowGraph:
    """The modules of a spec that ends in no Detect, e.g. of `parser.load_classifier`."""
    return RowGraph(spec, _build_rows(spec, 0))


def _build_rows(spec: GraphSpec, classes: int) -> list[nn.Module]:
    channels: dict[int, int] = {IMAGE: IMAGE_CHANNELS}
    layers: list[nn.Module] = []
    for index, row in enumerate(spec.layers):
        inputs = [channels[source] for source in row.sources]
        if row.block == DETECT:
            assert isinstance(spec, ModelSpec)
            module: nn.Module = Detect(
                inputs, classes=classes, anchors_per_level=spec.anchors_per_level
            )
            channels[index] = 0
        else:
            with default_activation(row.activation or spec.activation), default_norm(row.norm):
                module, channels[index] = _build_row(row, index, inputs)
        layers.append(module)
    return layers


def _build_row(row: LayerSpec, index: int, inputs: list[int]) -> tuple[nn.Module, int]:
    block = registry.BLOCKS[row.block]
    several = registry.reads_several(row.block)
    if not several and len(inputs) != 1:
        raise UserError(f"{row.where}: row {index} {row.block} reads one row, got {len(inputs)}")
    if row.repeats > MOST_REPEATS:
        raise UserError(
            f"{row.where}: row {index} {row.block}: {row.repeats} repeats; {MOST_REPEATS} at most"
        )
    takes_repeats = any(item.name == "n" for item in registry.signature(row.block))
    count = 1 if takes_repeats else row.repeats
    args = dict(row.args)
    if takes_repeats:
        args["n"] = row.repeats
    c_in: int | list[int] = inputs if several else inputs[0]
    stack: list[nn.Module] = []
    try:
        for _ in range(count):
            module = block(c_in, **args)
            stack.append(module)
            c_in = module.c_out
    except (RuntimeError, TypeError, ValueError) as error:
        raise UserError(f"{row.where}: row {index} {row.block}: {error}") from error
    return (stack[0] if count == 1 else nn.Sequential(*stack)), int(module.c_out)


def _measure_strides(model: Detector) -> list[int]:
    """Run sizes (no pixels: the meta device) through the rows and see what Detect reads."""
    sizes: dict[int, torch.Tensor] = {}
    with torch.no_grad(), ShapesOnly():
        meta = torch.zeros(1, IMAGE_CHANNELS, PROBE, PROBE, device="meta")
        sizes[IMAGE] = meta
        for index, (row, layer) in enumerate(zip(model.spec.layers, model.layers, strict=True)):
            inputs = [sizes[source] for source in row.sources]
            if isinstance(layer, Detect):
                return [_stride(row, PROBE, item.shape) for item in inputs]
            try:
                sizes[index] = _on_meta(layer, inputs, registry.reads_several(row.block))
            except (RuntimeError, ValueError) as error:
                shapes = ", ".join("x".join(map(str, item.shape[1:])) for item in inputs)
                cause = str(error).splitlines()[0]
                raise UserError(
                    f"{row.where}: row {index} {row.block} cannot take maps of {shapes} "
                    f"(channels x height x width at {PROBE} px): {cause}"
                ) from error
    raise AssertionError("a ModelSpec ends in Detect")


def _on_meta(layer: nn.Module, inputs: list[torch.Tensor], reads_list: bool) -> torch.Tensor:
    tensors = {
        name: tensor.to("meta")
        for name, tensor in (*layer.named_parameters(), *layer.named_buffers())
    }
    value = inputs if reads_list else inputs[0]
    was_training = layer.training
    layer.eval()
    result: torch.Tensor = torch.func.functional_call(layer, tensors, (value,))
    layer.train(was_training)
    return result


def _stride(row: LayerSpec, size: int, shape: torch.Size) -> int:
    height, width = shape[-2:]
    if height != width or height < 1 or size % height:
        raise UserError(
            f"{row.where}: Detect reads a map of {height}x{width} for an image of {size}x{size}; "
            "every level must divide the image evenly"
        )
    return size // int(height)
