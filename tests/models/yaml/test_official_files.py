"""YOLOv5's model files, v6 and v7 and its hub, as they are written: they build, with the right size.

The layout of v1 to v3 is in test_parser.py; the shipped files are in tests/test_configs.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from models.builder import build_detector
from models.profile.cost import parameters
from models.profile.counting import profile_spec
from models.yaml.parser import parse_spec

UP = [-1, 1, "nn.Upsample", ["None", 2, "nearest"]]
LEARNED_UP = [-1, 1, "nn.ConvTranspose2d", [256, 2, 2]]
POOL = [-1, 1, "nn.MaxPool2d", [2, 2, 0]]


def concat(*sources: int) -> list[Any]:
    return [[-1, *sources], 1, "Concat", [1]]


def c3(channels: int, n: int = 3) -> list[Any]:
    return [-1, n, "C3", [channels, False]]


def conv(channels: int, kernel: int = 1, stride: int = 1, source: int = -1) -> list[Any]:
    return [source, 1, "Conv", [channels, kernel, stride]]


def unit(channels: int, n: int = 1, *more: bool) -> list[Any]:
    return [-1, n, "Bottleneck", [channels, *more]]


def stage(n: int, channels: int, block: str = "C3") -> list[Any]:
    """A stride-2 Conv and a stage of the backbone."""
    return [conv(channels, 3, 2), [-1, n, block, [channels]]]


def detect(*sources: int) -> list[Any]:
    return [list(sources), 1, "Detect", ["nc", "anchors"]]


def sppf(channels: int) -> list[Any]:
    return [-1, 1, "SPPF", [channels, 5]]


START = [[-1, 1, "Conv", [64, 6, 2, 2]], *stage(3, 128), *stage(6, 256), *stage(9, 512)]
P5 = [*START, *stage(3, 1024), sppf(1024)]
P5_TR = [*START, *stage(3, 1024, "C3TR"), sppf(1024)]
P6 = [*START, *stage(3, 768), *stage(3, 1024), sppf(1024)]
P7 = [*START, *stage(3, 768), *stage(3, 1024), *stage(3, 1280), sppf(1280)]
DOWN = [conv(512), UP, concat(6), c3(512), conv(256), UP, concat(4), c3(256)]
P4_UP = [conv(256, 3, 2), concat(14), c3(512)]
P5_UP = [conv(512, 3, 2), concat(10), c3(1024)]
PANET = [*DOWN, *P4_UP, *P5_UP, detect(17, 20, 23)]
BIFPN = [*DOWN, conv(256, 3, 2), concat(14, 6), c3(512), *P5_UP, detect(17, 20, 23)]
P34 = [*DOWN, *P4_UP, detect(17, 20)]
FPN = [
    c3(1024), UP, concat(6), conv(512), c3(512), UP, concat(4), conv(256), c3(256),
    detect(18, 14, 10),
]  # fmt: skip
P2_HEAD = [
    *DOWN, conv(128), UP, concat(2), c3(128, 1), conv(128, 3, 2), concat(18), c3(256), *P4_UP, *P5_UP,
    detect(21, 24, 27, 30),
]  # fmt: skip
P6_HEAD = [
    conv(768), UP, concat(8), c3(768), conv(512), UP, concat(6), c3(512), conv(256), UP, concat(4), c3(256),
    conv(256, 3, 2), concat(20), c3(512), conv(512, 3, 2), concat(16), c3(768),
    conv(768, 3, 2), concat(12), c3(1024), detect(23, 26, 29, 32),
]  # fmt: skip
P7_HEAD = [
    conv(1024), UP, concat(10), c3(1024), conv(768), UP, concat(8), c3(768),
    conv(512), UP, concat(6), c3(512), conv(256), UP, concat(4), c3(256),
    conv(256, 3, 2), concat(26), c3(512), conv(512, 3, 2), concat(22), c3(768),
    conv(768, 3, 2), concat(18), c3(1024), conv(1024, 3, 2), concat(14), c3(1280),
    detect(29, 32, 35, 38, 41),
]  # fmt: skip
LEARNED = [LEARNED_UP if row is UP and index == 5 else row for index, row in enumerate(PANET)]
GHOST = [
    [source, n, {"C3": "C3Ghost", "Conv": "GhostConv"}.get(block, block), args]
    for source, n, block, args in [*P5, *PANET]
]

DARKNET = [
    conv(32, 3), conv(64, 3, 2), unit(64), conv(128, 3, 2), unit(128, 2), conv(256, 3, 2), unit(256, 8),
    conv(512, 3, 2), unit(512, 8), conv(1024, 3, 2), unit(1024, 4),
]  # fmt: skip
V3_TOP = [conv(1024, 3), conv(512), conv(1024, 3), conv(256, source=-2), UP, concat(8)]
V3_REST = [
    unit(512, 1, False), unit(512, 1, False), conv(256), conv(512, 3),
    conv(128, source=-2), UP, concat(6), unit(256, 1, False), unit(256, 2, False), detect(27, 22, 15),
]  # fmt: skip
V3 = [unit(1024, 1, False), conv(512), *V3_TOP, *V3_REST]
V3_SPP = [unit(1024, 1, False), [-1, 1, "SPP", [512, [5, 9, 13]]], *V3_TOP, *V3_REST]
TINY = [
    *(row for width in (16, 32, 64, 128, 256) for row in (conv(width, 3), POOL)), conv(512, 3),
    [-1, 1, "nn.ZeroPad2d", [[0, 1, 0, 1]]], [-1, 1, "nn.MaxPool2d", [2, 1, 0]],
]  # fmt: skip
TINY_HEAD = [
    conv(1024, 3), conv(256), conv(512, 3), conv(128, source=-2), UP, concat(8), conv(256, 3),
    detect(19, 15),
]  # fmt: skip
TINY_ANCHORS = [[10, 14, 23, 27, 37, 58], [81, 82, 135, 169, 344, 319]]
ANCHORS = [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119], [116, 90, 156, 198, 373, 326]]


def weights(c_in: int, c_out: int, kernel: int = 1) -> int:
    """Of a Conv, BN included."""
    return c_in * c_out * kernel**2 + 2 * c_out


def csp(c_in: int, c_out: int, n: int = 3) -> int:
    """Of a C3: its docstring's formula."""
    h = c_out // 2
    return 2 * h * (c_in + 2) + (2 * h + 2) * c_out + n * (10 * h * h + 4 * h)


