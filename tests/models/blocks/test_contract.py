"""Every registered block and every network of the zoo: gradients, fusing, formats, exports."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from engine.export.runtime import without_telemetry
from models.blocks.conv import fuse, row_defaults
from models.builder import build_classifier, build_detector
from models.detector import Detector
from models.registry import BLOCKS, Block
from models.yaml.parser import load_classifier, load_spec
from models.yaml.sections import section_names
from tests.models.blocks.references import calibrate, make_images

CFG = Path(__file__).resolve().parents[3] / "cfg"
CLASSES = 3
TOLERANCE = 1e-4  # times max(1, largest expected value)
BF16_FACTOR = 5  # times the error of rounded weights and inputs alone; 3.1 is the most seen
# BN that stands before a convolution
UNFOLDED = {"BottleneckCSP": 1, "DenseStage": 2, "DenseTransition": 1, "NormAct": 1}


@dataclass(frozen=True)
class Case:
    """A block with arguments, its input width(s), and what it should deliver."""

    block: str
    c_in: int | list[int]
    c_out: int
    args: dict[str, Any] = field(default_factory=dict)
    stride: Fraction = Fraction(1)
    odd: bool = True  # whether maps of odd size are allowed

    def __str__(self) -> str:
        args = ",".join(f"{key}={value}" for key, value in self.args.items())
        return f"{self.block}({self.c_in}{',' if args else ''}{args})"

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return BLOCKS[self.block](copy.copy(self.c_in), **self.args)

    def inputs(self, size: tuple[int, int] = (8, 8), count: int = 2) -> Any:
        generator = torch.Generator().manual_seed(count)
        widths = self.c_in if isinstance(self.c_in, list) else [self.c_in]
        maps = [torch.randn(count, c, *size, generator=generator) for c in widths]
        return maps if isinstance(self.c_in, list) else maps[0]


HALVES = Fraction(2)
CASES = [
    Case("Conv", 6, 8, {"c_out": 8}),
    Case("Conv", 6, 8, {"c_out": 8, "kernel": 3, "stride": 2, "act": "ReLU"}, HALVES),
    Case("Conv", 3, 8, {"c_out": 8, "kernel": 6, "stride": 2, "padding": 2}, HALVES, odd=False),
    Case("Conv", 6, 8, {"c_out": 8, "kernel": [1, 5], "groups": 2, "act": False}),
    Case("DWConv", 6, 8, {"c_out": 8, "kernel": 3, "stride": 2}, HALVES),
    Case("Conv2d", 6, 7, {"c_out": 7}),
    Case("Conv2d", 6, 8, {"c_out": 8, "kernel": 3, "padding": 1, "groups": 2, "bias": False}),
    Case("Focus", 3, 8, {"c_out": 8, "kernel": 3}, HALVES, odd=False),
    Case("Bottleneck", 8, 8, {"c_out": 8}),
    Case("Bottleneck", 8, 12, {"c_out": 12, "shortcut": False, "groups": 2}),
    Case("C3", 12, 8, {"c_out": 8, "n": 2}),
    Case("C3", 8, 8, {"c_out": 8, "n": 1, "shortcut": False}),
    Case("CrossConv", 8, 8, {"c_out": 8, "shortcut": True}),
    Case("CrossConv", 6, 8, {"c_out": 8, "kernel": 5, "stride": 2, "groups": 2}, HALVES),
    Case("C3x", 12, 8, {"c_out": 8, "n": 2}),
    Case("C3SPP", 12, 8, {"c_out": 8, "kernels": [3, 5]}),
    Case("C3TR", 12, 16, {"c_out": 16, "n": 2}),
    Case("TransformerBlock", 6, 8, {"c_out": 8, "heads": 2}),
    Case("BottleneckCSP", 12, 8, {"c_out": 8, "n": 2}),
    Case("SPP", 8, 8, {"c_out": 8}),
    Case("SPPF", 8, 12, {"c_out": 12, "kernel": 3}),
    Case("GhostConv", 6, 8, {"c_out": 8, "kernel": 3, "stride": 2}, HALVES),
    Case("GhostBottleneck", 8, 8, {"c_out": 8}),
    Case("GhostBottleneck", 6, 8, {"c_out": 8, "stride": 2}, HALVES),
    Case("C3Ghost", 12, 16, {"c_out": 16, "n": 2}),
    Case("GhostModule", 6, 10, {"c_out": 10, "kernel": 3, "ratio": 3, "act": "ReLU"}),
    Case("GhostUnit", 8, 8, {"c_out": 8, "hidden": 12, "se": 0.25}),
    Case("GhostUnit", 6, 9, {"c_out": 9, "kernel": 5, "stride": 2, "act": "ReLU"}, HALVES),
    Case("GhostUnit", 6, 8, {"c_out": 8, "shortcut": False}),
    Case("GhostUnit", 6, 8, {"c_out": 8, "hidden": 12, "dfc": True}),
    Case(
        "GhostUnit", 6, 9,
        {"c_out": 9, "kernel": 5, "stride": 2, "se": 0.25, "dfc": True, "act": "ReLU"}, HALVES,
    ),
    Case("OSA", 8, 8, {"c_out": 8, "n": 3, "width": 6, "identity": True, "ese": True}),
    Case("OSA", 6, 8, {"c_out": 8, "n": 2, "bottleneck": 0.5}),
    Case("OSA", 6, 8, {"c_out": 8, "n": 2, "width": 4, "depthwise": True}),
    Case("OSAStage", 8, 8, {"c_out": 8, "n": 2}),
    Case("VoVStage", 6, 8, {"c_out": 8, "n": 3, "width": 4, "layers": 2, "identity": True, "ese": "last"}),
    Case("VoVStage", 8, 12, {"c_out": 12, "n": 2, "layers": 1, "ese": "every"}),
    Case("OSAStage", 12, 8, {"c_out": 8, "n": 2, "shortcut": False, "ese": True}),
    Case("ShuffleUnit", 8, 8, {"c_out": 8}),
    Case("ShuffleUnit", 8, 8, {"c_out": 8, "shuffle": "start"}),
    Case("ShuffleDown", 8, 8, {"c_out": 8}, HALVES),
    Case("ShuffleDown", 6, 10, {"c_out": 10, "official_widths": True, "shuffle": "start"}, HALVES),
    Case("ShuffleDown", 6, 16, {"c_out": 16, "official_widths": True, "kernel": 5}, HALVES),
    Case("ShuffleStage", 8, 8, {"c_out": 8, "n": 2}),
    Case("ShuffleStage", 12, 8, {"c_out": 8, "n": 3}),
    Case("MixConv", 10, 10, {"kernels": [3, 5, 7], "stride": 2}, HALVES),
    Case("MixConv2d", 8, 10, {"c_out": 10, "kernels": [1, 3, 5]}),
    Case("MixConv2d", 6, 40, {"c_out": 40, "stride": 2, "equal_ch": False}, HALVES),
    Case("MixConvBlock", 8, 8, {"c_out": 8, "kernels": [3, 5], "se": 0.5}),
    Case(
        "MixConvBlock", 8, 12,
        {"c_out": 12, "stride": 2, "expand": 3, "expand_groups": 2, "project_groups": 2}, HALVES,
    ),
    Case("MixConvBlock", 8, 8, {"c_out": 8, "expand": 1, "shortcut": False}),
    Case("MixStage", 8, 8, {"c_out": 8, "n": 2}),
    Case("MixStage", 12, 8, {"c_out": 8, "n": 2, "shortcut": False}),
    Case("PeleeStem", 3, 8, {"c_out": 8}, Fraction(4)),
    Case("PeleeStage", 16, 12, {"c_out": 12, "n": 2, "growth": 8, "bottleneck": 2}),
    Case("PeleeStage", 16, 32, {"c_out": 32, "n": 1, "growth": 16, "stride": 2}, HALVES, odd=False),
    Case("ResidualBasic", 8, 8, {"c_out": 8}),
    Case("ResidualBasic", 6, 8, {"c_out": 8, "stride": 2, "act": "ReLU"}, HALVES),
    Case("ResidualBottleneck", 8, 8, {"c_out": 8, "act": "ReLU"}),
    Case("ResidualBottleneck", 6, 8, {"c_out": 8, "stride": 2, "expansion": 0.5}, HALVES),
    Case("DenseStage", 6, 14, {"growth": 4, "n": 2, "bottleneck": 2}),
    Case("DenseTransition", 9, 4, {}, HALVES, odd=False),
    Case("InvertedResidual", 8, 8, {"c_out": 8, "se": 0.25, "act": "ReLU6"}),
    Case("InvertedResidual", 6, 8, {"c_out": 8, "kernel": 5, "stride": 2, "hidden": 12}, HALVES),
    Case("InvertedResidual", 8, 8, {"c_out": 8, "expand": 1, "shortcut": False}),
    Case("SE", 8, 8, {"ratio": 0.5, "act": True}),
    Case("ESE", 8, 8),
    Case("Concat", [4, 6, 2], 12),
    Case("WeightedSum", [4, 4, 4], 4),
    Case("Upsample", 5, 5, {"scale_factor": 2}, Fraction(1, 2)),
    Case("Upsample", 5, 5, {"scale_factor": 3, "mode": "bilinear"}, Fraction(1, 3)),
    Case("ConvTranspose2d", 6, 8, {"c_out": 8, "kernel": 2, "stride": 2}, Fraction(1, 2)),
    Case("Contract", 5, 20, {}, HALVES, odd=False),
    Case("Expand", 18, 2, {"gain": 3}, Fraction(1, 3)),
    Case("MaxPool", 5, 5, {"kernel": 2}, HALVES, odd=False),
    Case("MaxPool", 5, 5, {"kernel": 3, "stride": 2, "ceil_mode": True}, HALVES),
    Case("ZeroPad", 5, 5, {"padding": [0, 0, 0, 0]}),
    Case("HeadConv", 6, 8, {"c_out": 8, "kernel": 3, "stride": 2}, HALVES),
    Case("NormAct", 6, 6, {"act": "ReLU"}),
]  # fmt: skip


@dataclass(frozen=True)
class Network:
    """A detector or classifier of the zoo by name."""

    name: str
    detector: bool

    def build(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        if self.detector:
            return build_detector(load_spec(self.name), classes=CLASSES)
        return build_classifier(load_classifier(self.name, classes=CLASSES))

    def inputs(self, size: tuple[int, int] | None = None, count: int = 2) -> Tensor:
        size = size or ((128, 128) if self.name.endswith("6") else (64, 64))
        return make_images(count, size, seed=count)


# of the zoo; all others are slow
QUICK = (
    "bottleneckcsp-n", "csp-n", "densenet-121", "ghostnet-0.5", "ghostnetv2-1.0", "mixnet-s",
    "mobilenetv2-1.0", "mobilenetv3-small", "peleenet", "resnet-18", "shufflenetv2-0.5",
    "shufflenetv2-0.5-tv", "vovnet-27-slim", "vovnetv2-19-slim",
)  # fmt: skip


def subjects() -> list[Any]:
    detectors, backbones = sorted(p.stem for p in CFG.glob("*.yaml")), section_names("backbone")
    assert set(QUICK) <= set(backbones)
    result = [pytest.param(case, id=str(case)) for case in CASES]
    for name in (*detectors, *backbones):
        quick = name in QUICK or name.startswith("yolov5n")
        network = Network(name, name in detectors)
        result.append(pytest.param(network, id=name, marks=[] if quick else [pytest.mark.slow]))
    return result


@pytest.fixture(scope="module", params=subjects())
def subject(request: pytest.FixtureRequest) -> Case | Network:
    return request.param


@pytest.fixture(scope="module")
def net(subject: Case | Network) -> nn.Module:
    """The module with BN that is not the identity, in eval mode; not to be changed.

    Biases are positive: about 0, most activations bend, and a deep net with random weights would
    make a thousand times as much of the rounding of float32.
    """
    net = subject.build()
    generator = torch.Generator().manual_seed(1)
    for norm in [part for part in net.modules() if isinstance(part, nn.BatchNorm2d)]:
        with torch.no_grad():
            norm.weight.copy_(torch.rand(norm.weight.shape, generator=generator) * 0.4 + 0.8)
            norm.bias.copy_(torch.rand(norm.bias.shape, generator=generator))
    calibrate(net, [subject.inputs(count=8)])
    return net


def changed(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    return [change(part) for part in inputs] if isinstance(inputs, list) else change(inputs)


def outputs(net: nn.Module, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        found = net(inputs)
    return [found] if isinstance(found, Tensor) else list(found)


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert [part.shape for part in found] == [part.shape for part in expected]
    for one, other in zip(found, expected, strict=True):
        assert other.isfinite().all()
        largest = max(1.0, other.abs().max().item())
        assert (one.float() - other.float()).abs().max().item() <= TOLERANCE * largest


def test_every_registered_block_has_a_case() -> None:
    pooled = {"GlobalPool", "Linear"}  # no map comes out: TestClassifierEnd
    assert {case.block for case in CASES} == set(BLOCKS) - pooled


def test_shapes_at_two_sizes(net: nn.Module, subject: Case | Network) -> None:
    if isinstance(subject, Case):
        assert isinstance(net, Block)
        assert net.c_out == subject.c_out == subject.args.get("c_out", subject.c_out)
        for size in [(8, 12), *([(7, 9)] if subject.odd else [])]:
            stride = subject.stride
            expected = [-(-side * stride.denominator // stride.numerator) for side in size]
            if subject.block == "MaxPool" and subject.args["kernel"] == 3:
                # ceil mode without padding: the last window must begin inside the map
                expected = [side // 2 for side in size]
            (out,) = outputs(net, subject.inputs(size))
            assert list(out.shape) == [2, subject.c_out, *expected]
        return
    side = subject.inputs().shape[-1]
    for height, width in ((side, side), (side, side + (64 if side == 128 else 32))):
        images = subject.inputs((height, width))
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


def test_every_parameter_gets_a_finite_gradient(subject: Case | Network) -> None:
    net = subject.build().train()
    found = net(subject.inputs(count=4))
    generator = torch.Generator().manual_seed(3)
    maps = [found] if isinstance(found, Tensor) else found
    total = sum((part * torch.randn(part.shape, generator=generator)).sum() for part in maps)
    if total.requires_grad:
        total.backward()
    for name, parameter in net.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


def test_fuse_keeps_the_outputs(net: nn.Module, subject: Case | Network) -> None:
    inputs, fused = subject.inputs(), copy.deepcopy(net)
    fuse(fused)
    left, before = (
        sum(isinstance(p, nn.BatchNorm2d) for p in module.modules()) for module in (fused, net)
    )
    if isinstance(subject, Case):
        assert left == UNFOLDED.get(subject.block, 0)  # no convolution right before it
        exact, double = copy.deepcopy(net).double(), changed(inputs, Tensor.double)
        expected = outputs(exact, double)
        fuse(exact)
        torch.testing.assert_close(outputs(exact, double), expected, rtol=1e-9, atol=1e-9)
    else:
        assert left < before
    assert_same(outputs(fused, inputs), outputs(net, inputs))


def test_state_dict_round_trip_and_determinism(net: nn.Module, subject: Case | Network) -> None:
    inputs = subject.inputs()
    expected = outputs(net, inputs)
    assert all(map(torch.equal, outputs(net, inputs), expected))
    one, other = (subject.build(seed).state_dict() for seed in (5, 5))
    assert all(map(torch.equal, one.values(), other.values()))
    again = subject.build(seed=6).eval()
    again.load_state_dict(net.state_dict())
    assert all(map(torch.equal, outputs(again, inputs), expected))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_input_is_left_alone(case: Case) -> None:
    """In-place activations must not reach what other rows still read."""
    inputs, before = case.inputs(), case.inputs()
    with row_defaults("ReLU"):
        outputs(case.build(), inputs)
    assert all(map(torch.equal, inputs, before))


def test_bf16_autocast_stays_close(net: nn.Module, subject: Case | Network) -> None:
    """As close as can be: a deep net with random weights makes much of any rounding."""
    inputs = subject.inputs()
    expected = outputs(net, inputs)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = outputs(net, inputs)
    rounded = copy.deepcopy(net)
    with torch.no_grad():
        for parameter in rounded.parameters():
            parameter.copy_(parameter.bfloat16())
    allowed = outputs(rounded, changed(inputs, lambda part: part.bfloat16().float()))
    for part, limit, exact in zip(found, allowed, expected, strict=True):
        if isinstance(subject, Network):  # heads stay in float32 in evaluation
            assert part.dtype == (torch.float32 if subject.detector else torch.bfloat16)
        assert part.isfinite().all()
        assert (part.float() - exact).norm() <= BF16_FACTOR * (limit - exact).norm()


def test_channels_last_is_the_same(net: nn.Module, subject: Case | Network) -> None:
    inputs = subject.inputs()
    other = copy.deepcopy(net).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    last = changed(inputs, lambda part: part.contiguous(memory_format=torch.channels_last))
    assert_same(outputs(other, last), outputs(net, inputs))


def test_export_is_the_same(net: nn.Module, subject: Case | Network) -> None:
    exported = torch.export.export(net, (subject.inputs(),)).module()
    inputs = changed(subject.inputs(), lambda part: part.flip(0, 2))  # other images
    assert_same(outputs(exported, inputs), outputs(net, inputs))


@pytest.mark.filterwarnings("ignore")
def test_onnx_is_the_same(net: nn.Module, subject: Case | Network) -> None:
    inputs, file, onnxruntime = subject.inputs(), io.BytesIO(), without_telemetry("onnxruntime")
    torch.onnx.export(net, (inputs,), file, dynamo=False, opset_version=17)
    onnx.checker.check_model(onnx.load_from_string(file.getvalue()))
    session = onnxruntime.InferenceSession(file.getvalue())
    names = [item.name for item in session.get_inputs()]
    maps = inputs if isinstance(inputs, list) else [inputs]
    feed = {name: part.numpy() for name, part in zip(names, maps, strict=True)}
    found = [torch.from_numpy(array) for array in session.run(None, feed)]
    assert_same(found, outputs(net, inputs))
