"""Every backbone with a reference equals it: torchvision, timm, or a definition in plain torch."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import timm.models.vovnet as timm_vovnet
import torch
import torchvision
from torch import Tensor, nn

from models.blocks.conv import SE
from models.blocks.csp import ResidualBasic, ResidualBottleneck
from models.blocks.dense import OSA, DenseLayer, PeleeStage
from models.blocks.ghost import DFC
from models.blocks.shuffle import ShuffleUnit
from models.builder import build_classifier
from models.profile.cost import count, parameters
from models.yaml.parser import load_classifier, load_spec
from tests.models.blocks import references
from tests.models.blocks.references import (
    VOV_MODULES,
    OfficialShuffleNetV2,
    OriginalVoVNetV2,
    PlainPeleeNet,
    timm_mixnet,
)  # fmt: skip
from utils.terminal import say

PLAIN = "plain torch, independent of the blocks"
TOLERANCE = 1e-4  # times max(1, largest value of the reference)
SIZES = (224, 200)  # pixels; 200 gives odd maps


@dataclass(frozen=True)
class Net:
    """A backbone, its reference ('torchvision NAME', 'timm NAME', or a title and how it is made)."""

    name: str
    reference: str
    params: int
    macs: int  # at 224 px
    published: str
    taps: Any  # the reference's modules whose outputs are C2..C5, or a function
    damage: Callable[[nn.Module], None]  # after which the nets must differ
    make: Callable[[], nn.Module] | None = None
    slow: bool = False

    def build(self) -> nn.Module:
        if self.make is not None:
            return self.make()
        package, name = self.reference.split()
        return (
            getattr(torchvision.models, name)()
            if package == "torchvision"
            else timm.create_model(name)
        )


def modules(net: nn.Module, kind: Any) -> list[Any]:
    found = [part for part in net.modules() if isinstance(part, kind)]
    assert found
    return found


def replace(net: nn.Module, kind: type[nn.Module], new: Callable[[], nn.Module]) -> None:
    for name in [name for name, part in net.named_modules() if isinstance(part, kind)]:
        net.set_submodule(name, new())


def setting(kind: Any, at: slice, **values: Any) -> Callable[[nn.Module], None]:
    """Damage: these modules of a kind get other attributes."""

    def damage(net: nn.Module) -> None:
        for part in modules(net, kind)[at]:
            for name, value in values.items():
                setattr(part, name, value)

    return damage


def plain_relu(net: nn.Module) -> None:
    replace(net, nn.ReLU6, nn.ReLU)


def use_sigmoid(net: nn.Module) -> None:
    """SE's gate as most nets have it; GhostNet's is the hard one."""
    replace(net, nn.Hardsigmoid, nn.Sigmoid)


ALL, SECOND, LAST_BUT_ONE, LAST = slice(None), slice(1, 2), slice(-2, -1), slice(-1, None)
forget_activation = setting((ResidualBasic, ResidualBottleneck), SECOND, act=nn.Identity())
smooth_gate = setting(SE, SECOND, gate=nn.Sigmoid())
use_hard_gate = setting(DFC, ALL, gate=nn.Hardsigmoid())
shuffle_at_the_end = setting(ShuffleUnit, ALL, shuffle="end")
shuffle_at_the_start = setting(ShuffleUnit, ALL, shuffle="start")
max_instead_of_average = setting(PeleeStage, SECOND, pool=nn.MaxPool2d(2))
without_last_ese = setting(OSA, LAST, ese=nn.Identity())
# timm's form of VoVNetV2, with the weights of the authors'
ese_in_last_modules_only = setting(OSA, LAST_BUT_ONE, ese=nn.Identity())


def swish_in_the_stem(net: nn.Module) -> None:
    """The first convolution activated like the deeper blocks."""
    first = next(name for name, part in net.named_modules() if isinstance(part, nn.ReLU))
    net.set_submodule(first, nn.SiLU())


def new_channels_first(net: nn.Module) -> None:
    """One layer puts its output before its input."""
    layer = modules(net, DenseLayer)[20]
    forward, growth = layer.forward, layer.grow.out_channels
    layer.forward = lambda x: forward(x).roll(growth, 1)


def without_last_relu(net: nn.Module) -> None:
    modules(net, OSA)[-1].aggregate.act = nn.Identity()


def other_identity(net: nn.Module) -> None:
    """The other published form of V1: identity on the last module of stage 5."""
    last = modules(net, OSA)[-1]
    last.identity = not last.identity


def dense_taps(reference: nn.Module, images: Tensor) -> list[Tensor]:
    """What the first three dense blocks give, and the last one after its BN and ReLU."""
    kept, x = [], images
    for name, part in reference.features.named_children():
        x = part(x)
        if name in {"denseblock1", "denseblock2", "denseblock3"}:
            kept.append(x.clone())
    return [*kept, torch.relu(x)]


def timm_vov(name: str, **changes: Any) -> nn.Module:
    """timm's class on one of its configurations, changed where it has no such name."""
    return timm_vovnet.VovNet(dict(timm_vovnet.model_cfgs[name], **changes))


