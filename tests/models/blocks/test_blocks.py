"""Blocks: their registry, impossible arguments, values by hand and against timm and torchvision."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import timm.layers
import timm.models.ghostnet as timm_ghost
import timm.models.vovnet as timm_vovnet
import torch
from torch import Tensor, nn

import models.blocks  # noqa: F401  fills the registry
from models import registry
from models.blocks.conv import activation, fuse, make_activation, row_defaults
from models.blocks.ghost import DFC
from models.blocks.shuffle import channel_shuffle
from models.profile.cost import parameters
from models.registry import BLOCKS, Block
from models.spec import round_channels
from tests.models.blocks.references import calibrate, randomise


def assert_equal_to(reference: nn.Module, own: nn.Module, x: Tensor) -> None:
    """With the reference's weights and BN statistics, copied leaf by leaf, `own` gives its values."""
    randomise(reference)
    calibrate(reference, [x])
    for kind in (nn.Conv2d, nn.BatchNorm2d):
        pairs = [[m for m in net.modules() if isinstance(m, kind)] for net in (reference, own)]
        for one, other in zip(*pairs, strict=True):
            other.load_state_dict(one.state_dict())
            if kind is nn.BatchNorm2d:
                other.eps = one.eps
    with torch.no_grad():
        torch.testing.assert_close(own.eval()(x), reference.eval()(x), rtol=1e-5, atol=1e-5)


class TestRegistry:
    def test_second_registration_raises(self) -> None:
        class Conv(Block):
            def __init__(self, c_in: int) -> None:
                super().__init__()

        with pytest.raises(ValueError, match="'Conv' is already registered"):
            registry.register(Conv)

    def test_yolov5_positions(self) -> None:
        """Positional arguments of YOLOv5's files, the row's repeats left out."""
        expected = {
            "C3": ["c_out", "shortcut", "groups", "expansion"],
            "C3Ghost": ["c_out", "shortcut", "groups", "expansion"],
            "BottleneckCSP": ["c_out", "shortcut", "groups", "expansion"],
            "Bottleneck": ["c_out", "shortcut", "groups", "expansion"],
            "GhostConv": ["c_out", "kernel", "stride", "groups", "act"],
            "GhostBottleneck": ["c_out", "kernel", "stride"],
            "SPP": ["c_out", "kernels"],
            "SPPF": ["c_out", "kernel"],
            "Focus": ["c_out", "kernel", "stride", "padding", "groups", "act"],
            "Upsample": ["size", "scale_factor", "mode"],
            "Conv": ["c_out", "kernel", "stride", "padding", "groups", "act"],
        }
        for name, positions in expected.items():
            names = [item for item in BLOCKS[name].arguments if item != "n"]
            assert names[: len(positions)] == positions, name


class TestActivation:
    @pytest.mark.parametrize(
        ("text", "reference"),
        [
            ("SiLU", nn.SiLU()), ("nn.ReLU()", nn.ReLU()), ("LeakyReLU(0.1)", nn.LeakyReLU(0.1)),
            ("nn.LeakyReLU", nn.LeakyReLU()), ("Hardswish()", nn.Hardswish()), ("Mish", nn.Mish()),
            ("nn.Identity()", nn.Identity()), ("LeakyReLU( 2e-1 )", nn.LeakyReLU(0.2)),
        ],
    )  # fmt: skip
    def test_values(self, text: str, reference: nn.Module) -> None:
        x = torch.linspace(-4, 4, 33)
        assert torch.equal(activation(text)(x.clone()), reference(x))

    @pytest.mark.parametrize(
        "text",
        [
            "", "silu", "torch.nn.SiLU()", "SiLU(1)", "ReLU(True)", "LeakyReLU(1.2.3)", "LeakyReLU(1e999)",
            "LeakyReLU(-0.1)",
            "__import__('os')", "SiLU();x", "LeakyReLU(0.1", "nn.Softplus()",
        ],
    )  # fmt: skip
    def test_anything_else_is_refused(self, text: str) -> None:
        with pytest.raises(ValueError, match="activation"):
            activation(text)

    def test_default_is_scoped_nested_and_per_thread(self) -> None:
        seen: list[nn.Module] = []
        with row_defaults("ReLU"):
            assert isinstance(make_activation(True), nn.ReLU)
            with pytest.raises(ValueError, match="unknown"), row_defaults("nn.Mish()"):
                BLOCKS["Conv"](8, 8, act="Unknown")
            with row_defaults("nn.Mish()"):
                assert isinstance(BLOCKS["C3"](8, 8).cv1.act, nn.Mish)
            assert isinstance(make_activation(True), nn.ReLU)
            thread = threading.Thread(target=lambda: seen.append(make_activation(True)))
            thread.start()
            thread.join()
        assert isinstance(seen[0], nn.SiLU)
        assert isinstance(make_activation(True), nn.SiLU)
        assert isinstance(make_activation(False), nn.Identity)


