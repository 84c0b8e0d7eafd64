"""Any backbone with any neck: it builds, has the right strides, wastes no row and reads back."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import yaml

from models.builder import build_detector
from models.profile.cost import count, parameters
from models.spec import ModelSpec
from models.yaml.parser import load_spec, parse_spec
from models.yaml.sections import section_names

BACKBONES = section_names("backbone")
NECKS = section_names("neck")
EXTRA_LEVEL = ("pan-p2", "pan-p6")
MATRIX_BACKBONES = (
    "csp-n", "ghostnet-1.0", "vovnet-27-slim", "shufflenetv2-1.0", "mixnet-s", "resnet-18",
    "peleenet", "mobilenetv3-small",
)  # fmt: skip
MATRIX_NECKS = ("pan", "pan-ghost", "pan-osa", "pan-shuffle", "pan-mixconv")
BASE = "yolov5n"


def is_quick(backbone: str, neck: str) -> bool:
    """The matrix, every backbone with one of the four-level necks, any other neck with two."""
    if neck in EXTRA_LEVEL:
        return neck == EXTRA_LEVEL[BACKBONES.index(backbone) % 2]
    return backbone in MATRIX_BACKBONES[: None if neck in MATRIX_NECKS else 2]


PAIRS = [
    pytest.param(backbone, neck, marks=[] if is_quick(backbone, neck) else pytest.mark.slow)
    for backbone in BACKBONES
    for neck in NECKS
]


def levels(spec: ModelSpec) -> tuple[int, ...]:
    """The strides that the names of the rows promise which Detect reads: out3 is 8."""
    names = [spec.layers[source].name for source in spec.layers[-1].sources]
    assert all(name and name.startswith("out") for name in names), names
    return tuple(2 ** int(str(name)[3:]) for name in names)


def check_rows(spec: ModelSpec) -> None:
    assert spec.unused_rows() == []
    again = parse_spec(yaml.safe_load(yaml.safe_dump(spec.to_yaml_dict())), "resolved")
    rows = [[replace(layer, where="") for layer in one.layers] for one in (again, spec)]
    assert rows[0] == rows[1]
    assert (again.activation, again.anchors) == (spec.activation, spec.anchors)


def test_the_matrix_exists() -> None:
    assert set(MATRIX_BACKBONES) <= set(BACKBONES)
    assert {*MATRIX_NECKS, *EXTRA_LEVEL, "fpn", "bifpn"} <= set(NECKS)


@pytest.mark.parametrize(("backbone", "neck"), PAIRS)
def test_builds_with_the_right_strides(backbone: str, neck: str) -> None:
    spec = load_spec(BASE, backbone=backbone, neck=neck)
    check_rows(spec)
    with torch.device("meta"):
        model = build_detector(spec, classes=80)
    assert model.stride == levels(spec)
    assert {3, 4, 5} <= {stride.bit_length() - 1 for stride in model.stride}
    assert all(convolution.in_channels % 8 == 0 for convolution in model.head.m)


@pytest.mark.parametrize("neck", EXTRA_LEVEL)
@pytest.mark.parametrize("backbone", BACKBONES)
def test_four_levels_on_every_backbone(backbone: str, neck: str) -> None:
    """Rows alone: each backbone is built with one of the two necks above, which shows its taps."""
    spec = load_spec(BASE, backbone=backbone, neck=neck)
    check_rows(spec)
    assert levels(spec) == ((4, 8, 16, 32) if neck == "pan-p2" else (8, 16, 32, 64))


class TestWidths:
    """Channels that Detect reads; ShuffleNetV2's taps of 24, 116, 232 and 464 become 8 n."""

    @pytest.mark.parametrize(
        ("neck", "expected"),
        [
            ("pan", [120, 232, 464]), ("fpn", [120, 232, 464]), ("pan-ghost", [120, 232, 464]),
            ("pan-p2", [24, 120, 232, 464]), ("pan-p6", [120, 232, 464, 464]),
            ("bifpn", [120, 120, 120]),
        ],
    )  # fmt: skip
    def test_follow_the_taps(self, neck: str, expected: list[int]) -> None:
        with torch.device("meta"):
            spec = load_spec(BASE, backbone="shufflenetv2-1.0", neck=neck)
            model = build_detector(spec, classes=2)
        assert [convolution.in_channels for convolution in model.head.m] == expected

    @pytest.mark.parametrize(
        ("neck", "twin"),
        [
            ("pan", "yolov5n"), ("pan-ghost", "yolov5n-ghost"), ("pan-osa", "yolov5n-osa"),
            ("pan-shuffle", "yolov5n-shuffle"), ("pan-mixconv", "yolov5n-mixconv"),
        ],
    )  # fmt: skip
    def test_necks_are_those_of_the_whole_detectors(self, neck: str, twin: str) -> None:
        """On YOLOv5's own backbone, the swapped PAN has the rows of the swapped detector."""
        ours, theirs = (
            [(r.block, r.args, r.repeats, r.name) for r in spec.layers if r.section == "neck"]
            for spec in (load_spec(BASE, backbone="csp-n", neck=neck), load_spec(twin))
        )
        assert ours == theirs

    def test_bifpn_by_hand(self) -> None:
        """On taps of 64, 128 and 256: laterals, 12 nodes, 9 weights in each of three layers."""
        spec = load_spec(BASE, backbone="csp-n", neck="bifpn")
        with torch.device("meta"):
            model = build_detector(spec, classes=2)
        rows = zip(spec.layers, model.layers, strict=True)
        neck = sum(parameters(part) for layer, part in rows if layer.section == "neck")
        laterals = 64 * (64 + 128 + 256) + 3 * 128
        node = 64 * 9 + 128 + 64 * 64 + 128
        assert neck == laterals + 12 * node + 3 * 9
        assert count(model, (1, 3, 64, 64)).uncounted == {}