def head(*widths: int) -> int:
    return sum(255 * (width + 1) for width in widths)


# parameters at 80 classes: published ones, and what differs from them
S, L, L6, L_P2, S_GHOST = 7_235_389, 46_563_709, 76_770_172, 47_493_372, 3_897_605
V3_PARAMETERS, TINY_PARAMETERS = 61_949_149, 8_852_366  # of Darknet's yolov3 and yolov3-tiny
L_NECK = (
    *(weights(1024, 512), csp(1024, 512), weights(512, 256), csp(512, 256)),
    *(weights(256, 256, 3), csp(512, 512), weights(512, 512, 3), csp(1024, 1024)),
)
FPN_NECK = (
    *(csp(1024, 1024), weights(1536, 512), csp(512, 512), weights(768, 256), csp(256, 256)),
)
L6_TOP = (  # what l6 has over stride 32, at it, and where P7's neck goes on
    *(weights(768, 1024, 3), csp(1024, 1024), weights(1024, 512), weights(2048, 1024)),
    *(weights(1024, 768), weights(768, 768, 3), csp(1536, 1024), head(1024)),
)
P7_TOP = (
    *(weights(768, 1024, 3), csp(1024, 1024), weights(1024, 1280, 3), csp(1280, 1280)),
    *(weights(1280, 640), weights(2560, 1280), weights(1280, 1024), csp(2048, 1024)),
    *(weights(1024, 768), weights(768, 768, 3), csp(1536, 1024)),
    *(weights(1024, 1024, 3), csp(2048, 1280), head(1024, 1280)),
)
LARGE, SMALL = (1.0, 1.0), (0.33, 0.5)
# backbone, head, (depth, width), anchors, parameters
FILES = {
    "yolov5l": (P5, PANET, LARGE, ANCHORS, L),  # the hub's -panet too
    "yolov5s": (P5, PANET, SMALL, ANCHORS, S),  # the hub's -LeakyReLU too, below
    "bifpn": (P5, BIFPN, LARGE, ANCHORS, L + 2 * 256 * 512),
    "fpn": (P5, FPN, LARGE, ANCHORS, L - sum(L_NECK) + sum(FPN_NECK)),
    "p2": (P5, P2_HEAD, LARGE, 3, L_P2),
    "p34": (P5, P34, SMALL, 3, S - weights(256, 256, 3) - csp(512, 512, 1) - head(512)),
    "p6": (P6, P6_HEAD, LARGE, 3, L6),
    "p7": (P7, P7_HEAD, LARGE, 3, L6 - sum(L6_TOP) + sum(P7_TOP)),
    "s-ghost": ([*P5[:1], *GHOST[1:10]], GHOST[10:], SMALL, ANCHORS, S_GHOST),
    # TransformerBlock of width 256 for a Bottleneck: h^2 + h + 9 h^2 + 4 h, not 10 h^2 + 4 h
    "s-transformer": (P5_TR, PANET, SMALL, ANCHORS, S + 256),
    "learned upsampling": (P5, LEARNED, SMALL, ANCHORS, S + 4 * 128 * 128 + 128),  # nobody's
    "yolov3": (DARKNET, V3, LARGE, ANCHORS, V3_PARAMETERS),
    "yolov3-spp": (DARKNET, V3_SPP, LARGE, ANCHORS, V3_PARAMETERS + weights(2048, 512)),
    "yolov3-tiny": (TINY, TINY_HEAD, LARGE, TINY_ANCHORS, TINY_PARAMETERS),
}