@pytest.mark.parametrize(
    ("block", "c_in", "args", "message"),
    [
        ("Conv", 6, {"c_out": 0}, r"c_out must be a whole number \(1 to 1,000,000\), got 0"),
        ("Conv", 6, {"c_out": True}, "c_out .* got True"),
        ("Conv", 6, {"c_out": 8, "act": 3}, "act must be a name or true or false, got 3"),
        ("Conv", 6, {"c_out": 8, "groups": 4}, "c_in must be a multiple of 4, got 6"),
        ("Conv", 6, {"c_out": 8, "kernel": [3, 3, 3]}, r"kernel must be a whole number .* or a list of 2, .* got \[3, 3, 3\]"),
        ("Conv2d", 6, {"c_out": 8, "groups": 4}, "c_in must be a multiple of 4, got 6"),
        ("C3", 8, {"c_out": 8, "n": 1001}, r"number .*\(1 to 1,000\), got 1001"),
        ("C3", 8, {"c_out": 8, "expansion": 0.01}, "0.01 times 8 channels leaves none"),
        ("SPP", 8, {"c_out": 8, "kernels": [5, 4]}, "each a whole number .odd, 1 to 1,000,000., got"),
        ("GhostConv", 8, {"c_out": 33}, "c_out must be a multiple of 2, got 33"),
        ("GhostBottleneck", 8, {"c_out": 12}, "keeps the width, got c_in 8 and c_out 12"),
        ("GhostBottleneck", 8, {"c_out": 10, "stride": 2}, "c_out must be a multiple of 4, got 10"),
        ("GhostModule", 8, {"c_out": 8, "ratio": 1}, r"ratio must be a whole number \(2 to 1,000,000\), got 1"),
        ("GhostUnit", 8, {"c_out": 8, "se": 1.5}, r"se must be a number \(0 to 1\), got 1.5"),
        ("OSA", 6, {"c_out": 8, "identity": True}, "identity needs c_in == c_out, got 6 and 8"),
        ("OSA", 8, {"c_out": 8, "depthwise": True, "bottleneck": 0.5}, "bottleneck must be 0 with depthwise, got 0.5"),
        ("ShuffleUnit", 7, {"c_out": 7}, "c_out must be a multiple of 2, got 7"),
        ("ShuffleUnit", 8, {"c_out": 10}, "keeps its width, got c_in 8 and c_out 10"),
        ("ShuffleDown", 8, {"c_out": 9}, "c_out must be a multiple of 2, got 9"),
        ("ShuffleDown", 8, {"c_out": 8, "official_widths": True}, "c_in < c_out, got 8 and 8"),
        ("MixConv", 8, {"kernels": 3}, "must be a list, each"),
        ("MixConv", 2, {"kernels": [3, 5, 7]}, "3 kernels for 2 channels"),
        ("MixConvBlock", 2, {"c_out": 8, "se": 0.25}, "0.25 times 2 channels leaves none"),
        ("SE", 2, {"ratio": 0.25}, "ratio 0.25 gives 0 of 2 channels"),
        ("Concat", [8, 8], {"dimension": 2}, "dimension must be 1, got 2"),
        ("Concat", [8], {}, "at least two maps"),
        ("WeightedSum", [8], {}, "at least two maps"),
        ("WeightedSum", [8, 8, 16], {}, r"equal width, got \[8, 8, 16\]; put a 1x1 Conv"),
        ("Upsample", 8, {"size": 10}, "size must be None, got 10"),
        ("MaxPool", 8, {"kernel": 2, "padding": 2}, "0 to kernel // 2 = 1, got 2"),
        ("ZeroPad", 8, {"padding": [1, 2]}, "a list of 4, each"),
        ("Linear", 8, {"c_out": 4, "dropout": float("nan")}, "dropout .*0 to 1.*got nan"),
        ("PeleeStage", 32, {"c_out": 16, "growth": 7}, "growth must be a multiple of 2, got 7"),
        ("PeleeStage", 4, {"c_out": 16, "growth": 8}, "4 channels and a growth of 8 leave none"),
        ("VoVStage", 8, {"c_out": 8, "ese": "all"}, "none or last or every, got 'all'"),
    ],
)  # fmt: skip
def test_impossible_arguments_of_a_row(
    block: str, c_in: Any, args: dict[str, Any], message: str
) -> None:
    repeats, inputs = args.pop("n", 1), c_in if isinstance(c_in, list) else [c_in]
    with pytest.raises(ValueError, match=message):
        registry.build(block, inputs, repeats, args)


