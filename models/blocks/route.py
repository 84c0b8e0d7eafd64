"""Rows without weights: concatenation, resizing, pooling, padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.checks import require_flag, require_positive
from models.blocks.conv import Block
from models.registry import register


@register
class Concat(Block):
    """Maps side by side on the channel axis.

    List of (B, c_i, H, W) -> (B, sum c_i, H, W).  `dimension` is YOLOv5's argument and can only
    be 1.
    """

    reads_several: ClassVar[bool] = True

    def __init__(self, c_in: Sequence[int], dimension: int = 1) -> None:
        super().__init__()
        if dimension != 1:
            raise ValueError(f"Concat joins channels, dimension 1; got {dimension!r}")
        if not isinstance(c_in, Sequence) or len(c_in) < 2:
            raise ValueError(f"Concat needs at least two maps, got the widths {c_in!r}")
        self.c_out = sum(c_in)

    @classmethod
    def width_out(cls, c_in: int | list[int], args: Mapping[str, Any]) -> int:
        return sum(c_in) if isinstance(c_in, list) else c_in

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        return torch.cat(list(maps), 1)


@register
class Upsample(Block):
    """Enlarge by a whole factor, nearest or bilinear.

    (B, c_in, H, W) -> (B, c_in, fH, fW).  Positions as in `nn.Upsample`; `size` must stay None,
    since a fixed size has no stride.
    """

    MODES = ("nearest", "bilinear")

    def __init__(
        self, c_in: int, size: None = None, scale_factor: int = 2, mode: str = "nearest"
    ) -> None:
        super().__init__()
        if size is not None:
            raise ValueError(f"Upsample: size must be None (give scale_factor), got {size!r}")
        if mode not in self.MODES:
            raise ValueError(f"Upsample: mode must be one of {', '.join(self.MODES)}, got {mode!r}")
        require_positive("Upsample", c_in=c_in, scale_factor=scale_factor)
        self.c_out = c_in
        self.scale_factor = scale_factor
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        return F.interpolate(x, scale_factor=float(self.scale_factor), mode=self.mode)


@register
class MaxPool(Block):
    """(B, c_in, H, W) -> (B, c_in, H', W'); stride = kernel unless given (`nn.MaxPool2d`)."""

    def __init__(
        self,
        c_in: int,
        kernel: int = 2,
        stride: int | None = None,
        padding: int = 0,
        ceil_mode: bool = False,
    ) -> None:
        super().__init__()
        stride = kernel if stride is None else stride
        require_positive("MaxPool", c_in=c_in, kernel=kernel, stride=stride)
        require_flag("MaxPool", ceil_mode=ceil_mode)
        if not isinstance(padding, int) or not 0 <= padding <= kernel // 2:
            raise ValueError(
                f"MaxPool: padding must be between 0 and kernel // 2 = {kernel // 2}, "
                f"got {padding!r}"
            )
        self.c_out = c_in
        self.pool = nn.MaxPool2d(kernel, stride, padding, ceil_mode=ceil_mode)

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


@register
class ZeroPad(Block):
    """Zeros around the map: padding (left, right, top, bottom), as in `nn.ZeroPad2d`.

    (B, c_in, H, W) -> (B, c_in, H + top + bottom, W + left + right).
    """

    def __init__(self, c_in: int, padding: Sequence[int] = (0, 0, 0, 0)) -> None:
        super().__init__()
        require_positive("ZeroPad", c_in=c_in)
        if (
            not isinstance(padding, Sequence)
            or len(padding) != 4
            or not all(isinstance(side, int) and side >= 0 for side in padding)
        ):
            raise ValueError(
                f"ZeroPad: padding must be four integers of at least 0, got {padding!r}"
            )
        self.c_out = c_in
        self.padding = tuple(padding)

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x, self.padding)
