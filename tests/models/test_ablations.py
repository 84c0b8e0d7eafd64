"""cfg/ablations: what each file costs, by the papers' formulas and by hand."""

import math

import pytest

from models.profile.counting import profile_spec
from models.yaml.parser import load_spec

SIZE, CLASSES = 224, 80
VGG = (  # side of the maps at 224 px, channels in, channels out; the stem first
    (224, 3, 64),
    (224, 64, 64),
    (112, 64, 128),
    (112, 128, 128),
    (56, 128, 256),
    *[(56, 256, 256)] * 2,
    (28, 256, 512),
    *[(28, 512, 512)] * 2,
    *[(14, 512, 512)] * 3,
)
OSA = ((56, 128, 64, 128), (28, 128, 80, 256), (14, 256, 96, 384), (7, 384, 112, 512))
KERNELS = {"3": (3,), "5": (5,), "7": (7,), "3-5-7": (3, 5, 7), "3-5-7-9": (3, 5, 7, 9)}


def profile(root, name):
    return profile_spec(load_spec(root / "cfg" / name), image_size=SIZE, classes=CLASSES)


def backbone_macs(root, name):
    return profile(root, name).part("backbone").macs


def ghost_macs(side, c_in, c_out, ratio, cheap):
    """The denominator of r_s in GhostNet, section 3.1, but for rounding m = c_out / s up."""
    primary = math.ceil(c_out / ratio)
    return side * side * primary * (9 * c_in + (ratio - 1) * cheap * cheap)


def test_vgg16_is_the_published_network(root):
    assert backbone_macs(root, "ablations/vgg16.yaml") == sum(
        side * side * 9 * c_in * c_out for side, c_in, c_out in VGG
    )
    # torchvision's vgg16_bn.features, which has 4224 biases of convolutions besides
    assert profile(root, "ablations/vgg16.yaml").part("backbone").params == 14_723_136 - 4_224


@pytest.mark.parametrize(("ratio", "cheap"), [(2, 1), (2, 3), (2, 5), (3, 3), (4, 3)])
def test_ghost_modules_cost_what_the_paper_says(root, ratio, cheap):
    found = backbone_macs(root, f"ablations/vgg16-ghost-s{ratio}-d{cheap}.yaml")
    (side, c_in, c_out), *replaced = VGG
    stem = side * side * 9 * c_in * c_out
    assert found == stem + sum(ghost_macs(*layer, ratio, cheap) for layer in replaced)
    plain = backbone_macs(root, "ablations/vgg16.yaml")
    # r_s = s c k^2 / (c k^2 + (s - 1) d^2) of each layer; the paper's approximation is s
    assert plain / found == pytest.approx(ratio, rel=0.05)


def test_osa_with_a_1x1_before_each_3x3(root):
    plain, narrow = (
        backbone_macs(root, f"ablations/vovnet-27-slim{end}.yaml") for end in ("", "-1x1")
    )
    saved = 0
    for side, c_in, width, _ in OSA:
        for channels in (c_in, *[width] * 4):
            half = width // 2
            saved += side * side * (9 * channels * width - channels * half - 9 * half * width)
    assert plain - narrow == saved
    assert plain == pytest.approx(2.176e9, rel=1e-3)  # backbones.md: 2.177 G with the classifier


@pytest.mark.parametrize("name", KERNELS)
def test_mixconv_kernels_cost_their_squares(root, name):
    """Against kernels 3 and 5: what differs is the depthwise convolutions alone."""
    spec = "ablations/yolov5s-mixconv-{}.yaml"
    difference = (
        profile(root, spec.format(name)).params - profile(root, "yolov5s-mixconv.yaml").params
    )
    by_hand = 0
    for width, repeats in STAGES:
        expanded = int(1.5 * width)
        by_hand += repeats * (squares(expanded, KERNELS[name]) - squares(expanded, (3, 5)))
    assert difference == by_hand


STAGES = ((64, 1), (128, 2), (256, 3), (512, 1), (256, 1), (128, 1), (256, 1), (512, 1))


def squares(channels, kernels):
    """Weights of a MixConv; the remainder goes to the first kernel."""
    share = channels // len(kernels)
    parts = [channels - share * (len(kernels) - 1), *[share] * (len(kernels) - 1)]
    return sum(part * kernel * kernel for part, kernel in zip(parts, kernels, strict=True))
