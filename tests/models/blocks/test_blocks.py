"""Blocks: their registry, impossible arguments, values by hand and against timm and torchvision."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import pytest
import timm.layers
import timm.models._efficientnet_blocks as timm_efficient
import timm.models.ghostnet as timm_ghost
import timm.models.vovnet as timm_vovnet
import torch
import torchvision.models.shufflenetv2 as tv_shuffle
from torch import Tensor, nn

import models.blocks  # noqa: F401  fills the registry
from models import registry
from models.blocks.conv import activation, make_activation, row_defaults
from models.blocks.mixconv import split_channels
from models.blocks.shuffle import channel_shuffle
from models.profile.cost import parameters
from models.registry import BLOCKS, Block
from models.spec import round_channels
from tests.models.conftest import calibrate, randomise


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

    def test_class_attributes(self) -> None:
        assert {"C3", "C3Ghost", "BottleneckCSP"} <= {
            name for name in BLOCKS if "n" in BLOCKS[name].arguments
        }
        assert BLOCKS["C3Ghost"].ignores == ("shortcut", "groups")
        assert BLOCKS["GhostUnit"].channel_args == ("c_out", "hidden")
        assert BLOCKS["HeadConv"].channel_args == BLOCKS["Linear"].channel_args == ()
        several = {name for name in BLOCKS if BLOCKS[name].reads_several}
        assert several == {"Concat", "WeightedSum"}
        assert set(registry.YAML_NAMES.values()) <= set(BLOCKS)


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
        ("Conv", 6, {"c_out": 8.5}, "got 8.5"),
        ("Conv", 6, {"c_out": 8, "stride": "2"}, "stride .* got '2'"),
        ("Conv", 6, {"c_out": True}, "c_out .* got True"),
        ("Conv", 6, {"c_out": 8, "act": 3}, "act must be a name or true or false, got 3"),
        ("Conv", 6, {"c_out": 8, "groups": 4}, "c_in must be a multiple of 4, got 6"),
        ("Conv", 6, {"c_out": 8, "padding": -1}, "padding .* got -1"),
        ("Conv", 6, {"c_out": 8, "kernel": [3, 3, 3]}, r"kernel must be a whole number .* or a list of 2, .* got \[3, 3, 3\]"),
        ("Conv2d", 6, {"c_out": 8, "groups": 4}, "c_in must be a multiple of 4, got 6"),
        ("C3", 8, {"c_out": 8, "n": 1001}, "1001 repeats; 1000 at most"),
        ("C3", 8, {"c_out": 8, "shortcut": 3}, "shortcut must be true or false, got 3"),
        ("C3", 8, {"c_out": 8, "expansion": 0.01}, "0.01 times 8 channels leaves none"),
        ("SPP", 8, {"c_out": 8, "kernels": [5, 4]}, "each a whole number .odd, 1 to 1,000,000., got"),
        ("SPPF", 8, {"c_out": 8, "kernel": 4}, "kernel must be a whole number .odd, 1 to 1,000,000., got 4"),
        ("GhostConv", 8, {"c_out": 33}, "c_out must be a multiple of 2, got 33"),
        ("GhostBottleneck", 8, {"c_out": 12}, "keeps the width, got c_in 8 and c_out 12"),
        ("GhostBottleneck", 8, {"c_out": 10, "stride": 2}, "c_out must be a multiple of 4, got 10"),
        ("GhostBottleneck", 8, {"c_out": 8, "stride": 3}, "stride must be 1 or 2, got 3"),
        ("GhostModule", 8, {"c_out": 8, "ratio": 1}, r"ratio must be a whole number \(2 to 1,000,000\), got 1"),
        ("GhostModule", 8, {"c_out": 8, "cheap_kernel": 4}, r"cheap_kernel must be a whole number \(odd, 1 to 1,000,000\), got 4"),
        ("GhostUnit", 8, {"c_out": 8, "se": 1.5}, r"se must be a number \(0 to 1\), got 1.5"),
        ("GhostUnit", 8, {"c_out": 8, "stride": 4}, "stride must be 1 or 2"),
        ("OSA", 6, {"c_out": 8, "identity": True}, "identity needs c_in == c_out, got 6 and 8"),
        ("OSA", 8, {"c_out": 8, "depthwise": True, "bottleneck": 0.5}, "bottleneck must be 0 with depthwise, got 0.5"),
        ("ShuffleUnit", 7, {"c_out": 7}, "c_out must be a multiple of 2, got 7"),
        ("ShuffleUnit", 8, {"c_out": 10}, "keeps its width, got c_in 8 and c_out 10"),
        ("ShuffleDown", 8, {"c_out": 9}, "c_out must be a multiple of 2, got 9"),
        ("ShuffleDown", 8, {"c_out": 8, "stride": 1}, "stride must be 2, got 1"),
        ("ShuffleDown", 8, {"c_out": 8, "official_widths": True}, "c_in < c_out, got 8 and 8"),
        ("ShuffleStage", 8, {"c_out": 9}, "c_out must be a multiple of 2, got 9"),
        ("MixConv", 8, {"kernels": [3, 4]}, r"each a whole number \(odd, 1 to 1,000,000\), got \[3, 4\]"),
        ("MixConv", 8, {"kernels": 3}, "must be a list, each"),
        ("MixConv", 2, {"kernels": [3, 5, 7]}, "3 kernels for 2 channels"),
        ("MixConvBlock", 6, {"c_out": 9, "project_groups": 2}, "c_out must be a multiple of 2, got 9"),
        ("MixConvBlock", 2, {"c_out": 8, "se": 0.25}, "0.25 times 2 channels leaves none"),
        ("SE", 2, {"ratio": 0.25}, "ratio 0.25 gives 0 of 2 channels"),
        ("SE", 8, {"gate": "ReLU"}, "gate must be Sigmoid or Hardsigmoid, got 'ReLU'"),
        ("Concat", [8, 8], {"dimension": 2}, "dimension must be 1, got 2"),
        ("Concat", [8], {}, "at least two maps"),
        ("WeightedSum", [8], {}, "at least two maps"),
        ("WeightedSum", [8, 8, 16], {}, r"equal width, got \[8, 8, 16\]; put a 1x1 Conv"),
        ("Upsample", 8, {"size": 10}, "size must be None, got 10"),
        ("Upsample", 8, {"mode": "cubic"}, "nearest or bilinear, got 'cubic'"),
        ("Upsample", 8, {"scale_factor": 0}, "scale_factor .* got 0"),
        ("MaxPool", 8, {"kernel": 2, "padding": 2}, "0 to kernel // 2 = 1, got 2"),
        ("ZeroPad", 8, {"padding": [1, 2]}, "a list of 4, each"),
        ("Linear", 8, {"c_out": 4, "dropout": -0.1}, "dropout .*0 to 1.*got -0.1"),
        ("Linear", 8, {"c_out": 4, "dropout": float("nan")}, "dropout .*0 to 1.*got nan"),
        ("PeleeStage", 32, {"c_out": 16, "growth": 7}, "growth must be a multiple of 2, got 7"),
        ("PeleeStage", 32, {"c_out": 16, "stride": 3}, "stride must be 1 or 2, got 3"),
        ("PeleeStage", 4, {"c_out": 16, "growth": 8}, "4 channels and a growth of 8 leave none"),
        ("GhostUnit", 6, {"c_out": 8, "dfc": 1}, "dfc must be true or false, got 1"),
        ("ShuffleUnit", 8, {"c_out": 8, "shuffle": "middle"}, "end or start, got 'middle'"),
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
        ("block", "c_in", "args", "params"),
        [
            ("Conv", 3, {"c_out": 64, "kernel": 6, "stride": 2, "padding": 2}, 7_040),
            ("Conv", 64, {"c_out": 128, "kernel": 3, "stride": 2}, 73_984),
            ("C3", 128, {"c_out": 128, "n": 3}, 156_928),
            ("C3", 256, {"c_out": 256, "n": 6}, 1_118_208),
            ("C3", 512, {"c_out": 512, "n": 9}, 6_433_792),
            ("C3", 1024, {"c_out": 1024, "n": 3}, 9_971_712),
            ("SPPF", 1024, {"c_out": 1024, "kernel": 5}, 2_624_512),
            ("C3", 1024, {"c_out": 512, "n": 3, "shortcut": False}, 2_757_632),
            ("C3", 512, {"c_out": 256, "n": 3, "shortcut": False}, 690_688),
            ("GhostConv", 64, {"c_out": 128, "kernel": 3, "stride": 2}, 38_720),
            ("GhostConv", 1024, {"c_out": 512}, 269_568),
            ("C3Ghost", 128, {"c_out": 128, "n": 3}, 43_600),
            ("C3Ghost", 512, {"c_out": 512, "n": 9}, 871_360),
            ("C3Ghost", 1024, {"c_out": 512, "n": 3, "shortcut": False}, 903_488),
        ],
    )
    def test_row(self, block: str, c_in: int, args: dict[str, Any], params: int) -> None:
        with torch.device("meta"):
            assert parameters(BLOCKS[block](c_in, **args)) == params

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

    def test_bn_has_yolov5_constants(self) -> None:
        norm = BLOCKS["Conv"](4, 4).bn
        assert (norm.eps, norm.momentum) == (1e-3, 0.03)

    def test_focus_phases_in_order(self) -> None:
        focus = BLOCKS["Focus"](1, 4, act=False).eval()
        with torch.no_grad():
            focus.conv.conv.weight.copy_(torch.eye(4).view(4, 4, 1, 1))
            focus.conv.bn.running_var.fill_(1 - 1e-3)
            out = focus(torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]]))
        # (row, column) = (0, 0), (1, 0), (0, 1), (1, 1)
        assert out.flatten().tolist() == [1.0, 3.0, 2.0, 4.0]

    def test_sppf_equals_spp(self) -> None:
        x = torch.randn(1, 8, 13, 9)
        spp, sppf = BLOCKS["SPP"](8, 8).eval(), BLOCKS["SPPF"](8, 8).eval()
        sppf.load_state_dict(spp.state_dict())
        torch.testing.assert_close(sppf(x), spp(x))

    def test_csp_inner_activation_is_leaky(self) -> None:
        csp = BLOCKS["BottleneckCSP"](8, 8)
        assert isinstance(csp.act, nn.LeakyReLU)
        assert csp.act.negative_slope == 0.1
        assert isinstance(csp.cv1.act, nn.SiLU)

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


class TestDepthwise:
    @pytest.mark.parametrize(
        ("block", "args"),
        [
            ("ShuffleUnit", {"c_out": 8}), ("ShuffleDown", {"c_out": 8}),
            ("ShuffleStage", {"c_out": 8}), ("MixConv", {}), ("MixConvBlock", {"c_out": 8}),
            ("MixStage", {"c_out": 8}), ("GhostConv", {"c_out": 8}),
            ("GhostUnit", {"c_out": 8, "stride": 2}),
            ("OSA", {"c_out": 8, "depthwise": True}),
        ],
    )  # fmt: skip
    def test_is_depthwise(self, block: str, args: dict[str, Any]) -> None:
        spatial = [
            part for part in BLOCKS[block](8, **args).modules()
            if isinstance(part, nn.Conv2d) and part.kernel_size[0] > 1
        ]  # fmt: skip
        assert spatial
        for conv in spatial:
            assert conv.groups == conv.in_channels == conv.out_channels

    def test_dwconv_groups_are_the_greatest_common_divisor(self) -> None:
        assert BLOCKS["DWConv"](12, 8, 3).conv.groups == 4
        assert BLOCKS["DWConv"](8, 8, 3).conv.groups == 8


class TestShuffle:
    def test_permutation_by_hand(self) -> None:
        x = torch.arange(6.0).view(1, 6, 1, 1)
        assert channel_shuffle(x, 2).flatten().tolist() == [0, 3, 1, 4, 2, 5]
        assert channel_shuffle(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]

    def test_exported_form_is_the_same(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = torch.randn(2, 12, 3, 5)
        expected = channel_shuffle(x, 3)
        monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
        assert torch.equal(channel_shuffle(x, 3), expected)

    def test_keeps_channels_last(self) -> None:
        x = torch.randn(2, 8, 3, 5).to(memory_format=torch.channels_last)
        out = channel_shuffle(x, 2)
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(out, channel_shuffle(x.contiguous(), 2))

    def test_unit_mixes_both_halves_into_both(self) -> None:
        """Which input channels reach the two halves of the output, by gradient."""
        unit = BLOCKS["ShuffleUnit"](8, 8).eval()
        x = torch.randn(1, 8, 5, 5, requires_grad=True)
        out = unit(x)
        for half in (out[:, :4], out[:, 4:]):
            reached = torch.autograd.grad(half.sum(), x, retain_graph=True)[0].abs().sum((0, 2, 3))
            assert (reached[:4] > 0).any()
            assert (reached[4:] > 0).all()

    def test_even_channels_pass_and_come_first_in_the_authors_form(self) -> None:
        x = torch.arange(8.0).view(1, 8, 1, 1)
        out = BLOCKS["ShuffleUnit"](8, 8, shuffle="start").eval()(x)
        assert out.flatten()[:4].tolist() == [0, 2, 4, 6]

    def test_unit_passes_the_first_half_to_even_channels(self) -> None:
        unit = BLOCKS["ShuffleUnit"](8, 8).eval()
        x = torch.randn(2, 8, 5, 7)
        out = unit(x)
        assert torch.equal(out[:, ::2], x[:, :4])
        torch.testing.assert_close(out[:, 1::2], unit.branch(x[:, 4:]))

    def test_units_in_a_row_reach_almost_every_channel(self) -> None:
        """Untouched channels: of 8, 4 after one unit, 2 after two, 1 after three."""
        x = torch.randn(1, 8, 5, 5)
        for n, untouched in [(1, 4), (2, 2), (3, 1)]:
            out = BLOCKS["ShuffleStage"](8, 8, n).eval()(x)
            same = (out[0, :, None] == x[0, None]).flatten(2).all(-1)  # output by input channel
            assert same.sum() == untouched

    @pytest.mark.parametrize(("c_in", "c_out", "stride"), [(8, 8, 1), (8, 12, 2), (8, 8, 2)])
    def test_equals_torchvision(self, c_in: int, c_out: int, stride: int) -> None:
        reference = tv_shuffle.InvertedResidual(c_in, c_out, stride)
        own = (
            BLOCKS["ShuffleUnit"](c_in, c_out, act="ReLU") if stride == 1
            else BLOCKS["ShuffleDown"](c_in, c_out, act="ReLU")
        )  # fmt: skip
        assert_equal_to(reference, own, torch.randn(2, c_in, 9, 12))

    def test_official_widths(self) -> None:
        down = BLOCKS["ShuffleDown"](24, 116, official_widths=True)
        widths = [m.out_channels for m in down.modules() if isinstance(m, nn.Conv2d)]
        assert widths == [24, 24, 58, 58, 92]


class TestGhost:
    @pytest.mark.parametrize(("c_out", "ratio", "cheap"), [(12, 2, 3), (11, 2, 3), (10, 3, 5)])
    def test_module_equals_timm(self, c_out: int, ratio: int, cheap: int) -> None:
        reference = timm_ghost.GhostModule(
            6, c_out, kernel_size=3, ratio=ratio, dw_size=cheap, stride=2
        )
        own = BLOCKS["GhostModule"](6, c_out, 3, 2, ratio, cheap, "ReLU")
        assert_equal_to(reference, own, torch.randn(2, 6, 9, 12))

    @pytest.mark.parametrize(
        ("c_in", "hidden", "c_out", "kernel", "stride", "se"),
        [(8, 20, 8, 3, 1, 0.0), (8, 20, 12, 5, 2, 0.25), (8, 20, 12, 5, 1, 0.25),
         (8, 24, 8, 3, 1, 0.25), (8, 12, 8, 3, 2, 0.0)],
    )  # fmt: skip
    def test_unit_equals_timm(
        self, c_in: int, hidden: int, c_out: int, kernel: int, stride: int, se: float
    ) -> None:
        reference = timm_ghost.GhostBottleneck(
            c_in, hidden, c_out, dw_kernel_size=kernel, stride=stride, se_ratio=se
        )
        own = BLOCKS["GhostUnit"](c_in, c_out, kernel, stride, hidden, se, act="ReLU")
        assert_equal_to(reference, own, torch.randn(2, c_in, 9, 12))

    def test_module_parameters_by_hand(self) -> None:
        # primary 3 x 3 x 16 x 12 + BN, cheap 3 x 3 x 12 + BN: m = 24 / 2
        module = BLOCKS["GhostModule"](16, 24, 3)
        assert parameters(module) == 9 * 16 * 12 + 24 + 9 * 12 + 24

    def test_rounding_of_se(self) -> None:
        assert [round_channels(value, 4) for value in (30, 5, 18, 168, 1)] == [32, 8, 20, 168, 4]
        assert round_channels(11, 8) == 16  # 8 would be under 90 %


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
        own = BLOCKS["OSA"](
            c_in, 12, 3, 6, depthwise=depthwise, identity=identity, ese=ese, act="ReLU"
        )
        assert_equal_to(reference, own, torch.randn(2, c_in, 9, 12))

    def test_bottleneck_saves_parameters_as_counted_by_hand(self) -> None:
        # 1x1 8 -> 3, 3x3 3 -> 6, 1x1 6 -> 3, 3x3 3 -> 6, then 1x1 (8 + 12) -> 10, with BN each
        osa = BLOCKS["OSA"](8, 10, 2, 6, bottleneck=0.5)
        assert parameters(osa) == (24 + 6) + (162 + 12) + (18 + 6) + (162 + 12) + (200 + 20)

    def test_ese_by_hand(self) -> None:
        ese = BLOCKS["ESE"](2)
        with torch.no_grad():
            ese.fc.weight.copy_(torch.tensor([[1.0, 1.0], [0.0, -9.0]]).view(2, 2, 1, 1))
            ese.fc.bias.copy_(torch.tensor([0.5, 0.0]))
        x = torch.tensor([[[[1.0, 3.0]], [[0.0, 1.0]]]])  # means 2 and 0.5
        # gates: relu6(2 + 0.5 + 0.5 + 3) / 6 = 1, relu6(-4.5 + 3) / 6 = 0
        assert ese(x).flatten().tolist() == [1.0, 3.0, 0.0, 0.0]


class TestMixConv:
    def test_remainder_goes_to_the_first_part(self) -> None:
        assert split_channels(10, 3) == [4, 3, 3]
        assert split_channels(8, 2) == [4, 4]
        mix = BLOCKS["MixConv"](10, [3, 5, 7])
        assert [tuple(conv.weight.shape) for conv in mix.convs] == [
            (4, 1, 3, 3), (3, 1, 5, 5), (3, 1, 7, 7),
        ]  # fmt: skip

    @pytest.mark.parametrize("stride", [1, 2])
    def test_equals_timm(self, stride: int) -> None:
        reference = timm.layers.MixedConv2d(10, 10, [3, 5, 7], stride=stride, depthwise=True)
        own = BLOCKS["MixConv"](10, [3, 5, 7], stride, act=False).eval()
        for conv, other in zip(own.convs, reference.values(), strict=True):
            conv.load_state_dict(other.state_dict())
        own.bn.running_var.fill_(1 - own.bn.eps)
        x = torch.randn(2, 10, 9, 12)
        with torch.no_grad():
            torch.testing.assert_close(own(x), reference(x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize(
        ("c_out", "stride", "expand_kernel", "project_kernel", "kernels"),
        [(8, 1, 1, 1, [3, 5]), (12, 2, [1, 1], [1, 1], [3, 5, 7]), (8, 1, [1, 1], 1, [3])],
    )
    def test_block_equals_timm(
        self, c_out: int, stride: int, expand_kernel: Any, project_kernel: Any, kernels: list[int]
    ) -> None:
        reference = timm_efficient.InvertedResidual(
            8, c_out, dw_kernel_size=kernels if len(kernels) > 1 else kernels[0], stride=stride,
            exp_ratio=3.0, exp_kernel_size=expand_kernel, pw_kernel_size=project_kernel,
            act_layer=nn.SiLU,
            se_layer=lambda width, act_layer, **_: timm_efficient.SqueezeExcite(
                width, rd_channels=4, act_layer=act_layer
            ),
        )  # fmt: skip
        own = BLOCKS["MixConvBlock"](
            8, c_out, kernels, stride, 3, 0.5,
            expand_groups=2 if isinstance(expand_kernel, list) else 1,
            project_groups=2 if isinstance(project_kernel, list) else 1, act="SiLU",
        )  # fmt: skip
        x = torch.randn(2, 8, 9, 12)
        own.expand.conv.weight.data = joined(reference.conv_pw)
        own.project.conv.weight.data = joined(reference.conv_pwl)
        sources = [reference.conv_dw] if len(kernels) == 1 else reference.conv_dw.values()
        for conv, other in zip(own.mix.convs, sources, strict=True):
            conv.load_state_dict(other.state_dict())
        for bn, other in [(own.expand, reference.bn1), (own.mix, reference.bn2),
                          (own.project, reference.bn3)]:  # fmt: skip
            bn.bn.load_state_dict(other.state_dict())
            bn.bn.eps = other.eps
        own.se.reduce.load_state_dict(reference.se.conv_reduce.state_dict())
        own.se.expand.load_state_dict(reference.se.conv_expand.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(own.eval()(x), reference.eval()(x), rtol=1e-5, atol=1e-5)

    def test_se_is_as_wide_as_the_blocks_input_says(self) -> None:
        block = BLOCKS["MixConvBlock"](40, 40, [3, 5], expand=6, se=0.5)
        assert block.se.reduce.weight.shape[:2] == (20, 240)
        assert block.se.expand.weight.shape[:2] == (240, 20)
        assert isinstance(block.se.act, nn.SiLU)
        assert isinstance(block.se.gate, nn.Sigmoid)


def joined(conv: nn.Module) -> Tensor:
    """Weights of timm's split 1x1 convolutions as those of one grouped convolution."""
    parts: Sequence[nn.Module] = [conv] if isinstance(conv, nn.Conv2d) else list(conv.values())
    return torch.cat([part.weight.data for part in parts])


