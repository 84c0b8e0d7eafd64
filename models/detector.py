"""Rows of a spec as modules, run in order; a detector: images to raw maps, one per stride."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from models import registry
from models.blocks.conv import BN_EPS, BN_MOMENTUM, fuse
from models.registry import Head
from models.spec import IMAGE, GraphSpec, ModelSpec

G = TypeVar("G", bound="RowGraph")


class RowGraph(nn.Module):
    """Runs the rows of a spec in order: images (B, 3, H, W) in [0, 1] -> what the last row gives.

    A map is kept only until the last row that reads it has run.
    """

    mean: Tensor | None
    std: Tensor | None

    def __init__(self, spec: GraphSpec, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.model = nn.ModuleList(layers)  # named so for YOLOv5's keys: model.<row>.<part>
        self.spec = spec
        last_read = {s: index for index, layer in enumerate(spec.layers) for s in layer.sources}
        self._reads_list = [
            layer.block in registry.HEADS or registry.BLOCKS[layer.block].reads_several
            for layer in spec.layers
        ]
        self._dead_after = [
            tuple(source for source in set(layer.sources) if last_read[source] == index)
            for index, layer in enumerate(spec.layers)
        ]
        self.register_buffer("mean", None, persistent=False)  # the spec keeps them
        self.register_buffer("std", None, persistent=False)
        if spec.normalisation is not None:
            self.set_normalisation(*spec.normalisation)

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
        result: Any = images
        if self.mean is not None and self.std is not None:
            result = (images - self.mean) / self.std
        outputs: dict[int, Any] = {IMAGE: result}
        for index, (layer, spec) in enumerate(zip(self.model, self.spec.layers, strict=True)):
            inputs = [outputs[source] for source in spec.sources]
            result = layer(inputs if self._reads_list[index] else inputs[0])
            outputs[index] = result
            if index in kept:
                kept[index] = result
            for source in self._dead_after[index]:
                del outputs[source]
        return result

    def set_normalisation(self, mean: Sequence[float], std: Sequence[float]) -> None:
        """Normalise images by these from now on, per channel; the spec records it."""
        self.spec = replace(self.spec, normalisation=(tuple(mean), tuple(std)))
        like = next(self.parameters())
        for name, values in (("mean", mean), ("std", std)):
            tensor = torch.tensor(values, dtype=like.dtype, device=like.device)
            setattr(self, name, tensor.view(1, -1, 1, 1))

    def fuse(self: G) -> G:
        """Fold every BatchNorm into its convolution, in place; for inference only."""
        fuse(self)
        return self


class Detector(RowGraph):
    """Rows of a ModelSpec run in order.

    (B, 3, H, W) float in [0, 1], H and W multiples of the largest stride -> list of raw maps, one
    per level, of the head's own shape; the same in training and evaluation.
    """

    spec: ModelSpec

    def __init__(
        self, spec: ModelSpec, layers: Sequence[nn.Module], *, names: Sequence[str]
    ) -> None:
        super().__init__(spec, layers)
        self.names = tuple(names)

    @property
    def head(self) -> Head:
        """The detection head."""
        head = self.model[-1]
        assert isinstance(head, Head)
        return head

    @property
    def stride(self) -> tuple[int, ...]:
        """Pixels per cell of each level."""
        return self.head.stride

    @property
    def max_stride(self) -> int:
        """What image sides must be multiples of."""
        return max(self.stride)

    @property
    def input_type(self) -> torch.dtype:
        """The type of the weights, and of the images."""
        return next(self.parameters()).dtype

    def detect(self, images: Tensor, conf: float) -> tuple[Tensor, Tensor, Tensor]:
        """Images (B, 3, H, W) in [0, 1] -> what may score over `conf`, as `Head.decode` says."""
        return self.head.decode(self(images), conf)

    @property
    def end_to_end(self) -> bool:
        """Whether what it detects needs no suppression."""
        return self.head.end_to_end

    @property
    def has_branches(self) -> bool:
        """Whether it was built with an end-to-end branch and one for NMS."""
        return bool(self.spec.layers[-1].args.get("end_to_end"))

    def deploy(self, *, nms: bool = False) -> Detector:
        """Keep of the head what inference needs, in place: the end-to-end branch, or NMS's."""
        self.model[-1] = self.head.deployed(nms=nms)
        return self

    def fuse(self, *, nms: bool = False) -> Detector:
        """`deploy`, and fold every BatchNorm into its convolution, in place."""
        self.deploy(nms=nms)
        return super().fuse()

    @property
    def backbone_epsilon(self) -> float:
        """Epsilon of the BN of the backbone's first row."""
        return (self.spec.layers[0].norm or (BN_EPS, BN_MOMENTUM))[0]

    def set_backbone_epsilon(self, epsilon: float) -> None:
        """Give all BN of the backbone this epsilon, in the modules and in the spec."""
        layers = list(self.spec.layers)
        for index, layer in enumerate(layers):
            if layer.section != "backbone":
                continue
            momentum = (layer.norm or (0.0, BN_MOMENTUM))[1]
            layers[index] = replace(layer, norm=(epsilon, momentum))
            for part in self.layers[index].modules():
                if isinstance(part, nn.BatchNorm2d):
                    part.eps = epsilon
        self.spec = replace(self.spec, layers=tuple(layers))

    def to_half(self) -> Detector:
        """Weights in float16, for inference; decoding stays in float32, with exact anchors."""
        exact = dict(self.head.named_buffers(recurse=False))
        self.half()
        for name, buffer in exact.items():
            setattr(self.head, name, buffer)
        return self
