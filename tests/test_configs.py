"""Every shipped model: parameters, GFLOPs and strides against the golden table; all rows are used.

cfg/ablations: what each backbone costs at 224 px, by the papers' formulas and by hand.
"""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from models.builder import build_detector
from models.profile.counting import ModelProfile, Part, profile_spec
from models.yaml.parser import load_spec

CFG = Path(__file__).resolve().parent.parent / "cfg"
MODELS = sorted(path.stem for path in CFG.glob("*.yaml"))
P5, P6, P2 = (8, 16, 32), (8, 16, 32, 64), (4, 8, 16, 32)
# parameters at 80 classes, GFLOPs = 2 MACs of the convolutions at 640 px, strides.
# yolov5*, *6, *-csp, *-ghost, l-p2: published layouts, exact. The others: ours, so that a change is seen.
GOLDEN = {
    "yolov5n": (1_872_157, 4.468, P5),
    "yolov5s": (7_235_389, 16.434, P5),
    "yolov5m": (21_190_557, 48.872, P5),
    "yolov5l": (46_563_709, 108.994, P5),
    "yolov5x": (86_749_405, 205.448, P5),
    "yolov5n6": (3_246_940, 4.559, P6),
    "yolov5s6": (12_626_620, 16.797, P6),
    "yolov5m6": (35_731_932, 49.912, P6),
    "yolov5l6": (76_770_172, 111.235, P6),
    "yolov5x6": (140_794_780, 209.565, P6),
    "yolov5l-p2": (47_493_372, 125.555, P2),
    "yolov5n-csp": (1_930_941, 4.704, P5),
    "yolov5s-csp": (7_468_157, 17.377, P5),
    "yolov5m-csp": (21_805_053, 52.175, P5),
    "yolov5l-csp": (47_818_749, 116.963, P5),
    "yolov5x-csp": (88_965_245, 221.177, P5),
    "yolov5n-ghost": (1_049_217, 2.590, P5),
    "yolov5s-ghost": (3_897_605, 8.706, P5),
    "yolov5m-ghost": (8_845_413, 19.180, P5),
    "yolov5l-ghost": (16_019_117, 34.313, P5),
    "yolov5x-ghost": (25_588_445, 54.536, P5),
    "yolov5n-osa": (2_182_909, 5.241, P5),
    "yolov5s-osa": (8_484_605, 19.527, P5),
    "yolov5l-osa": (53_372_413, 125.981, P5),
    "yolov5n-shuffle": (588_877, 1.849, P5),
    "yolov5s-shuffle": (2_076_573, 5.834, P5),
    "yolov5l-shuffle": (11_454_141, 29.678, P5),
    "yolov5n-mixconv": (1_668_821, 3.757, P5),
    "yolov5s-mixconv": (6_338_221, 13.256, P5),
    "yolov5l-mixconv": (46_794_269, 92.351, P5),
    "yolov5n-ghostnet": (4_684_676, 4.470, P5),
    "yolov5s-ghostnet": (18_724_533, 16.630, P5),
    "yolov5l-ghostnet": (9_491_725, 7.785, P5),
    "yolov5n-vovnet": (913_021, 4.500, P5),
    "yolov5s-vovnet": (3_287_165, 16.180, P5),
    "yolov5l-vovnet": (77_780_029, 267.878, P5),
    "yolov5n-shufflenetv2": (1_777_477, 4.528, P5),
    "yolov5s-shufflenetv2": (6_807_697, 16.211, P5),
    "yolov5l-shufflenetv2": (7_904_529, 19.835, P5),
    "feather-n": (879_684, 2.663, P5),
    "feather-s": (1_970_660, 6.052, P5),
    "feather-m": (4_308_252, 13.128, P5),
    "yolov5n-mixnet": (2_753_081, 4.578, P5),
    "yolov5s-mixnet": (10_317_393, 16.385, P5),
    "yolov5l-mixnet": (7_162_649, 11.665, P5),
}


def test_every_shipped_model_is_in_the_table() -> None:
    assert sorted(GOLDEN) == MODELS