class TestYolov5Blocks:
    """Parameters of the rows of yolov5l and yolov5l-ghost (reference/yolo_params.json)."""

    @pytest.mark.parametrize(
        ("block", "args", "convs", "others"),  # Convs (each with conv and bn), and other layers
        [
            ("Conv", {}, "", ""),
            ("Focus", {}, "conv", ""),
            ("Bottleneck", {}, "cv1 cv2", ""),
            ("C3", {"n": 1}, "cv1 cv2 cv3 m.0.cv1 m.0.cv2", ""),
            ("BottleneckCSP", {"n": 1}, "cv1 cv4 m.0.cv1 m.0.cv2", "cv2 cv3 bn"),
            ("SPPF", {}, "cv1 cv2", ""),
            ("SPP", {}, "cv1 cv2", ""),
            ("GhostConv", {}, "cv1 cv2", ""),
            ("GhostBottleneck", {"stride": 2}, "conv.0.cv1 conv.0.cv2 conv.2.cv1 conv.2.cv2 conv.1"
             " shortcut.0 shortcut.1", ""),
            ("C3Ghost", {"n": 1}, "cv1 cv2 cv3 m.0.conv.0.cv1 m.0.conv.0.cv2 m.0.conv.2.cv1"
             " m.0.conv.2.cv2", ""),
        ],
    )  # fmt: skip
    def test_names_are_those_of_genuine_checkpoints(
        self, block: str, args: dict[str, Any], convs: str, others: str
    ) -> None:
        found = {key.rpartition(".")[0] for key in BLOCKS[block](8, 8, **args).state_dict()}
        expected = {f"{name}.{part}".lstrip(".") for name in convs.split() or [""]
                    for part in ("conv", "bn")}  # fmt: skip
        assert found == expected | set(others.split())
        assert set(BLOCKS["Conv2d"](8, 8).state_dict()) == {"weight", "bias"}

    def test_sppf_equals_spp(self) -> None:
        x = torch.randn(1, 8, 13, 9)
        spp, sppf = BLOCKS["SPP"](8, 8).eval(), BLOCKS["SPPF"](8, 8).eval()
        sppf.load_state_dict(spp.state_dict())
        torch.testing.assert_close(sppf(x), spp(x))

    def test_constants(self) -> None:
        csp = BLOCKS["BottleneckCSP"](8, 8)
        assert isinstance(csp.act, nn.LeakyReLU)
        assert csp.act.negative_slope == 0.1
        assert isinstance(csp.cv1.act, nn.SiLU)
        assert (csp.cv1.bn.eps, csp.cv1.bn.momentum) == (1e-3, 0.03)

    def test_bottleneck_adds_only_where_asked_and_possible(self) -> None:
        x = torch.randn(1, 8, 5, 5)
        for c_out, shortcut, adds in [(8, True, True), (8, False, False), (12, True, False)]:
            block = BLOCKS["Bottleneck"](8, c_out, shortcut).eval()
            inner = block.cv2(block.cv1(x))
            torch.testing.assert_close(block(x), x + inner if adds else inner)

    def test_c3ghost_is_residual_whatever_shortcut_says(self) -> None:
        x = torch.randn(1, 8, 5, 5)
        yes, no = BLOCKS["C3Ghost"](8, 8, 1, True).eval(), BLOCKS["C3Ghost"](8, 8, 1, False).eval()
        no.load_state_dict(yes.state_dict())
        assert torch.equal(yes(x), no(x))

    def test_cheap_operation_is_5x5_depthwise_on_the_activated_half(self) -> None:
        ghost = BLOCKS["GhostConv"](6, 8).eval()
        cheap = ghost.cv2.conv
        assert cheap.kernel_size == (5, 5)
        assert cheap.groups == cheap.in_channels == cheap.out_channels == 4
        x = torch.randn(1, 6, 5, 5)
        first = nn.functional.silu(ghost.cv1.bn(ghost.cv1.conv(x)))
        torch.testing.assert_close(ghost(x)[:, :4], first)
        torch.testing.assert_close(ghost(x)[:, 4:], ghost.cv2(first))