def names(pattern: str, *indices: int) -> list[str]:
    return [pattern.format(index) for index in indices]


STAGES = names("stages.{}", 0, 1, 2, 3)
LAYERS = names("layer{}", 1, 2, 3, 4)
GHOST = names("blocks.{}", 2, 4, 6, 8)  # features_only has the first of a stride
MIX = names("blocks.{}", 1, 2, 4, 5)
OFFICIAL = ["pool", "stages.0", "stages.1", "stages.2"]
TV_SHUFFLE = ["maxpool", "stage2", "stage3", "stage4"]
MOBILE = {name: names("features.{}", *indices) for name, indices in {
    "2": (3, 6, 13, 17), "large": (3, 6, 12, 15), "small": (1, 3, 8, 11)}.items()}  # fmt: skip
SLIM = {"stage_conv_chs": [64, 80, 96, 112], "stage_out_chs": [128, 256, 384, 512],
        "block_per_stage": [1, 1, 1, 1]}  # fmt: skip
NETS = [
    Net("resnet-18", "torchvision resnet18", 11_689_512, 1_814_073_344, "-", LAYERS, forget_activation),
    Net("resnet-50", "torchvision resnet50", 25_557_032, 4_089_184_256, "-", LAYERS,
        forget_activation, slow=True),
    Net("resnet-101", "torchvision resnet101", 44_549_160, 7_801_405_440, "-", LAYERS,
        forget_activation, slow=True),
    Net("densenet-121", "torchvision densenet121", 7_978_856, 2_834_161_664, "-", dense_taps,
        new_channels_first),
    Net("densenet-169", "torchvision densenet169", 14_149_480, 3_359_843_328, "-", dense_taps,
        new_channels_first, slow=True),
    Net("densenet-201", "torchvision densenet201", 20_013_928, 4_291_365_888, "-", dense_taps,
        new_channels_first, slow=True),
    Net("mobilenetv2-1.0", "torchvision mobilenet_v2", 3_504_872, 300_774_272, "3.4M / 300M",
        MOBILE["2"], plain_relu),
    Net("mobilenetv3-large", "torchvision mobilenet_v3_large", 5_483_032, 216_589_760, "5.4M / 219M",
        MOBILE["large"], smooth_gate),
    Net("mobilenetv3-small", "torchvision mobilenet_v3_small", 2_542_856, 56_510_400, "-",
        MOBILE["small"], smooth_gate),
    Net("mixnet-s", "timm mixnet_s, regrouped", 4_134_606, 239_173_360, "4.1M / 256M", MIX,
        swish_in_the_stem, lambda: timm_mixnet("mixnet_s")),
    Net("mixnet-m", "timm mixnet_m, regrouped", 5_014_382, 339_172_672, "5.0M / 360M", MIX,
        swish_in_the_stem, lambda: timm_mixnet("mixnet_m")),
    Net("mixnet-l", "timm mixnet_l, regrouped", 7_329_252, 555_251_792, "7.3M / 565M", MIX,
        swish_in_the_stem, lambda: timm_mixnet("mixnet_l")),
    Net("ghostnet-0.5", "timm ghostnet_050", 2_587_292, 42_328_152, "2.6M / 42M", GHOST, use_sigmoid),
    Net("ghostnet-1.0", "timm ghostnet_100", 5_182_508, 141_150_512, "5.2M / 141M", GHOST, use_sigmoid),
    Net("ghostnet-1.3", "timm ghostnet_130", 7_358_820, 227_003_256, "7.3M / 226M", GHOST, use_sigmoid),
    Net("ghostnetv2-1.0", "timm ghostnetv2_100", 6_156_908, 167_048_288, "- / 167M", GHOST, use_hard_gate),
    Net("ghostnetv2-1.3", "timm ghostnetv2_130", 8_960_404, 269_322_976, "- / 269M", GHOST, use_hard_gate),
    Net("ghostnetv2-1.6", "timm ghostnetv2_160", 12_392_698, 398_607_224, "- / 399M", GHOST, use_hard_gate),
    Net("peleenet", PLAIN, 2_802_248, 507_757_568, "2.8M / 508M", STAGES,
        max_instead_of_average, PlainPeleeNet),
    Net("shufflenetv2-0.5", PLAIN, 1_365_792, 40_476_448, "1.4M / 41M", OFFICIAL, shuffle_at_the_end,
        lambda: OfficialShuffleNetV2("0.5")),
    Net("shufflenetv2-1.0", PLAIN, 2_278_760, 145_814_296, "2.3M / 146M", OFFICIAL, shuffle_at_the_end,
        lambda: OfficialShuffleNetV2("1.0")),
    Net("shufflenetv2-1.5", PLAIN, 3_506_720, 298_970_656, "3.5M / 299M", OFFICIAL, shuffle_at_the_end,
        lambda: OfficialShuffleNetV2("1.5")),
    Net("shufflenetv2-2.0", PLAIN, 7_402_600, 590_783_000, "7.4M / 591M", OFFICIAL, shuffle_at_the_end,
        lambda: OfficialShuffleNetV2("2.0")),
    Net("shufflenetv2-0.5-tv", "torchvision shufflenet_v2_x0_5", 1_366_792, 40_476_448, "1.4M / 41M",
        TV_SHUFFLE, shuffle_at_the_start),
    Net("shufflenetv2-1.0-tv", "torchvision shufflenet_v2_x1_0", 2_278_604, 144_907_992, "2.3M / 146M",
        TV_SHUFFLE, shuffle_at_the_start),
    Net("shufflenetv2-1.5-tv", "torchvision shufflenet_v2_x1_5", 3_503_624, 295_759_392, "3.5M / 299M",
        TV_SHUFFLE, shuffle_at_the_start),
    Net("shufflenetv2-2.0-tv", "torchvision shufflenet_v2_x2_0", 7_393_996, 583_253_464, "7.4M / 591M",
        TV_SHUFFLE, shuffle_at_the_start),
    Net("vovnet-27-slim", "timm VovNet, configured as 27-slim", 3_525_736, 2_176_695_296, "-", STAGES,
        without_last_relu, lambda: timm_vov("vovnet39a", **SLIM)),
    Net("vovnet-39", "timm vovnet39a", 22_600_296, 7_072_227_328, "-", STAGES, other_identity,
        lambda: timm_vov("vovnet39a"), slow=True),
    Net("vovnet-57", "timm vovnet57a", 36_640_296, 8_930_144_256, "-", STAGES, other_identity,
        lambda: timm_vov("vovnet57a"), slow=True),
    Net("vovnet-39-identity", "timm vovnet39a, residual=True", 22_600_296, 7_072_227_328, "-", STAGES,
        other_identity, lambda: timm_vov("vovnet39a", residual=True), slow=True),
    Net("vovnet-57-identity", "timm vovnet57a, residual=True", 36_640_296, 8_930_144_256, "-", STAGES,
        other_identity, lambda: timm_vov("vovnet57a", residual=True), slow=True),
    Net("vovnetv2-19-slim", "timm ese_vovnet19b_slim", 3_166_136, 1_680_214_784, "-", STAGES,
        without_last_ese, lambda: timm_vov("ese_vovnet19b_slim")),
    Net("vovnetv2-19", "timm ese_vovnet19b", 11_205_416, 4_121_937_920, "-", STAGES, without_last_ese,
        lambda: timm_vov("ese_vovnet19b"), slow=True),
    Net("vovnetv2-39", "timm ese_vovnet39b", 24_568_936, 7_074_193_408, "-", STAGES, other_identity,
        lambda: timm_vov("ese_vovnet39b"), slow=True),
    Net("vovnetv2-57", "timm ese_vovnet57b", 38_608_936, 8_932_110_336, "-", STAGES, other_identity,
        lambda: timm_vov("ese_vovnet57b"), slow=True),
    Net("vovnetv2-99", "timm ese_vovnet99b", 63_199_272, 16_488_214_528, "-", STAGES, other_identity,
        lambda: timm_vov("ese_vovnet99b"), slow=True),
    Net("vovnetv2-39-original", PLAIN, 26_209_128, 7_075_831_808, "-", STAGES, ese_in_last_modules_only,
        lambda: OriginalVoVNetV2(VOV_MODULES["39"], 5), slow=True),
    Net("vovnetv2-57-original", PLAIN, 42_479_912, 8_935_976_960, "-", STAGES, ese_in_last_modules_only,
        lambda: OriginalVoVNetV2(VOV_MODULES["57"], 5), slow=True),
    Net("vovnetv2-99-original", PLAIN, 70_548_520, 16_495_554_560, "-", STAGES, ese_in_last_modules_only,
        lambda: OriginalVoVNetV2(VOV_MODULES["99"], 5), slow=True),
]  # fmt: skip


