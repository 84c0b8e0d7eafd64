"""Rows of a spec as modules, run in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from models import registry
from models.blocks.conv import fuse
from models.spec import DETECT, IMAGE, GraphSpec

G = TypeVar("G", bound="RowGraph")


class RowGraph(nn.Module):
    """Runs the rows of a spec in order: images (B, 3, H, W) in [0, 1] -> what the last row gives.

    A map is kept only until the last row that reads it has run.
    """

    def __init__(self, spec: GraphSpec, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleList(layers)  # named so for YOLOv5's keys: model.<row>.<part>
        self.spec = spec
        last_read = dict.fromkeys(range(len(layers)), -1)
        for index, layer in enumerate(spec.layers):
            for source in layer.sources:
                last_read[source] = index
        self._reads_list = [
            layer.block == DETECT or registry.BLOCKS[layer.block].reads_several
            for layer in spec.layers
        ]
        self._dead_after = [
            tuple(source for source in set(layer.sources) if last_read[source] == index)
            for index, layer in enumerate(spec.layers)
        ]

    @property
    def layers(self) -> nn.ModuleList:
        """The module of each row."""
        return self.model

    def forward(self, images: Tensor) -> Any:
        """What the last row makes of images in [0, 1]."""
        return self._run(images, {})

    def taps(self, images: Tensor) -> dict[str, Tensor]:
        """The maps of the rows P2, P3, ... by name."""
        names = {index: name for name, index in self.spec.taps().items()}
        kept: dict[int, Tensor] = dict.fromkeys(names, images)
        self._run(images, kept)
        return {names[index]: value for index, value in kept.items()}

    def _run(self, images: Tensor, kept: dict[int, Tensor]) -> Any:
        """Run all rows; maps of the rows in `kept` are put there."""
        outputs: dict[int, Any] = {IMAGE: images}
        result: Any = images
        for index, (layer, spec) in enumerate(zip(self.model, self.spec.layers, strict=True)):
            inputs = [outputs[source] for source in spec.sources]
            result = layer(inputs if self._reads_list[index] else inputs[0])
            outputs[index] = result
            if index in kept:
                kept[index] = result
            for source in self._dead_after[index]:
                del outputs[source]
        return result

    def fuse(self: G) -> G:
        """Fold every BatchNorm into its convolution, in place; for inference only."""
        fuse(self)
        return self
