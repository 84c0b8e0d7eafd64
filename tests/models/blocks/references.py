"""Definitions in plain torch of nets that no package has in that form; timm's MixNet, regrouped.

And what makes a random net worth a comparison: images, weights, BN statistics.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any

import timm
import torch
from timm.layers import MixedConv2d
from torch import Tensor, nn
from torch.nn import functional as F

# by size: widths of stages 2 to 4 and of the last 1x1
SHUFFLE_WIDTHS = {
    "0.5": ((48, 96, 192), 1024),
    "1.0": ((116, 232, 464), 1024),
    "1.5": ((176, 352, 704), 1024),
    "2.0": ((244, 488, 976), 2048),
}
VOV_MODULES = {"19": (1, 1, 1, 1), "39": (1, 1, 2, 2), "57": (1, 1, 4, 3), "99": (1, 3, 9, 3)}
GROWTH = 32  # of PeleeNet
LEAVES = (nn.Conv2d, nn.BatchNorm2d, nn.Linear)


def make_images(count: int, size: tuple[int, int], seed: int) -> Tensor:
    """Smooth shapes and noise: on noise alone the images of a batch look alike to a deep net."""
    generator = torch.Generator().manual_seed(seed)
    shapes = torch.randn(count, 3, 6, 6, generator=generator)
    noise = torch.randn(count, 3, *size, generator=generator)
    return F.interpolate(shapes, size=size, mode="bilinear") + 0.3 * noise


def randomise(net: nn.Module) -> None:
    """Weights of unit gain, biases and BN affine parameters that matter, in place."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for leaf in leaves(net):
            weight, bias = leaf.weight, leaf.bias
            assert isinstance(weight, Tensor)
            if isinstance(leaf, nn.BatchNorm2d):
                weight.copy_(torch.rand(weight.shape, generator=generator) + 0.5)
            else:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            if isinstance(bias, Tensor):
                bias.normal_(0, 0.3, generator=generator)


def calibrate(net: nn.Module, batches: Iterable[Any]) -> None:
    """Give BN the statistics of the batches; nothing else is in training mode.

    With the initial statistics the outputs of some nets hardly depend on the image, and damage to
    the net would go unseen.
    """
    net.eval()
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean over the batches
        norm.train()
    with torch.no_grad():
        for batch in batches:
            net(batch)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    net.eval()


def leaves(net: nn.Module) -> list[nn.Module]:
    """Convolutions, BN and linear layers in registration order."""
    return [part for part in net.modules() if isinstance(part, LEAVES)]


