"""Convolution, normalisation, activation, channel attention: what other blocks are built from."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights

from models.registry import Act, Block, Natural, Positive, Ratio, must_divide, register
from utils.errors import nearest

BN_EPS = 1e-3  # YOLOv5's values; torch's own are 1e-5 and 0.1
BN_MOMENTUM = 0.03

# In place where backward needs the result only; elsewhere in place would cost a copy in training.
ACTIVATIONS: dict[str, Callable[..., nn.Module]] = {
    "SiLU": nn.SiLU,
    "ReLU": partial(nn.ReLU, inplace=True),
    "ReLU6": partial(nn.ReLU6, inplace=True),
    "LeakyReLU": partial(nn.LeakyReLU, inplace=True),
    "Hardswish": nn.Hardswish,
    "Mish": nn.Mish,
    "Identity": nn.Identity,
}
_ACTIVATION_TEXT = re.compile(
    r"(?:nn\.)?(?P<name>[A-Za-z0-9]+)(?:\(\s*(?P<value>[0-9]+\.?[0-9]*(?:[eE][-+]?[0-9]+)?)?\s*\))?"
)
Kernel = Positive | tuple[Positive, Positive]  # of both axes, or of rows and columns
Gate = Literal["Sigmoid", "Hardsigmoid"]  # the latter is relu6(x + 3) / 6
_defaults: ContextVar[tuple[str, tuple[float, float]]] = ContextVar(
    "defaults", default=("SiLU", (BN_EPS, BN_MOMENTUM))
)


def activation(text: str) -> nn.Module:
    """'SiLU', 'nn.ReLU()' or 'LeakyReLU(0.1)' -> a fresh module without parameters.

    ValueError for anything but a name of ACTIVATIONS, bare, with `()`, or with one number where
    the activation takes one (LeakyReLU).
    """
    match = _ACTIVATION_TEXT.fullmatch(text.strip())
    name, value = (match["name"], match["value"]) if match else (text, None)
    if name not in ACTIVATIONS:
        known = f"{', '.join(ACTIVATIONS)}{nearest(name, ACTIVATIONS)}"
        raise ValueError(f"unknown activation {text!r}; known: {known}")
    if value is None:
        return ACTIVATIONS[name]()
    if name != "LeakyReLU" or not math.isfinite(float(value)):
        raise ValueError(f"activation {name} takes no such number, got {text!r}")
    return ACTIVATIONS[name](float(value))


@contextlib.contextmanager
def row_defaults(act: str = "SiLU", norm: tuple[float, float] | None = None) -> Iterator[None]:
    """While inside, `act=True` means `act`, and BN has `norm`, (eps, momentum); None: YOLOv5's.

    Per thread, and restored afterwards.  ValueError for an unknown activation.
    """
    activation(act)
    token = _defaults.set((act, norm or (BN_EPS, BN_MOMENTUM)))
    try:
        yield
    finally:
        _defaults.reset(token)


def make_activation(act: Act) -> nn.Module:
    """True -> the model's default, False -> Identity, text -> `activation(text)`."""
    text = _defaults.get()[0] if act is True else act
    return activation(text) if text else nn.Identity()


def fuse(module: nn.Module) -> None:
    """Fold every BN that follows a convolution, in the whole tree, in place; for eval only."""
    for part in module.modules():
        if isinstance(part, Block):
            part.fuse_()


class BatchNorm2d(nn.BatchNorm2d):
    """Torch's, but batches are not counted: no result depends on it, and each count is a launch."""

    def forward(self, x: Tensor) -> Tensor:
        mean, variance, momentum = self.running_mean, self.running_var, self.momentum
        return F.batch_norm(
            x, mean, variance, self.weight, self.bias, self.training, momentum or 0.0, self.eps
        )


def batch_norm(channels: int) -> nn.BatchNorm2d:
    """BN with the epsilon and momentum of `row_defaults`; outside of it, YOLOv5's."""
    eps, momentum = _defaults.get()[1]
    return BatchNorm2d(channels, eps=eps, momentum=momentum)


@torch.no_grad()
def fold(convs: Iterable[Any], bn: nn.BatchNorm2d) -> None:
    """Fold a BN in eval mode into the convolutions before it, whose outputs it reads side by side.

    In place, computed in float64.
    """
    sizes = [conv.out_channels for conv in convs]
    values = (bn.running_mean, bn.running_var, bn.weight, bn.bias)
    parts = (value.double().split(sizes) for value in values if value is not None)
    for conv, mean, variance, scale, shift in zip(convs, *parts, strict=True):
        dtype = conv.weight.dtype
        conv.double()
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, mean, variance, bn.eps, scale, shift
        )
        conv.to(dtype)


def match(c_in: int, c_out: int, act: Act, stride: int = 1) -> nn.Module:
    """The identity where it fits, else a 1x1 Conv to the other width or size."""
    same = c_in == c_out and stride == 1
    return nn.Identity() if same else Conv(c_in, c_out, stride=stride, act=act)