@pytest.mark.parametrize("name", MODELS)
def test_golden(name: str) -> None:
    spec = load_spec(name)
    with torch.device("meta"):
        model = build_detector(spec, classes=80).eval()
    params, gflops, stride = GOLDEN[name]
    assert sum(p.numel() for p in model.parameters()) == params
    assert model.stride == stride
    assert spec.unused_rows() == []
    with FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 640, 640, device="meta"))
    assert counter.get_total_flops() / 1e9 == pytest.approx(gflops, abs=0.00051)


@pytest.mark.parametrize("family", ["ghostnet", "vovnet", "shufflenetv2", "mixnet"])
@pytest.mark.parametrize(("size", "budget"), [("n", 4.5), ("s", 16.5)])
def test_small_ready_detectors_cost_what_yolov5_does(size: str, budget: float, family: str) -> None:
    assert abs(GOLDEN[f"yolov5{size}-{family}"][1] / budget - 1) <= 0.02


# side of the maps, channels in, channels out; the stem first
VGG = (
    (224, 3, 64), (224, 64, 64), (112, 64, 128), (112, 128, 128), (56, 128, 256),
    *[(56, 256, 256)] * 2, (28, 256, 512), *[(28, 512, 512)] * 2, *[(14, 512, 512)] * 3,
)  # fmt: skip
OSA = ((56, 128, 64), (28, 128, 80), (14, 256, 96), (7, 384, 112))  # the last: width
STAGES = ((64, 1), (128, 2), (256, 3), (512, 1), (256, 1), (128, 1), (256, 1), (512, 1))


def profiled(name: str) -> ModelProfile:
    return profile_spec(load_spec(str(CFG / f"{name}.yaml")), image_size=224, classes=80)


def backbone(name: str) -> Part:
    return profiled(f"ablations/{name}").part("backbone")


def test_vgg16_is_the_published_network() -> None:
    by_hand = sum(side * side * 9 * c_in * c_out for side, c_in, c_out in VGG)
    # torchvision's vgg16_bn.features has 4224 biases of convolutions besides
    assert backbone("vgg16") == Part(params=14_723_136 - 4_224, macs=by_hand)


@pytest.mark.parametrize(("ratio", "cheap"), [(2, 1), (2, 3), (2, 5), (3, 3), (4, 3)])
def test_ghost_modules_cost_what_the_paper_says(ratio: int, cheap: int) -> None:
    found = backbone(f"vgg16-ghost-s{ratio}-d{cheap}").macs
    (side, c_in, c_out), *replaced = VGG
    expected = side * side * 9 * c_in * c_out
    for side, c_in, c_out in replaced:
        # the denominator of r_s in GhostNet, section 3.1, but for rounding m = c_out / s up
        primary = math.ceil(c_out / ratio)
        expected += side * side * primary * (9 * c_in + (ratio - 1) * cheap * cheap)
    assert found == expected
    # r_s = s c k^2 / (c k^2 + (s - 1) d^2) of each layer; the paper's approximation is s
    assert backbone("vgg16").macs / found == pytest.approx(ratio, rel=0.05)


def test_osa_with_a_1x1_before_each_3x3() -> None:
    plain, narrow = (backbone(f"vovnet-27-slim{end}").macs for end in ("", "-1x1"))
    saved = 0
    for side, c_in, width in OSA:
        for channels in (c_in, *[width] * 4):
            half = width // 2
            saved += side * side * (9 * channels * width - channels * half - 9 * half * width)
    assert plain - narrow == saved
    assert plain == pytest.approx(2.176e9, rel=1e-3)  # backbones.md: 2.177 G with the classifier


@pytest.mark.parametrize("kernels", [(3,), (5,), (7,), (3, 5, 7), (3, 5, 7, 9)], ids=str)
def test_mixconv_kernels_cost_their_squares(kernels: tuple[int, ...]) -> None:
    """Against kernels 3 and 5: what differs is the depthwise convolutions alone."""
    name = f"ablations/yolov5s-mixconv-{'-'.join(map(str, kernels))}"
    by_hand = 0
    for width, repeats in STAGES:
        channels = int(1.5 * width)
        for sign, sizes in ((1, kernels), (-1, (3, 5))):
            share = channels // len(sizes)
            first = channels - share * (len(sizes) - 1)  # has the remainder
            weights = [share * size**2 for size in sizes[1:]]
            by_hand += sign * repeats * (first * sizes[0] ** 2 + sum(weights))
    assert profiled(name).params - profiled("yolov5s-mixconv").params == by_hand