def conv_bn(
    c_in: int, c_out: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(c_out)


def unit(c_in: int, c_out: int, kernel: int = 1, stride: int = 1) -> nn.Sequential:
    """Convolution, BN, ReLU."""
    return nn.Sequential(*conv_bn(c_in, c_out, kernel, stride), nn.ReLU())


class OfficialUnit(nn.Module):
    """The authors' unit, with their names of its branches."""

    def __init__(self, c_in: int, c_out: int, stride: int) -> None:
        super().__init__()
        self.stride = stride
        middle = c_out // 2
        entering = c_in if stride == 2 else c_in // 2
        leaving = c_out - entering
        self.branch_proj = nn.Sequential()
        if stride == 2:
            self.branch_proj = nn.Sequential(
                *conv_bn(c_in, c_in, 3, 2, c_in), *conv_bn(c_in, c_in, 1), nn.ReLU()
            )
        self.branch_main = nn.Sequential(
            *conv_bn(entering, middle, 1), nn.ReLU(),
            *conv_bn(middle, middle, 3, stride, middle),
            *conv_bn(middle, leaving, 1), nn.ReLU(),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        if self.stride == 2:
            return torch.cat([self.branch_proj(x), self.branch_main(x)], dim=1)
        batch, channels, height, width = x.shape
        pairs = x.reshape(batch, channels // 2, 2, height, width)
        return torch.cat([pairs[:, :, 0], self.branch_main(pairs[:, :, 1])], dim=1)


class OfficialShuffleNetV2(nn.Module):
    """ShuffleNetV2 as the authors' code has it; plain torch."""

    def __init__(self, size: str) -> None:
        super().__init__()
        widths, last = SHUFFLE_WIDTHS[size]
        self.first = nn.Sequential(*conv_bn(3, 24, 3, 2), nn.ReLU())
        self.pool = nn.MaxPool2d(3, 2, 1)
        stages = []
        c_in = 24
        for width, units in zip(widths, (4, 8, 4), strict=True):
            stage = [OfficialUnit(c_in, width, 2)]
            stage += [OfficialUnit(width, width, 1) for _ in range(units - 1)]
            stages.append(nn.Sequential(*stage))
            c_in = width
        self.stages = nn.Sequential(*stages)
        self.last = nn.Sequential(*conv_bn(c_in, last, 1), nn.ReLU())
        self.drop = nn.Dropout(0.2) if size == "2.0" else nn.Identity()
        self.classifier = nn.Linear(last, 1000, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stages(self.pool(self.first(x))))
        return self.classifier(self.drop(x.mean(dim=(2, 3))))


class OriginalModule(nn.Module):
    """The authors' OSA module: eSE in every one, identity but in a stage's first."""

    def __init__(self, c_in: int, middle: int, c_out: int, layers: int, identity: bool) -> None:
        super().__init__()
        self.identity = identity
        widths = [c_in] + [middle] * layers
        self.chain = nn.ModuleList(unit(a, b, 3, 1) for a, b in itertools.pairwise(widths))
        self.concat = unit(sum(widths), c_out, 1, 1)
        self.gate = nn.Conv2d(c_out, c_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.chain:
            maps.append(conv(maps[-1]))
        y = self.concat(torch.cat(maps, dim=1))
        y = y * F.relu6(self.gate(F.adaptive_avg_pool2d(y, 1)) + 3.0) / 6.0
        return y + x if self.identity else y


class OriginalVoVNetV2(nn.Module):
    """VoVNetV2 as the authors' code has it, with a classifier; plain torch."""

    def __init__(self, modules: tuple[int, ...], layers: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(unit(3, 64, 3, 2), unit(64, 64, 3, 1), unit(64, 128, 3, 2))
        self.stages = nn.ModuleList()
        width = 128
        for count, middle, out in zip(
            modules, (128, 160, 192, 224), (256, 512, 768, 1024), strict=True
        ):
            stage = nn.Sequential()
            for index in range(count):
                stage.append(OriginalModule(width, middle, out, layers, index > 0))
                width = out
            self.stages.append(stage)
        self.fc = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if index:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


class PlainDenseLayer(nn.Module):
    def __init__(self, c_in: int, bottleneck: int) -> None:
        super().__init__()
        way = GROWTH // 2
        inter = int(way * bottleneck / 4) * 4
        if inter > c_in / 2:
            inter = int(c_in / 8) * 4
        self.branch1a = unit(c_in, inter)
        self.branch1b = unit(inter, way, 3)
        self.branch2a = unit(c_in, inter)
        self.branch2b = unit(inter, way, 3)
        self.branch2c = unit(way, way, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = self.branch1b(self.branch1a(x))
        two = self.branch2c(self.branch2b(self.branch2a(x)))
        return torch.cat([x, one, two], dim=1)


class PlainPeleeNet(nn.Module):
    """PeleeNet for 1000 classes; plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.stem1 = unit(3, 32, 3, 2)
        self.stem2a = unit(32, 16)
        self.stem2b = unit(16, 32, 3, 2)
        self.stem3 = unit(64, 32)
        width = 32
        self.stages = nn.ModuleList()
        for layers, bottleneck in ((3, 1), (4, 2), (8, 4), (6, 4)):
            dense = [PlainDenseLayer(width + i * GROWTH, bottleneck) for i in range(layers)]
            width += layers * GROWTH
            self.stages.append(nn.Sequential(*dense, unit(width, width)))
        self.classifier = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem1(x)
        x = self.stem3(torch.cat([F.max_pool2d(x, 2), self.stem2b(self.stem2a(x))], dim=1))
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index < 3:
                x = F.avg_pool2d(x, 2)
        x = F.dropout(x.mean(dim=(2, 3)), 0.05, self.training)
        return self.classifier(x)


def timm_mixnet(name: str) -> nn.Module:
    """timm's net with every pair of 1x1 convolutions on halves written as one of two groups.

    The pairs are what grouping means; that each one computes the same is checked here.
    """
    net = timm.create_model(name)
    pairs = {
        path: part for path, part in net.named_modules()
        if isinstance(part, MixedConv2d) and part["0"].kernel_size == (1, 1)
    }  # fmt: skip
    assert pairs
    for path, pair in pairs.items():
        halves = list(pair.values())
        grouped = nn.Conv2d(sum(pair.splits), sum(half.out_channels for half in halves), 1,
                            groups=len(halves), bias=False)  # fmt: skip
        x = torch.randn(2, grouped.in_channels, 3, 4)
        with torch.no_grad():
            grouped.weight.copy_(torch.cat([half.weight for half in halves]))
            torch.testing.assert_close(grouped(x), pair(x), rtol=1e-5, atol=1e-5)
        net.set_submodule(path, grouped)
    return net