@register
class Conv(Block):
    """k x k convolution without bias, BN, activation.

    (B, c_in, H, W) -> (B, c_out, H', W'); H' = ceil(H / stride) with an odd kernel and the default
    padding of kernel // 2.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Kernel = 1,
        stride: Kernel = 1,
        padding: Natural | None = None,
        groups: Positive = 1,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        must_divide(groups, c_in=c_in, c_out=c_out)
        size = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (size[0] // 2, size[1] // 2) if padding is None else (padding, padding)
        self.conv = nn.Conv2d(c_in, c_out, size, stride, pad, groups=groups, bias=False)
        self.bn: nn.Module = batch_norm(c_out)
        self.act = make_activation(act)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    def fuse_(self) -> None:
        if isinstance(self.bn, nn.BatchNorm2d):
            fold([self.conv], self.bn)
            self.bn = nn.Identity()


@register
class DWConv(Conv):
    """Conv with as many groups as the widths allow: depthwise when c_in == c_out.

    (B, c_in, H, W) -> (B, c_out, H', W'); groups = gcd(c_in, c_out).
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Kernel = 1,
        stride: Positive = 1,
        act: Act = True,
    ) -> None:
        groups = math.gcd(c_in, c_out)
        super().__init__(c_in, c_out, kernel, stride, groups=groups, act=act)


@register
class Conv2d(nn.Conv2d, Block):
    """torch's plain convolution with bias, without BN or activation (`nn.Conv2d` in a YAML).

    (B, c_in, H, W) -> (B, c_out, H', W').  No padding unless asked for, as in torch.
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Positive = 1,
        stride: Positive = 1,
        padding: Natural = 0,
        dilation: Positive = 1,
        groups: Positive = 1,
        bias: bool = True,
    ) -> None:
        must_divide(groups, c_in=c_in, c_out=c_out)
        super().__init__(c_in, c_out, kernel, stride, padding, dilation, groups, bias)
        self.c_out = c_out


@register
class Focus(Block):
    """The four pixel phases as channels, then a Conv: the stem of YOLOv5 v1-v5.

    (B, c_in, 2H, 2W) -> (B, c_out, H, W); both sides of the input must be even.  Phases (row,
    column) in the order (0, 0), (1, 0), (0, 1), (1, 1).
    """

    def __init__(
        self,
        c_in: int,
        c_out: Positive,
        kernel: Positive = 1,
        stride: Positive = 1,
        padding: Natural | None = None,
        groups: Positive = 1,
        act: Act = True,
    ) -> None:
        super().__init__(c_out)
        self.conv = Conv(4 * c_in, c_out, kernel, stride, padding, groups, act)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[..., ::2, :], x[..., 1::2, :]
        phases = [row[..., column::2] for column in (0, 1) for row in rows]
        return self.conv(torch.cat(phases, 1))


@register
class HeadConv(Conv):
    """A Conv whose width no multiplier touches: the last 1x1 of many papers.

    (B, c_in, H, W) -> (B, c_out, H', W').
    """

    channel_args = ()


@register
class NormAct(Block):
    """BN and activation without a convolution: (B, c_in, H, W) -> (B, c_in, H, W)."""

    def __init__(self, c_in: int, act: Act = True) -> None:
        super().__init__(c_in)
        self.bn = batch_norm(c_in)
        self.act = make_activation(act)


@register
class SE(Block):
    """x * gate(expand(act(reduce(mean x)))): both 1x1 convolutions with bias, no BN.

    (B, c_in, H, W) -> (B, c_in, H, W).  The inner width is `reduced`, or int(c_in * ratio) where
    that is None.  Squeeze-and-excitation, arXiv:1709.01507.
    """

    def __init__(
        self,
        c_in: int,
        ratio: Ratio = 0.25,
        reduced: Positive | None = None,
        act: Act = "ReLU",
        gate: Gate = "Sigmoid",
    ) -> None:
        super().__init__(c_in)
        width = int(c_in * ratio) if reduced is None else reduced
        if not 1 <= width <= c_in:
            asked = f"ratio {ratio}" if reduced is None else f"reduced {reduced!r}"
            raise ValueError(f"{asked} gives {width!r} of {c_in} channels; need 1 to {c_in}")
        self.reduce = nn.Conv2d(c_in, width, 1)
        self.act = make_activation(act)
        self.expand = nn.Conv2d(width, c_in, 1)
        self.gate = getattr(nn, gate)()

    def forward(self, x: Tensor) -> Tensor:
        mean = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(mean))))


@register
class ESE(Block):
    """x * hardsigmoid(fc(mean x)) with one 1x1 convolution of full width, with bias.

    (B, c_in, H, W) -> (B, c_in, H, W).  Effective SE of VoVNetV2, arXiv:1911.06667, section 3.2.
    """

    def __init__(self, c_in: int) -> None:
        super().__init__(c_in)
        self.fc = nn.Conv2d(c_in, c_in, 1)
        self.gate = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(self.fc(x.mean((2, 3), keepdim=True)))
