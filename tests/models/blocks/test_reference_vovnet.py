"""VoVNet and VoVNetV2 against timm; the authors' VoVNetV2 against a definition of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import timm.models.vovnet as timm_vovnet
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from models.blocks.osa import OSA
from models.builder import build_classifier
from models.yaml.parser import load_classifier

TIMM_TAPS = ["stages.0", "stages.1", "stages.2", "stages.3"]
MODULES = {"19": (1, 1, 1, 1), "39": (1, 1, 2, 2), "57": (1, 1, 4, 3), "99": (1, 3, 9, 3)}
SLOW = pytest.mark.slow


def timm_reference(name: str, **changes: Any) -> nn.Module:
    """timm's class on one of its configurations, changed where it has no such name."""
    return timm_vovnet.VovNet(dict(timm_vovnet.model_cfgs[name], **changes))


def osa_modules(net: nn.Module) -> list[OSA]:
    return [part for part in net.modules() if isinstance(part, OSA)]


def without_last_relu(net: nn.Module) -> None:
    osa_modules(net)[-1].aggregate.act = nn.Identity()


def other_identity(net: nn.Module) -> None:
    """The other published form of V1: identity on the last module of stage 5."""
    last = osa_modules(net)[-1]
    last.identity = not last.identity


def without_last_ese(net: nn.Module) -> None:
    osa_modules(net)[-1].ese = nn.Identity()


def ese_in_last_modules_only(net: nn.Module) -> None:
    """timm's form of VoVNetV2, with the weights of the authors'."""
    *_, before, _ = osa_modules(net)
    before.ese = nn.Identity()


@pytest.mark.parametrize(
    ("scale", "reference", "changes", "params", "macs", "mutate", "reference_name"),
    [
        (
            "27-slim", "vovnet39a",
            {"stage_conv_chs": [64, 80, 96, 112], "stage_out_chs": [128, 256, 384, 512],
             "block_per_stage": [1, 1, 1, 1]},
            3_525_736, 2_176_695_296, without_last_relu, "timm VovNet, configured as 27-slim",
        ),
        pytest.param("39", "vovnet39a", {}, 22_600_296, 7_072_227_328, other_identity,
                     "timm vovnet39a", marks=SLOW),
        pytest.param("57", "vovnet57a", {}, 36_640_296, 8_930_144_256, other_identity,
                     "timm vovnet57a", marks=SLOW),
        pytest.param("39-identity", "vovnet39a", {"residual": True}, 22_600_296, 7_072_227_328,
                     other_identity, "timm vovnet39a, residual=True", marks=SLOW),
        pytest.param("57-identity", "vovnet57a", {"residual": True}, 36_640_296, 8_930_144_256,
                     other_identity, "timm vovnet57a, residual=True", marks=SLOW),
    ],
    ids=["27-slim", "39", "57", "39-identity", "57-identity"],
)  # fmt: skip
def test_vovnet_equals_its_reference(
    prove: Callable[..., None],
    scale: str,
    reference: str,
    changes: dict[str, Any],
    params: int,
    macs: int,
    mutate: Callable[[nn.Module], None],
    reference_name: str,
) -> None:
    prove(
        f"vovnet-{scale}", timm_reference(reference, **changes), params=params, macs=macs,
        taps=TIMM_TAPS, mutate=mutate, reference_name=reference_name,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("scale", "params", "macs", "mutate"),
    [
        ("19-slim", 3_166_136, 1_680_214_784, without_last_ese),
        pytest.param("19", 11_205_416, 4_121_937_920, without_last_ese, marks=SLOW),
        pytest.param("39", 24_568_936, 7_074_193_408, other_identity, marks=SLOW),
        pytest.param("57", 38_608_936, 8_932_110_336, other_identity, marks=SLOW),
        pytest.param("99", 63_199_272, 16_488_214_528, other_identity, marks=SLOW),
    ],
    ids=["19-slim", "19", "39", "57", "99"],
)
def test_vovnetv2_equals_its_reference(
    prove: Callable[..., None],
    scale: str,
    params: int,
    macs: int,
    mutate: Callable[[nn.Module], None],
) -> None:
    size, _, slim = scale.partition("-")
    name = f"ese_vovnet{size}b" + ("_slim" if slim else "")
    prove(
        f"vovnetv2-{scale}", timm_reference(name), params=params, macs=macs, taps=TIMM_TAPS,
        mutate=mutate, reference_name=f"timm {name}",
    )  # fmt: skip


