"""Operations, memory access, live memory and the guidelines G1-G4: by hand, and torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import models.blocks  # noqa: F401  fills the registry
from models.builder import build_detector
from models.detector import RowGraph
from models.profile.cost import count
from models.profile.counting import findings, profile, profile_spec, sentences
from models.registry import BLOCKS
from models.spec import IMAGE, GraphSpec, LayerSpec
from models.yaml.parser import load_spec

FLOAT = 4


class Call(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


# fmt: off
BY_HAND: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], tuple[int, int]]] = {
    # 8x8 -> 4x4 with 16 channels of 3x3x3: 256 outputs; BN 2 and SiLU 1 on each
    "convolution, BN, activation": (
        lambda: BLOCKS["Conv"](3, 16, 3, 2), (1, 3, 8, 8), (256 * 27, 256 * 3)),
    # 4x4, 8 channels: 1x1 to 4 (64 outputs), 3x3 to 8 (128 outputs), one addition on 128
    "residual bottleneck": (
        lambda: BLOCKS["Bottleneck"](8, 8), (1, 8, 4, 4),
        (64 * 8 + 128 * 4 * 9, 64 * 3 + 128 * 3 + 128)),
    # 2 images: max-pool 2x2 of 4 channels 4x4 -> 2x2: 32 outputs of 3 comparisons;
    # SE: mean of 32 inputs; 1x1 4 -> 1: 2 outputs with bias, ReLU; 1x1 1 -> 4: 8 outputs with
    # bias, sigmoid; product 32; nearest upsampling to 4x4: 128
    "pool, squeeze, upsample": (
        lambda: nn.Sequential(BLOCKS["MaxPool"](4, 2), BLOCKS["SE"](4), BLOCKS["Upsample"](4)),
        (2, 4, 4, 4), (2 * 4 + 8 * 1, 32 * 3 + 32 + 2 + 2 + 8 + 8 + 32 + 128)),
    "grouped convolution and linear": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=4, bias=False), nn.Flatten(),
                              nn.Linear(128, 5), nn.Linear(5, 3, bias=False)),
        (2, 8, 4, 4), (256 * 2 * 9 + 2 * 5 * 128 + 2 * 3 * 5, 2 * 5)),
    "linear on a sequence": (lambda: nn.Linear(6, 4), (2, 3, 6), (6 * 4 * 6, 24)),
    "bilinear": (lambda: BLOCKS["Upsample"](2, None, 2, "bilinear"), (1, 2, 3, 3), (0, 72 * 7)),
    "average pool": (lambda: nn.AvgPool2d(2), (1, 2, 4, 4), (0, 8 * 4)),
    **{act: (partial(BLOCKS["Conv"], 4, 4, act=act), (1, 4, 4, 4), (64 * 4, 64 * 3))
       for act in ("SiLU", "ReLU", "LeakyReLU(0.1)", "Hardswish", "Mish")},
    "chunk and cat": (
        lambda: Call(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1)), (1, 4, 4, 4), (0, 0)),
    "zero padding": (lambda: BLOCKS["ZeroPad"](4, [1, 1, 1, 1]), (1, 4, 4, 4), (0, 0)),
    # half = 4 on 4x4: 64 outputs per convolution; 1x1 4, depthwise 9, 1x1 4; BN on 3, SiLU on 2
    "shuffle unit": (
        lambda: BLOCKS["ShuffleUnit"](8, 8), (1, 8, 4, 4), (64 * (4 + 9 + 4), 64 * (2 * 3 + 2))),
}
# fmt: on


@pytest.mark.parametrize(("build", "shape", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_macs_and_operations_by_hand(
    build: Callable[[], nn.Module], shape: tuple[int, ...], expected: tuple[int, int]
) -> None:
    cost = count(build(), shape)
    assert (cost.macs, cost.operations) == expected


def test_macs_of_attention_by_hand() -> None:
    """6 pixels of 4 channels: ten square linear layers, q k^T and its product with v."""
    cost = count(BLOCKS["TransformerBlock"](4, 4, heads=2), (1, 4, 2, 3))
    assert cost.macs == 10 * 6 * 4 * 4 + 2 * 6 * 6 * 4
    assert cost.uncounted == {}


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (lambda x: x.erf(), "aten.erf"),
        (lambda x: F.conv3d(x[None], x.new_empty(1, 1, 3, 3, 3), padding=1)[0], "aten.convolution"),
        (lambda x: x.cumsum(1), "aten.cumsum"),
    ],
)
def test_what_is_not_counted_is_named(function: Callable[[Tensor], Tensor], name: str) -> None:
    cost = count(nn.Sequential(Call(function), nn.ReLU()), (1, 4, 4, 4))
    assert name in cost.uncounted
    assert cost.macs == 0
    assert cost.operations >= 64  # what is known is still counted


@pytest.mark.parametrize(
    ("block", "c_in", "args"),
    [
        ("C3Ghost", 24, {"c_out": 16, "n": 2}),
        ("MixConvBlock", 16, {"c_out": 16, "kernels": [3, 5], "se": 0.5}),
        ("OSAStage", 24, {"c_out": 16, "n": 3}),
        ("ShuffleDown", 16, {"c_out": 16}),
        ("ConvTranspose2d", 16, {"c_out": 8, "kernel": 4, "stride": 2, "padding": 1, "groups": 2}),
    ],
)
def test_macs_equal_torch_flop_counter(block: str, c_in: int, args: dict[str, object]) -> None:
    module = BLOCKS[block](c_in, **args).eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(2, c_in, 10, 14))
    assert 2 * count(module, (2, c_in, 10, 14)).macs == counter.get_total_flops()


@pytest.mark.parametrize(
    ("module", "shape", "access", "elements"),
    [
        # the paper's h w (c1 + c2) + c1 c2 = 100 * (4 + 8) + 32
        (nn.Conv2d(4, 8, 1, bias=False), (1, 4, 10, 10), 1232, 1232),
        # a bias is read but is no access cost
        (nn.Conv2d(4, 8, 1), (1, 4, 10, 10), 1232, 1240),
        # weights are read once for a batch
        (nn.Conv2d(4, 8, 1, bias=False), (3, 4, 10, 10), 3632, 3632),
        # 10 * 10 * 4 + 5 * 5 * 8 + 9 * 4 * 8 / 2
        (nn.Conv2d(4, 8, 3, 2, 1, groups=2, bias=False), (1, 4, 10, 10), 744, 744),
        (nn.Linear(8, 5), (2, 8), 0, 16 + 40 + 5 + 10),
    ],
)
def test_access_by_hand(module, shape, access, elements):
    found = count(module, shape)
    assert found.access_bytes == access * FLOAT
    assert (found.elements, found.bytes) == (elements, elements * FLOAT)


def test_intensity_is_flops_by_byte_and_bytes_follow_the_type():
    layer = nn.Conv2d(4, 8, 1, bias=False)
    found = count(layer, (1, 4, 10, 10))
    assert found.macs == 3200
    assert found.intensity == pytest.approx(6400 / 4928)
    found = count(layer.half(), (1, 4, 10, 10))
    assert (found.bytes, found.peak_bytes) == (1232 * 2, 1200 * 2)


def test_g1_is_the_excess_over_equal_widths():
    wide = nn.Conv2d(16, 64, 1, bias=False)
    found = findings(count(wide, (1, 16, 8, 8))).unequal_widths
    assert found == pytest.approx((64 * 80 + 1024) / (64 * 64 + 1024))
    assert findings(count(nn.Conv2d(32, 32, 1), (1, 32, 8, 8))).unequal_widths == pytest.approx(1)
    strided = count(nn.Conv2d(16, 64, 1, stride=2), (1, 16, 8, 8))
    assert findings(strided).unequal_widths is None


def test_g2_is_the_excess_over_one_group():
    found = count(nn.Conv2d(8, 16, 3, padding=1, groups=2, bias=False), (1, 8, 4, 4))
    one = 16 * 8 + 16 * 8 + 9 * 8 * 8
    assert findings(found).groups == pytest.approx((16 * 8 + 16 * 16 + 9 * 8 * 16 / 2) / one)
    assert findings(found).elementwise == 0


def test_depthwise_counts_for_g4_and_not_for_g2():
    found = count(nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), (1, 8, 4, 4))
    assert findings(found).groups is None
    assert findings(found).elementwise == 1
    assert found.elements_of("depthwise") == 2 * 128 + 72


@pytest.mark.parametrize(
    ("function", "kind", "elements"),
    [
        (F.relu, "element-wise", 2 * 128),
        (lambda x: F.relu_(x), "element-wise", 2 * 128),
        (F.silu, "element-wise", 2 * 128),
        (lambda x: x + x, "element-wise", 3 * 128),
        (lambda x: x * 2, "element-wise", 2 * 128),
        (lambda x: torch.cat((x, x), 1), "copy", 4 * 128),
        (lambda x: torch.channel_shuffle(x, 2), "copy", 2 * 128),
        (lambda x: F.interpolate(x, scale_factor=2), "copy", 128 + 512),
        (lambda x: F.max_pool2d(x, 2), "pool", 128 + 2 * 32),  # values and places
        (lambda x: x.mean((2, 3)), "pool", 128 + 8),
        (lambda x: torch.erf(x), "other", 2 * 128),
    ],
)
def test_elements_read_and_written(function, kind, elements):
    found = count(Call(function), (1, 8, 4, 4))
    assert found.elements_of(kind) == elements == found.elements
    assert findings(found).kernels == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.view(1, -1),
        lambda x: x.chunk(2, 1)[1],
        lambda x: x.permute(0, 2, 3, 1),
        lambda x: x[..., ::2].unflatten(1, (2, 4)),
    ],
)
def test_views_move_nothing(function):
    found = count(Call(function), (1, 8, 4, 4))
    assert (found.kernels, found.elements, found.intensity) == ((), 0, 0.0)
    assert found.peak_bytes == 128 * FLOAT


def test_a_repeated_axis_is_read_once():
    found = count(Call(lambda x: x.expand(4, 8, 4, 4) + 1), (1, 8, 4, 4))
    assert found.elements == 128 + 4 * 128


def test_batch_norm_reads_its_four_vectors():
    found = count(nn.BatchNorm2d(8), (1, 8, 4, 4)).elements
    assert found - 2 * 128 in {4 * 8, 6 * 8}  # some builds of torch return mean and deviation, too


def test_live_memory_of_chains():
    """The image, which the caller keeps, and both maps of a convolution; what is past is freed."""
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 16, 3, 2, 1))
    assert count(chain, (1, 3, 16, 16)).peak_bytes == (3 * 256 + 8 * 256 + 16 * 64) * FLOAT
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), *(nn.Conv2d(8, 8, 1) for _ in range(3)))
    assert count(chain, (1, 3, 16, 16)).peak_bytes == (3 + 8 + 8) * 256 * FLOAT


@pytest.mark.parametrize(("inplace", "channels"), [(True, 3 + 8), (False, 3 + 16)])
def test_in_place_needs_no_second_map(inplace, channels):
    chain = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(inplace=inplace))
    assert count(chain, (1, 3, 16, 16)).peak_bytes == channels * 256 * FLOAT


def test_rows_live_as_long_as_they_are_read():
    reads = [(IMAGE,), (0,), (1,), (0, 2)]
    blocks = ["Conv2d", "Conv2d", "Conv2d", "Concat"]
    spec = GraphSpec(
        tuple(LayerSpec("backbone", r, 1, b) for r, b in zip(reads, blocks, strict=True))
    )
    concat = Call(lambda maps: torch.cat(maps, 1))
    layers = [nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), concat]
    found = profile(RowGraph(spec, layers), 16)
    peaks = [row.cost.peak_bytes / FLOAT / 256 for row in found.rows]
    # image + 0 | + 0, 1 | + 0, 1, 2 | + 0, 2 and both again
    assert peaks == [3 + 8, 3 + 16, 3 + 24, 3 + 16 + 16]
    assert found.cost.peak_bytes == max(row.cost.peak_bytes for row in found.rows)


def test_g3_counts_kernels_and_those_side_by_side():
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Conv2d(8, 8, k, padding=k // 2) for k in (1, 3, 5))

        def forward(self, x: Tensor) -> Tensor:
            return F.relu(torch.cat([layer(x) for layer in self.layers], 1))

    found = findings(count(Branches(), (1, 8, 4, 4)))
    assert (found.kernels, found.branches) == (5, 3)
    chain = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU(), nn.Conv2d(8, 8, 1))
    found = findings(count(chain, (1, 8, 4, 4)))
    assert (found.kernels, found.branches) == (3, 1)


def test_a_detector_by_hand(tiny_model: Path):
    model = build_detector(load_spec(str(tiny_model)), classes=3).fuse()
    found = profile(model, 64)
    first, second = (row.cost for row in found.rows[:2])
    image, half, quarter = 3 * 64 * 64, 16 * 32 * 32, 16 * 16 * 16
    assert first.access_bytes == (image + half + 36 * 3 * 16) * FLOAT
    # bias; SiLU reads and writes
    assert first.bytes == first.access_bytes + (16 + 2 * half) * FLOAT
    assert first.peak_bytes == (image + 2 * half) * FLOAT == found.cost.peak_bytes
    assert second.access_bytes == (half + quarter + 9 * 16 * 16) * FLOAT
    assert findings(first).kernels == 2
    assert found.cost.elements == sum(row.cost.elements for row in found.rows)
    head = found.rows[-1].cost
    assert findings(head).kernels == 3
    assert findings(head).branches == 3


def test_shuffle_has_fewer_flops_and_moves_more():
    """The finding this file is for."""
    plain, shuffle = (
        profile_spec(load_spec(name), image_size=640, classes=80).cost
        for name in ("yolov5n", "yolov5n-shuffle")
    )
    assert shuffle.flops < plain.flops / 2
    assert shuffle.bytes > plain.bytes


def test_sentences():
    found = profile(build_detector(load_spec("yolov5n-mixconv"), classes=3), 64, batch=2)
    texts = sentences(found)
    assert [text[:3] for text in texts] == ["G1:", "G2:", "G3:", "G4:"]
    assert f"G3: {len(found.cost.kernels)} kernels" in texts[2]
    assert f"up to {found.cost.branches} in parallel" in texts[2]


def test_sentences_of_a_model_without_such_convolutions():
    spec = GraphSpec((LayerSpec("backbone", (IMAGE,), 1, "Conv2d"),))
    texts = sentences(profile(RowGraph(spec, [nn.Conv2d(3, 8, 3)]), 16))
    assert texts[0] == "G1: no 1x1 convolutions"
    assert texts[1] == "G2: no group convolutions besides depthwise"
    assert texts[2] == "G3: 1 kernels, 1.0 per row, up to 1 in parallel; most in row 0 (Conv2d), 1"