def test_se_by_hand() -> None:
    se = BLOCKS["SE"](2, reduced=1, act="ReLU")
    with torch.no_grad():
        se.reduce.weight.copy_(torch.tensor([[1.0, 2.0]]).view(1, 2, 1, 1))
        se.reduce.bias.fill_(-1.0)
        se.expand.weight.copy_(torch.tensor([[1.0], [0.0]]).view(2, 1, 1, 1))
        se.expand.bias.copy_(torch.tensor([0.0, 0.0]))
    x = torch.tensor([[[[1.0, 3.0]], [[0.0, 1.0]]]])  # means 2 and 0.5; inner 2 + 1 - 1 = 2
    gate = torch.sigmoid(torch.tensor(2.0)).item()
    assert se(x).flatten().tolist() == pytest.approx([gate, 3 * gate, 0.0, 0.5])


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

    @pytest.mark.parametrize(
        ("block", "c_in", "n", "by_hand"),
        [
            # 12 -> 8: 1x1 96 + BN 16. Chain 3x3: 8 -> 4 288 + 8, 4 -> 4 144 + 8.
            # Aggregation 1x1 of 8 + 4 + 4 = 16 -> 8: 128 + 16.
            ("OSAStage", 12, 2, 112 + 296 + 152 + 144),
            # two units of half 4: 1x1 16 + 8, depthwise 3x3 36 + 8, 1x1 16 + 8
            ("ShuffleStage", 8, 2, 2 * (24 + 44 + 24)),
            # one block of 8: expansion 8 -> 12 96 + 24; depthwise 6 * 9 + 6 * 25 + BN 24;
            # SE 12 -> 2 -> 12: 26 + 36; projection in two groups 12 * 8 / 2 + BN 16
            ("MixStage", 8, 1, 120 + 228 + 62 + 64),
        ],
    )
    def test_parameters_by_hand(self, block: str, c_in: int, n: int, by_hand: int) -> None:
        assert parameters(BLOCKS[block](c_in, 8, n)) == by_hand

    def test_mix_stage_uses_kernels_3_and_5(self) -> None:
        kernels = {m.kernel_size for m in BLOCKS["MixStage"](8, 8).modules()
                   if isinstance(m, nn.Conv2d)}  # fmt: skip
        assert kernels == {(1, 1), (3, 3), (5, 5)}

    @pytest.mark.parametrize("block", ["OSAStage", "MixStage"])
    def test_shortcut_is_honoured(self, block: str) -> None:
        x = torch.randn(1, 8, 5, 5)
        yes, no = BLOCKS[block](8, 8, 1, True).eval(), BLOCKS[block](8, 8, 1, False).eval()
        no.load_state_dict(yes.state_dict())
        with torch.no_grad():
            torch.testing.assert_close(yes(x), no(x) + x)