class OriginalModule(nn.Module):
    """The authors' OSA module: eSE in every one, identity but in a stage's first."""

    def __init__(self, c_in: int, middle: int, c_out: int, layers: int, identity: bool) -> None:
        super().__init__()
        self.identity = identity
        widths = [c_in] + [middle] * layers
        self.chain = nn.ModuleList(conv_bn_relu(a, b, 3, 1) for a, b in itertools.pairwise(widths))
        self.concat = conv_bn_relu(sum(widths), c_out, 1, 1)
        self.gate = nn.Conv2d(c_out, c_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        maps = [x]
        for conv in self.chain:
            maps.append(conv(maps[-1]))
        y = self.concat(torch.cat(maps, dim=1))
        y = y * F.relu6(self.gate(F.adaptive_avg_pool2d(y, 1)) + 3.0) / 6.0
        return y + x if self.identity else y


class OriginalVoVNetV2(nn.Module):
    """VoVNetV2 as the authors' code has it, with a classifier; plain torch."""

    def __init__(self, modules: tuple[int, ...], layers: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            conv_bn_relu(3, 64, 3, 2), conv_bn_relu(64, 64, 3, 1), conv_bn_relu(64, 128, 3, 2)
        )
        self.stages = nn.ModuleList()
        width = 128
        for count, middle, out in zip(
            modules, (128, 160, 192, 224), (256, 512, 768, 1024), strict=True
        ):
            stage = nn.Sequential()
            for index in range(count):
                stage.append(OriginalModule(width, middle, out, layers, index > 0))
                width = out
            self.stages.append(stage)
        self.fc = nn.Linear(width, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for index, stage in enumerate(self.stages):
            if index:
                x = F.max_pool2d(x, 3, 2, ceil_mode=True)
            x = stage(x)
        return self.fc(x.mean(dim=(2, 3)))


def conv_bn_relu(c_in: int, c_out: int, kernel: int, stride: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, bias=False),
        nn.BatchNorm2d(c_out),
        nn.ReLU(),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "params", "macs"),
    [
        ("39", 26_209_128, 7_075_831_808),
        ("57", 42_479_912, 8_935_976_960),
        ("99", 70_548_520, 16_495_554_560),
    ],
)
def test_original_vovnetv2_equals_its_reference(
    prove: Callable[..., None], size: str, params: int, macs: int
) -> None:
    prove(
        f"vovnetv2-{size}-original", OriginalVoVNetV2(MODULES[size], 5), params=params, macs=macs,
        taps=["stages.0", "stages.1", "stages.2", "stages.3"], mutate=ese_in_last_modules_only,
        reference_name="plain torch, independent of the blocks",
    )  # fmt: skip


def test_original_reference_agrees_with_timm_where_the_forms_are_one() -> None:
    """VoVNetV2-19 has one module per stage: the definition above must equal timm's net."""
    one, other = OriginalVoVNetV2(MODULES["19"], 3), timm_reference("ese_vovnet19b")
    for kind in (nn.Conv2d, nn.BatchNorm2d, nn.Linear):
        pairs = [[part for part in net.modules() if isinstance(part, kind)] for net in (one, other)]
        for own, timms in zip(*pairs, strict=True):
            own.load_state_dict(timms.state_dict())
    x = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(one.eval()(x), other.eval()(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(32, 64), (96, 160), (224, 416), (640, 1312)])
def test_taps_have_exact_strides_at_multiples_of_32(height: int, width: int) -> None:
    """Max-pooling 3x3/2 in ceil mode without padding halves every even map exactly."""
    with torch.device("meta"):
        net = build_classifier(load_classifier("vovnet-27-slim")).eval()
        taps = net.taps(torch.empty(1, 3, height, width))
    for stride, name in ((4, "P2"), (8, "P3"), (16, "P4"), (32, "P5")):
        assert taps[name].shape[2:] == (height // stride, width // stride)