@pytest.mark.parametrize(
    "net",
    [pytest.param(n, id=n.name, marks=[pytest.mark.slow] if n.slow else []) for n in NETS],
)
def test_equals_the_reference(net: Net) -> None:
    """In parameters, MACs, logits and taps; with -s, prints its row of docs/backbones.md.

    The reference gets random weights and calibrated BN, and ours the same.  A copy of ours is then
    damaged and must differ.
    """
    reference, ours = net.build(), build_classifier(load_classifier(net.name))
    macs = count(ours, (1, 3, 224, 224)).macs
    assert parameters(reference) == parameters(ours) == net.params
    assert macs == pytest.approx(net.macs, rel=1e-3)
    references.randomise(reference)
    references.calibrate(reference, [references.make_images(8, (96, 96), s) for s in (1, 2)])
    copy_state(reference, ours)
    found = [differences(ours.eval(), reference, net.taps, size) for size in SIZES]
    logits, taps = map(max, zip(*found, strict=True))
    assert logits <= TOLERANCE
    assert taps <= TOLERANCE
    damaged = copy.deepcopy(ours)
    net.damage(damaged)
    control = max(differences(damaged.eval(), reference, net.taps, min(SIZES)))
    assert control > TOLERANCE
    row = [net.name, f"{net.params:,}", f"{macs / 1e6:,.2f}M", net.published, f"{logits:.1e}"]
    say(f"| {' | '.join([*row, f'{taps:.1e}', f'{control:.1e}', net.reference])} |")


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Weights leaf by leaf, per type of layer; a 1x1 convolution may stand for a linear layer."""
    pair = [references.leaves(net) for net in (source, target)]
    for net, found in zip((source, target), pair, strict=True):
        assert sum(map(parameters, found)) == parameters(net)
    kinds: tuple[Any, ...] = references.LEAVES
    counts = [[sum(isinstance(leaf, kind) for leaf in found) for kind in kinds] for found in pair]
    if counts[0] != counts[1]:  # a linear layer there is a 1x1 convolution here
        kinds = ((nn.Conv2d, nn.Linear), nn.BatchNorm2d)
    for kind in kinds:
        both = ([leaf for leaf in found if isinstance(leaf, kind)] for found in pair)
        for one, other in zip(*both, strict=True):
            state = one.state_dict()
            if isinstance(one, nn.BatchNorm2d):
                assert (other.eps, other.momentum) == (one.eps, one.momentum)
            elif type(one) is not type(other):
                state["weight"] = state["weight"].view_as(other.weight)
            other.load_state_dict(state)


def differences(net: Any, reference: nn.Module, taps: Any, size: int) -> tuple[float, float]:
    """Relative difference of logits, and the largest one of the taps, on two images."""
    images, kept = references.make_images(2, (size, size), seed=9), {}

    def keep(name: str) -> Callable[..., None]:
        # a copy, since an activation in place may follow
        return lambda _module, _inputs, output: kept.update({name: output.clone()})

    with torch.no_grad():
        parts = [] if callable(taps) else taps
        handles = [reference.get_submodule(p).register_forward_hook(keep(p)) for p in parts]
        expected = reference(images)
        for handle in handles:
            handle.remove()
        levels = taps(reference, images) if callable(taps) else [kept[name] for name in taps]
        logits, found = net(images), net.taps(images)
    assert (expected[0] - expected[1]).abs().max() > 100 * TOLERANCE  # it sees the images
    pairs = zip((found[name] for name in sorted(found)), levels, strict=True)
    return relative(logits, expected), max(relative(*two) for two in pairs)


def relative(found: Tensor, expected: Tensor) -> float:
    """max|found - expected| / max(1, max|expected|); shapes must agree, values be finite."""
    assert found.shape == expected.shape
    assert expected.isfinite().all()
    assert found.isfinite().all()
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=1)).item()


def test_original_reference_agrees_with_timm_where_the_forms_are_one() -> None:
    """VoVNetV2-19 has one module per stage: the definition in plain torch must equal timm's net."""
    one, other = OriginalVoVNetV2(VOV_MODULES["19"], 3), timm_vov("ese_vovnet19b")
    copy_state(other, one)
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