class TestRoute:
    def test_concat_keeps_the_order(self) -> None:
        a, b = torch.zeros(1, 2, 2, 2), torch.ones(1, 1, 2, 2)
        out = BLOCKS["Concat"]([2, 1])([a, b])
        assert out[0, :, 0, 0].tolist() == [0, 0, 1]

    def test_upsample_nearest_by_value(self) -> None:
        out = BLOCKS["Upsample"](1, None, 2, "nearest")(torch.tensor([[[[1.0, 2.0]]]]))
        assert out[0, 0].tolist() == [[1, 1, 2, 2], [1, 1, 2, 2]]

    def test_max_pool_ceil_mode(self) -> None:
        x = torch.arange(16.0).view(1, 1, 4, 4)
        assert BLOCKS["MaxPool"](1, 3, 2)(x).flatten().tolist() == [10]
        assert BLOCKS["MaxPool"](1, 3, 2, 0, True)(x).flatten().tolist() == [10, 11, 14, 15]

    def test_zero_pad_sides(self) -> None:
        out = BLOCKS["ZeroPad"](1, [0, 1, 0, 2])(torch.ones(1, 1, 1, 1))
        assert out[0, 0].tolist() == [[1, 0], [0, 0], [0, 0]]


class TestClassifierEnd:
    def test_the_pool_is_the_mean(self) -> None:
        x = torch.arange(12.0).view(1, 2, 2, 3)
        assert BLOCKS["GlobalPool"](2)(x).flatten().tolist() == [2.5, 8.5]

    def test_linear_by_hand(self) -> None:
        block = BLOCKS["Linear"](2, 1, act="ReLU")
        with torch.no_grad():
            block.linear.weight.copy_(torch.tensor([[2.0, -1.0]]))
            block.linear.bias.fill_(0.5)
        x = torch.tensor([[1.0, 0.0], [0.0, 3.0]])
        assert block(x).flatten().tolist() == [2.5, 0.0]
        assert block(x[..., None, None]).shape == (2, 1)

    def test_dropout_acts_in_training_alone(self) -> None:
        torch.manual_seed(0)
        block = BLOCKS["Linear"](1000, 4, bias=False, dropout=0.5)
        x = torch.ones(1, 1000)
        assert not torch.equal(block(x), block(x))
        assert torch.equal(block.eval()(x), block(x))


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
