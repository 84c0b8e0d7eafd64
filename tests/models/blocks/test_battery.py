"""What every network must survive, on each small detector and the smallest backbone of a family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.builder import build_classifier, build_detector
from models.detector import Detector
from models.graph import RowGraph
from models.spec import GraphSpec
from models.yaml.parser import load_classifier, load_spec
from models.yaml.sections import section_names

CFG = Path(__file__).resolve().parents[2] / "cfg"
CLASSES = 3
TOLERANCE = 1e-4  # times max(1, largest expected value)
BF16_FACTOR = (
    5  # times the error that rounding weights and picture alone makes; 3.1 is the most seen
)


@dataclass(frozen=True)
class Subject:
    """A network of the zoo by name."""

    name: str
    detector: bool

    def __str__(self) -> str:
        return self.name

    def build(self, seed: int = 0) -> RowGraph:
        torch.manual_seed(seed)
        if self.detector:
            return build_detector(load_spec(self.name), classes=CLASSES)
        return build_classifier(load_classifier(self.name, classes=CLASSES))


def family(spec: GraphSpec) -> frozenset[Any]:
    """What the sizes of a family have in common: their blocks, flags and words."""
    return frozenset(
        (layer.block, *sorted((k, v) for k, v in layer.args.items() if isinstance(v, (bool, str))))
        for layer in spec.layers
    )


def size(spec: GraphSpec) -> int:
    """Something that orders the sizes of one family, without building any."""
    return sum(
        layer.repeats * sum(v for v in layer.args.values() if isinstance(v, int)) ** 2
        for layer in spec.layers
    )


def smallest_of_each_family(names: list[str]) -> set[str]:
    """One of each family; none that is far larger than a relative, as ResNet-50 than ResNet-18."""
    chosen: dict[frozenset[Any], tuple[int, str]] = {}
    for name in names:
        spec = load_classifier(name, classes=CLASSES)
        found = (size(spec), name)
        chosen[family(spec)] = min(found, chosen.get(family(spec), found))
    least: dict[str, int] = {}
    for value, name in chosen.values():
        relatives = name.split("-")[0]
        least[relatives] = min(value, least.get(relatives, value))
    return {name for value, name in chosen.values() if value <= 2 * least[name.split("-")[0]]}


def subjects() -> list[Any]:
    backbones = section_names("backbone")
    quick = smallest_of_each_family(backbones)
    detectors = sorted(path.stem for path in CFG.glob("*.yaml"))
    return [
        *(param(Subject(name, True), name.startswith("yolov5n")) for name in detectors),
        *(param(Subject(name, False), name in quick) for name in backbones),
    ]


def param(subject: Subject, quick: bool) -> Any:
    return pytest.param(subject, id=str(subject), marks=[] if quick else pytest.mark.slow)


@pytest.fixture(scope="module", params=subjects())
def subject(request: pytest.FixtureRequest) -> Subject:
    return request.param


@pytest.fixture(scope="module")
def net(subject: Subject) -> RowGraph:
    """The network with BN that is not the identity, in eval mode; not to be changed.

    Biases are positive: about 0, most activations bend, and a deep net with random weights would
    make a thousand times as much of the rounding of float32.
    """
    net = subject.build()
    generator = torch.Generator().manual_seed(1)
    norms = [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = None
        with torch.no_grad():
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 0.4 + 0.8)
            norm.bias.copy_(torch.rand(norm.bias.shape, generator=generator))
    with torch.no_grad():
        net.train()(pictures(net, count=8))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return net.eval()


def side(net: RowGraph) -> int:
    """64 pixels, or a multiple of the largest stride that has more than one cell."""
    return max(64, 2 * net.max_stride) if isinstance(net, Detector) else 64


def pictures(net: RowGraph, count: int = 2, wider: int = 0) -> Tensor:
    """Smooth shapes and noise: on noise alone the images of a batch look alike to a deep net."""
    generator = torch.Generator().manual_seed(count)
    size = (side(net), side(net) + wider)
    shapes = torch.randn(count, 3, 6, 6, generator=generator)
    noise = torch.randn(count, 3, *size, generator=generator)
    return F.interpolate(shapes, size=size, mode="bilinear") + 0.3 * noise


def outputs(net: nn.Module, images: Tensor) -> list[Tensor]:
    with torch.no_grad():
        found = net(images)
    return [found] if isinstance(found, Tensor) else list(found)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [part.shape for part in found] == [part.shape for part in expected]
    for one, other in zip(found, expected, strict=True):
        assert other.isfinite().all()
        largest = max(1.0, other.abs().max().item())
        assert (one.float() - other.float()).abs().max().item() <= TOLERANCE * largest


def test_shapes_at_two_sizes(net: RowGraph) -> None:
    wider = net.max_stride if isinstance(net, Detector) else 32
    for images in (pictures(net), pictures(net, wider=wider)):
        height, width = images.shape[-2:]
        with torch.no_grad():
            taps = net.taps(images)
        for name, feature in taps.items():
            stride = 2 ** int(name[1:])
            assert feature.shape[-2:] == (height // stride, width // stride), name
        shapes = [tuple(part.shape) for part in outputs(net, images)]
        if isinstance(net, Detector):
            sizes = [(height // stride, width // stride) for stride in net.stride]
            assert shapes == [(2, net.head.anchors_per_level, *s, 5 + CLASSES) for s in sizes]
        else:
            assert shapes == [(2, CLASSES)]
            assert {"P2", "P3", "P4", "P5"} <= set(taps)


def test_every_parameter_gets_a_finite_gradient(subject: Subject) -> None:
    net = subject.build().train()
    found = net(pictures(net, count=4))
    generator = torch.Generator().manual_seed(2)
    maps = [found] if isinstance(found, Tensor) else found
    sum((part * torch.randn(part.shape, generator=generator)).sum() for part in maps).backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_fuse_keeps_the_outputs(net: RowGraph) -> None:
    images = pictures(net)
    fused = copy.deepcopy(net).fuse()
    left = sum(isinstance(part, nn.BatchNorm2d) for part in fused.modules())
    assert left < sum(isinstance(part, nn.BatchNorm2d) for part in net.modules())
    assert_same(outputs(fused, images), outputs(net, images))


def test_bf16_autocast_stays_close(net: RowGraph) -> None:
    """As close as can be: a deep net with random weights makes much of any rounding."""
    images = pictures(net)
    expected = outputs(net, images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(net, images)
    rounded = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    allowed = outputs(rounded, images.bfloat16().float())
    for part, limit, exact in zip(found, allowed, expected, strict=True):
        assert part.dtype == torch.bfloat16
        assert part.isfinite().all()
        assert (part.float() - exact).norm() <= BF16_FACTOR * (limit - exact).norm()


def test_channels_last_is_the_same(net: RowGraph) -> None:
    images = pictures(net)
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    found = outputs(other, images.contiguous(memory_format=torch.channels_last))
    assert_same(found, outputs(net, images))


def test_export_is_the_same(net: RowGraph) -> None:
    exported = torch.export.export(net, (pictures(net),)).module()
    images = pictures(net).flip(0, 2)  # other pictures
    assert_same(outputs(exported, images), outputs(net, images))


def test_onnx_is_the_same(net: RowGraph, onnx_outputs: Callable[..., list[Tensor]]) -> None:
    images = pictures(net)
    assert_same(onnx_outputs(net, images), outputs(net, images))


def test_state_dict_round_trip_and_determinism(net: RowGraph, subject: Subject) -> None:
    images = pictures(net)
    expected = outputs(net, images)
    assert all(map(torch.equal, outputs(net, images), expected))
    one, other = (subject.build(seed).state_dict() for seed in (5, 5))
    assert all(map(torch.equal, one.values(), other.values()))
    again = subject.build(seed=6).eval()
    assert not all(map(torch.equal, again.state_dict().values(), one.values()))
    again.load_state_dict(net.state_dict())
    assert all(map(torch.equal, outputs(again, images), expected))