def backbone_parameters(net: Any) -> int:
    rows = zip(net.layers, net.spec.layers, strict=True)
    return sum(parameters(layer) for layer, row in rows if row.section == "backbone")


class TestWidths:
    @pytest.mark.parametrize("width", [0.35, 0.5, 0.75, 1.4])
    @pytest.mark.parametrize(("name", "reference", "last"), [
        ("mobilenetv2-1.0", "mobilenet_v2", 17), ("mobilenetv3-large", "mobilenet_v3_large", 15),
        ("mobilenetv3-small", "mobilenet_v3_small", 11),
    ])  # fmt: skip
    def test_multiplier_rounds_as_the_reference_does(
        self, name: str, reference: str, last: int, width: float
    ) -> None:
        with torch.device("meta"):
            net = build_classifier(load_classifier(name, width=width))
            expected = getattr(torchvision.models, reference)(width_mult=width)
        assert backbone_parameters(net) == parameters(expected.features[: last + 1])

    def test_growth_and_transitions_follow(self) -> None:
        """At half the width: growth 16, and what a dense stage adds is halved with it."""
        with torch.device("meta"):
            net = build_classifier(load_classifier("densenet-121", width=0.5))
            reference = torchvision.models.DenseNet(16, (6, 12, 24, 16), 32)
        assert parameters(net) == parameters(reference)


