"""A built detector: images to raw maps, one per stride."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from models.blocks.conv import fuse
from models.heads.anchor import Detect
from models.spec import IMAGE, ModelSpec


class Detector(nn.Module):
    """Rows of a ModelSpec run in order.

    (B, 3, H, W) float in [0, 1], H and W multiples of the largest stride -> list of raw maps, one
    per level, (B, A, H/stride, W/stride, 5 + classes); the same in training and evaluation.
    """

    def __init__(
        self, spec: ModelSpec, layers: Sequence[nn.Module], *, names: Sequence[str]
    ) -> None:
        super().__init__()
        self.spec = spec
        self.names = tuple(names)
        self.model = nn.ModuleList(layers)  # named so for YOLOv5's keys: model.<row>.<part>
        last_read = dict.fromkeys(range(len(layers)), -1)
        for index, layer in enumerate(spec.layers):
            for source in layer.sources:
                last_read[source] = index
        self._dead_after = [
            tuple(source for source in set(layer.sources) if last_read[source] == index)
            for index, layer in enumerate(spec.layers)
        ]

    @property
    def layers(self) -> nn.ModuleList:
        """The module of each row."""
        return self.model

    @property
    def head(self) -> Detect:
        """The detection head."""
        head = self.model[-1]
        assert isinstance(head, Detect)
        return head

    @property
    def stride(self) -> tuple[int, ...]:
        """Pixels per cell of each level."""
        return self.head.stride

    @property
    def max_stride(self) -> int:
        """What image sides must be multiples of."""
        return max(self.stride)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images in [0, 1] -> raw maps; see the class."""
        outputs: dict[int, Tensor] = {IMAGE: images}
        result: list[Tensor] = []
        for index, (layer, spec) in enumerate(zip(self.model, self.spec.layers, strict=True)):
            inputs = [outputs[source] for source in spec.sources]
            if isinstance(layer, Detect):
                result = layer(inputs)
            else:
                outputs[index] = layer(inputs[0] if len(inputs) == 1 else inputs)
            for source in self._dead_after[index]:
                del outputs[source]
        return result

    def fuse(self) -> Detector:
        """Fold every BatchNorm into its convolution, in place; for inference only."""
        fuse(self)
        return self