class TestShuffle:
    def test_permutation_by_hand(self) -> None:
        x = torch.arange(6.0).view(1, 6, 1, 1)
        assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
        assert channel_shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]

    def test_keeps_channels_last(self) -> None:
        x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
        out = channel_shuffle(x, 2)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, channel_shuffle(x.contiguous(), 2))


class TestGhost:
    @pytest.mark.parametrize(("c_out", "ratio", "cheap"), [(12, 2, 3), (11, 2, 3), (10, 3, 5)])
    def test_module_equals_timm(self, c_out: int, ratio: int, cheap: int) -> None:
        sizes = {"kernel_size": 3, "ratio": ratio, "dw_size": cheap, "stride": 2}
        reference = timm_ghost.GhostModule(6, c_out, **sizes)
        own = BLOCKS["GhostModule"](6, c_out, 3, 2, ratio, cheap, "ReLU")
        assert_equal_to(reference, own, torch.randn(2, 6, 9, 12))


class TestDfc:
    """The gate of GhostNetV2; test_references.py has it against timm."""

    def test_by_hand(self) -> None:
        """One channel, all weights one: each half-size value sums a 5x5 window of 2x2 means."""
        gate = DFC(1, 1).eval()
        for conv in (gate.mix, gate.horizontal, gate.vertical):
            nn.init.ones_(conv.conv.weight)
            conv.bn = nn.Identity()
        x = torch.zeros(1, 1, 5, 15)
        x[..., 0, 0] = 4
        x[..., 4, :] = x[..., :, 14] = 100  # the odd row and column: unseen
        with torch.no_grad():
            found = gate(x)
        # the mean 1 of the first 2x2 reaches half-size columns 0 to 2 (of 7) in both rows.  Nearest:
        # pixel i of 15 takes column floor(7 i / 15), so pixels 0 to 6
        reached = torch.zeros(5, 15)
        reached[:, :7] = 1
        torch.testing.assert_close(found[0, 0], torch.sigmoid(reached))

    @pytest.mark.parametrize("size", [(1, 6), (6, 1), (1, 1)])
    def test_a_map_one_pixel_high_or_wide(self, size: tuple[int, int]) -> None:
        """Where timm fails: the side of 1 stays, as if both rows of a map of twice the height agreed."""
        gate = DFC(6, 8)
        randomise(gate)
        calibrate(gate, [torch.randn(4, 6, 16, 16)])
        x = torch.randn(2, 6, *size)
        twice = x.repeat_interleave(2 if size[0] == 1 else 1, 2)
        twice = twice.repeat_interleave(2 if size[1] == 1 else 1, 3)
        with torch.no_grad():
            found, expected = gate(x), gate(twice)[..., : size[0], : size[1]]
        torch.testing.assert_close(found, expected)


class TestOsa:
    @pytest.mark.parametrize(
        ("c_in", "depthwise", "identity", "ese"),
        [(8, False, False, False), (12, False, True, True), (8, True, False, False),
         (6, True, False, True)],
    )  # fmt: skip
    def test_equals_timm(self, c_in: int, depthwise: bool, identity: bool, ese: bool) -> None:
        reference = timm_vovnet.OsaBlock(
            c_in, 6, 12, 3, residual=identity, depthwise=depthwise, attn="ese" if ese else "",
            norm_layer=timm.layers.BatchNormAct2d, act_layer=nn.ReLU,
        )  # fmt: skip
        own = BLOCKS["OSA"](c_in, 12, 3, 6, 0.0, depthwise, identity, ese, "ReLU")
        assert_equal_to(reference, own, torch.randn(2, c_in, 9, 12))