class TestCsp:
    """YOLOv5's CSPDarknet: parameters up to P5 as published; the rows of the shipped detectors."""

    @pytest.mark.parametrize(
        ("size", "params", "macs"),  # rows 0-9 of YOLOv5 v6 and v7; MACs at 224 px
        [
            ("n", 1_046_368, 169_394_176), ("s", 4_171_456, 634_224_640),
            ("m", 12_167_904, 1_900_265_472), ("l", 26_582_912, 4_248_502_272),
            ("x", 49_275_040, 8_016_117_760),
        ],
    )  # fmt: skip
    def test_equals_the_published_counts(self, size: str, params: int, macs: int) -> None:
        with torch.device("meta"):
            net = build_classifier(load_classifier(f"csp-{size}"))
        classifier = net.layers[-1].linear
        assert backbone_parameters(net) == params
        assert parameters(net) == params + parameters(classifier)
        assert count(net, (1, 3, 224, 224)).macs == macs + classifier.weight.numel()

    @pytest.mark.parametrize("size", "nsmlx")
    @pytest.mark.parametrize(
        ("backbone", "detector"), [("csp", "yolov5{}"), ("bottleneckcsp", "yolov5{}-csp")]
    )
    def test_rows_are_those_of_the_detectors(self, backbone: str, detector: str, size: str) -> None:
        """The detectors' own rows are proved by their published parameters (test_configs.py)."""
        alone = load_classifier(f"{backbone}-{size}").layers
        whole = load_spec(detector.format(size)).layers
        rows = [
            [(row.block, row.repeats, row.sources, dict(row.args)) for row in layers
             if row.section == "backbone"]
            for layers in (alone, whole)
        ]  # fmt: skip
        assert rows[0] == rows[1]
        assert [row.name for row in alone if row.name] == ["stem", "P2", "P3", "P4", "P5"]
        assert all(row.norm is None and row.activation is None for row in alone)