@pytest.mark.parametrize("name", FILES)
def test_it_builds_with_the_right_parameters(name: str) -> None:
    backbone, neck, (depth, width), anchors, expected = FILES[name]
    multiples = {"depth_multiple": depth, "width_multiple": width}
    rows = {"backbone": backbone, "head": neck}
    spec = parse_spec({"nc": 80, **multiples, "anchors": anchors, **rows}, name)
    with torch.device("meta"):
        model = build_detector(spec, classes=80)
    assert parameters(model) == expected
    assert spec.unused_rows() == []
    assert profile_spec(spec, image_size=640, classes=80).notes() == []


def test_leaky_relu_everywhere() -> None:
    rows = {"anchors": ANCHORS, "backbone": P5, "head": PANET}
    multiples = {"depth_multiple": 0.33, "width_multiple": 0.125}
    spec = parse_spec({"nc": 80, "activation": "nn.LeakyReLU(0.1)", **multiples, **rows}, "file")
    parts = list(build_detector(spec, classes=1).modules())
    found = [part.negative_slope for part in parts if isinstance(part, nn.LeakyReLU)]
    assert set(found) == {0.1}
    assert len(found) == sum(isinstance(part, nn.BatchNorm2d) for part in parts)


def test_names_of_the_transformer_are_those_of_genuine_checkpoints() -> None:
    spec = parse_spec({"anchors": ANCHORS, "backbone": P5_TR, "head": PANET}, "file")
    with torch.device("meta"):
        model = build_detector(spec, classes=1)
    names = [name for name in model.state_dict() if name.startswith("model.8.m.")]
    layer = (
        "q.weight", "k.weight", "v.weight", "ma.in_proj_weight", "ma.in_proj_bias",
        "ma.out_proj.weight", "ma.out_proj.bias", "fc1.weight", "fc2.weight",
    )  # fmt: skip
    layers = [f"model.8.m.tr.{index}.{part}" for index in range(3) for part in layer]
    assert names == ["model.8.m.linear.weight", "model.8.m.linear.bias", *layers]