class TestStages:
    """The drop-ins for C3: how parameters grow with n, and one count by hand each."""

    @staticmethod
    def formula(block: str, c_in: int, c: int, n: int) -> int:
        """The documented formulas, at the default arguments."""
        h = c // 2
        if block in {"C3", "C3Ghost"}:
            unit = 10 * h * h + 4 * h if block == "C3" else h * h // 2 + 87 * h // 4
            return 2 * h * (c_in + 2) + (2 * h + 2) * c + n * unit
        enter = (c_in + 2) * c if c_in != c else 0
        if block == "OSAStage":
            chain = 9 * c * h + 2 * h + (n - 1) * (9 * h * h + 2 * h)
            return enter + chain + (c + n * h + 2) * c
        if block == "ShuffleStage":
            return enter + n * (2 * h * h + 15 * h)
        w, r = c * 3 // 2, c // 4
        return enter + n * (3 * c * w // 2 + 22 * w + 2 * c + 2 * r * w + r)

    @pytest.mark.parametrize("c_in", [32, 48])
    @pytest.mark.parametrize("block", ["C3", "C3Ghost", "OSAStage", "ShuffleStage", "MixStage"])
    def test_depth_changes_parameters_by_the_formula(self, block: str, c_in: int) -> None:
        counts = [parameters(BLOCKS[block](c_in, 32, n)) for n in (1, 2, 5)]
        assert counts == [self.formula(block, c_in, 32, n) for n in (1, 2, 5)]
        assert len(set(counts)) == 3

    @pytest.mark.parametrize("block", ["OSAStage", "MixStage"])
    def test_shortcut_is_honoured(self, block: str) -> None:
        x = torch.randn(1, 8, 5, 5)
        yes, no = BLOCKS[block](8, 8, 1, True).eval(), BLOCKS[block](8, 8, 1, False).eval()
        no.load_state_dict(yes.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(yes(x), no(x) + x)


@pytest.mark.parametrize(
    ("weights", "values", "expected"),
    [
        ([1, 2, 3], [1, 10, 100], 321 / 6.0001),
        (None, [1, 3], 4 / 2.0001),  # starts as the mean
        ([-3, 2], [5, 7], 14 / 2.0001),  # a negative weight removes its map
        ([-1, 0], [1, 1], 0),  # no weight left: no division by 0
    ],
)
def test_weighted_sum_by_hand(weights: Any, values: list[float], expected: float) -> None:
    """The formula of arXiv:1911.09070, section 3.3."""
    block = BLOCKS["WeightedSum"]([1] * len(values))
    if weights is not None:
        block.weight.data = torch.tensor(weights, dtype=torch.float32)
    maps = [torch.full((1, 1, 1, 2), float(value)) for value in values]
    assert block(maps).flatten().tolist() == pytest.approx([expected] * 2, rel=1e-6)


@pytest.mark.parametrize(
    ("block", "args", "map_", "expected"),
    [
        ("Upsample", (None, 2, "nearest"), [[1, 2]], [[1, 1, 2, 2], [1, 1, 2, 2]]),
        ("MaxPool", (3, 2), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]], [[10]]),
        ("MaxPool", (3, 2, 0, True), [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12, 13, 14, 15]],
         [[10, 11], [14, 15]]),
        ("ZeroPad", ([0, 1, 0, 2],), [[1]], [[1, 0], [0, 0], [0, 0]]),
        ("GlobalPool", (), [[1, 2], [3, 6]], [[3]]),
    ],
)  # fmt: skip
def test_rows_without_weights_by_hand(block: str, args: Any, map_: Any, expected: Any) -> None:
    assert BLOCKS[block](1, *args)(torch.tensor([[map_]]).float())[0, 0].tolist() == expected


def test_orders_of_channels_by_hand() -> None:
    ones, zeros = torch.ones(1, 1, 2, 2), torch.zeros(1, 2, 2, 2)
    assert BLOCKS["Concat"]([2, 1])([zeros, ones])[0, :, 0, 0].tolist() == [0, 0, 1]
    focus = BLOCKS["Focus"](1, 4, act=False).eval()
    with torch.no_grad():
        focus.conv.conv.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
        focus.conv.bn.running_var.fill_(1 - 1e-3)
        out = focus(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
    # (row, column) = (0, 0), (1, 0), (0, 1), (1, 1)
    assert out.flatten().tolist() == [1.0, 3.0, 2.0, 4.0]


def test_sizes_by_hand() -> None:
    assert BLOCKS["DWConv"](12, 8, 3).conv.groups == 4  # the greatest common divisor
    shapes = [tuple(conv.weight.shape) for conv in BLOCKS["MixConv"](10, [3, 5, 7]).convs]
    assert shapes == [(4, 1, 3, 3), (3, 1, 5, 5), (3, 1, 7, 7)]  # the first has the remainder
    assert [round_channels(value, 4) for value in (30, 5, 18, 168, 1)] == [32, 8, 20, 168, 4]
    assert round_channels(11, 8) == 16  # 8 would be under 90 %


def test_a_fused_mixconv_is_one_convolution_if_its_kernels_are_small() -> None:
    """Its values are those of the parts in test_contract.py."""
    block, large = (BLOCKS["MixConv"](10, [3, 5, last]).eval() for last in (7, 9))
    parts = [conv.weight.clone() for conv in block.convs]
    for one in (block, large):
        one.bn.eps = 0.0  # nothing but identity to fold
        fuse(one)
    weight, at = block.conv.weight, 0
    assert weight.shape == (10, 1, 7, 7)
    for part, kernel in zip(parts, (3, 5, 7), strict=True):
        edge, rows = (7 - kernel) // 2, slice(at, at + len(part))
        inner = weight[rows, :, edge : 7 - edge, edge : 7 - edge]
        torch.testing.assert_close(inner, part)
        assert weight[rows].count_nonzero() == part.count_nonzero()
        at += len(part)
    assert large.conv is None


def test_contract_and_expand_are_inverse_and_keep_the_phases() -> None:
    x = torch.arange(2 * 4 * 6, dtype=torch.float32).view(1, 2, 4, 6)
    small = BLOCKS["Contract"](2)(x)
    for channel in range(8):
        row, column, c = channel // 4, channel // 2 % 2, channel % 2
        assert torch.equal(small[0, channel], x[0, c, row::2, column::2])
    assert torch.equal(BLOCKS["Expand"](8)(small), x)


@pytest.mark.parametrize(
    ("c_out", "kernels", "equal", "widths"),
    [
        (8, (1, 3), True, [4, 4]),
        (10, (1, 3, 5), True, [4, 3, 3]),  # linspace(0, 3 - 1e-6, c_out), rounded down
        (11, (1, 3, 5), True, [4, 3, 4]),
        (10, (1, 3), False, [9, 1]),  # 9 * 1^2 == 1 * 3^2
    ],
)
def test_widths_of_mixconv2d(
    c_out: int, kernels: tuple[int, ...], equal: bool, widths: list[int]
) -> None:
    block = BLOCKS["MixConv2d"](6, c_out, kernels, equal_ch=equal)
    assert [conv.out_channels for conv in block.m] == widths


def test_transformer_layer_by_hand() -> None:
    """softmax(q k^T / sqrt(d)) v in each head, over the pixels; every sum by matrix products."""
    torch.manual_seed(0)
    block, x = BLOCKS["TransformerBlock"](8, 8, heads=2).eval(), torch.randn(2, 8, 3, 2)
    layer, pixels = block.tr[0], x.flatten(2).transpose(1, 2)  # (B, pixels, channels)
    y = pixels + pixels @ block.linear.weight.T + block.linear.bias
    projections = zip(
        (layer.q, layer.k, layer.v),
        layer.ma.in_proj_weight.chunk(3),
        layer.ma.in_proj_bias.chunk(3),
        strict=True,
    )
    heads = [
        ((y @ own.weight.T) @ weight.T + bias).unflatten(2, (2, 4)).transpose(1, 2)
        for own, weight, bias in projections
    ]
    q, k, v = heads
    found = ((q @ k.transpose(2, 3) / 2).softmax(-1) @ v).transpose(1, 2).flatten(2)
    y = found @ layer.ma.out_proj.weight.T + layer.ma.out_proj.bias + y
    y = y @ layer.fc1.weight.T @ layer.fc2.weight.T + y
    torch.testing.assert_close(block(x), y.transpose(1, 2).unflatten(2, (3, 2)))


def test_dropout_acts_in_training_alone() -> None:
    block, x = BLOCKS["Linear"](1000, 4, bias=False, dropout=0.5), torch.ones(1, 1000)
    assert not torch.equal(block(x), block(x))
    assert torch.equal(block.eval()(x), block(x))
