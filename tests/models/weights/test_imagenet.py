"""ImageNet weights reach the layers they belong to: the taps are those of the reference.

The references have random weights; nothing is downloaded.  The reports are printed (pytest -s).
"""

from __future__ import annotations

import random
import re
import sys
from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor, nn

from engine.checkpoint import load_detector, model_payload, save_checkpoint
from models.builder import build_detector
from models.detector import Detector
from models.weights.imagenet import IMAGENET, Transfer, plan_transfer
from models.weights.sources import Source, read_source, source_of_module, source_of_tensors
from models.yaml.parser import load_spec
from tests.models.blocks.references import OfficialShuffleNetV2, calibrate, make_images, randomise
from utils.errors import UserError

TOLERANCE = 1e-4  # times max(1, largest value of the reference)
HALF = ((0.5, 0.4, 0.6), (0.3, 0.2, 0.25))  # a normalisation that no library has
GHOST = ("blocks.2", "blocks.4", "blocks.6", "blocks.8")
VOV = ("stages.0", "stages.1", "stages.2", "stages.3")
RESNET = ("layer1", "layer2", "layer3", "layer4")
MIXNET = ("blocks.1", "blocks.2", "blocks.4", "blocks.5")
# fmt: off
# a reference, and its modules whose outputs are P2 to P5
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "ghostnet-0.5": (partial(timm.create_model, "ghostnet_050"), GHOST),
    "ghostnetv2-1.0": (partial(timm.create_model, "ghostnetv2_100"), GHOST),
    "vovnet-39": (partial(timm.create_model, "vovnet39a"), VOV),
    "vovnetv2-19-slim": (partial(timm.create_model, "ese_vovnet19b_slim"), VOV),
    "shufflenetv2-0.5-tv": (
        torchvision.models.shufflenet_v2_x0_5, ("maxpool", "stage2", "stage3", "stage4")),
    "mixnet-s": (partial(timm.create_model, "mixnet_s"), MIXNET),
    "resnet-18": (torchvision.models.resnet18, RESNET),
    "resnet-50": (partial(timm.create_model, "resnet50"), RESNET),
    "densenet-121": (
        torchvision.models.densenet121,
        ("features.denseblock1", "features.denseblock2", "features.denseblock3", "features")),
    "mobilenetv2-1.0": (
        torchvision.models.mobilenet_v2,
        ("features.3", "features.6", "features.13", "features.17")),
    "mobilenetv3-small": (
        torchvision.models.mobilenet_v3_small,
        ("features.1", "features.3", "features.8", "features.11")),
    # its BN has another epsilon than the paper's, which ours has
    "mobilenetv3-large": (partial(timm.create_model, "mobilenetv3_large_100"), MIXNET),
}
LARGE = ("vovnet-39", "resnet-50", "mobilenetv3-large")  # a smaller one of the family runs always


# fmt: on
def detector(backbone: str) -> Detector:
    return build_detector(load_spec("yolov5n", backbone=backbone), classes=2).eval()


def sample_images(seed: int, count: int = 2) -> Tensor:
    return make_images(count, (64, 64), seed)


def normalised(images: Tensor, values: tuple[tuple[float, ...], ...]) -> Tensor:
    return torchvision.transforms.functional.normalize(images, *values)


def prepared(net: nn.Module, values: tuple[tuple[float, ...], ...] = IMAGENET) -> nn.Module:
    """Random weights of unit gain, BN calibrated: an untrained net hardly looks at its input."""
    randomise(net)
    calibrate(net, [normalised(sample_images(1, 6), values)])
    return net


def reference_taps(net: nn.Module, names: tuple[str, ...], images: Tensor) -> list[Tensor]:
    kept: dict[str, Tensor] = {}
    for name in names:
        net.get_submodule(name).register_forward_hook(
            lambda _part, _inputs, output, name=name: kept.__setitem__(name, output.clone())
        )
    with torch.no_grad():
        net(images)
    # torchvision's DenseNet applies the last ReLU outside of `features`
    return [kept[name].relu() if name == "features" else kept[name] for name in names]


def difference(model: Detector, expected: list[Tensor], images: Tensor) -> float:
    """The largest relative difference of the taps P2..P5."""
    with torch.no_grad():
        found = model.eval().taps(images)
    levels = [found[name] for name in ("P2", "P3", "P4", "P5")]
    return max(
        ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()
        for a, b in zip(levels, expected, strict=True)
    )


def state_of_backbone(model: Detector) -> dict[str, Tensor]:
    rows = [i for i, layer in enumerate(model.spec.layers) if layer.section == "backbone"]
    return {
        key: value
        for key, value in model.state_dict().items()
        if key.startswith(tuple(f"model.{row}." for row in rows))
    }


def transferred(backbone: str, source: Source, **flags: bool) -> tuple[Detector, Transfer]:
    model = detector(backbone)
    plan = plan_transfer(model, source)
    plan.apply(model, **flags)
    return model, plan


@pytest.mark.parametrize(
    "backbone",
    [pytest.param(x, marks=[pytest.mark.slow] * (x in LARGE)) for x in FAMILIES],
)
def test_taps_equal_the_reference_from_module_and_files(backbone, tmp_path):
    build, names = FAMILIES[backbone]
    reference = prepared(build(), HALF)
    images = sample_images(9)
    expected = reference_taps(reference, names, normalised(images, HALF))
    model = detector(backbone)
    assert difference(model, expected, images) > 0.05
    plan = plan_transfer(model, source_of_module(f"random {backbone}", reference, HALF))
    sys.stdout.write(f"\n{plan.text()}\n")
    assert plan.share == 1.0
    assert not plan.missing
    assert not plan.unfit
    plan.apply(model)
    assert difference(model, expected, images) <= TOLERANCE
    assert model.spec.normalisation == HALF
    model.set_normalisation(*IMAGENET)
    assert difference(model, expected, images) > TOLERANCE  # the normalisation matters
    # the same weights from files, which know no order of execution
    state, filled = reference.state_dict(), state_of_backbone(model)
    wanted = {key: value.clone() for key, value in filled.items()}
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, tmp_path / "a.pth")
    safetensors.torch.save_file(
        {key: value.contiguous() for key, value in state.items()}, tmp_path / "a.safetensors"
    )
    for name in ("a.pth", "a.safetensors"):
        for value in filled.values():
            value.fill_(1)
        plan = plan_transfer(model, read_source(str(tmp_path / name)))
        plan.apply(model)
        assert plan.share == 1.0
        assert not plan.unfit
        for key, value in filled.items():
            assert torch.equal(value, wanted[key]), f"{name}: {key}"


def moved(first: str, before: str) -> Callable[[list[str]], list[str]]:
    """The keys of a module in front of another one's."""

    def move(keys: list[str]) -> list[str]:
        part = [key for key in keys if key.startswith(f"{first}.")]
        rest = [key for key in keys if key not in part]
        at = next(i for i, key in enumerate(rest) if key.startswith(f"{before}."))
        return [*rest[:at], *part, *rest[at:]]

    return move


def test_the_authors_shufflenet_registers_its_branches_the_other_way_round():
    """Only their names tell in a file that `branch_proj` runs first."""
    reference = prepared(OfficialShuffleNetV2("0.5"))
    images = sample_images(9)
    taps = ("pool", "stages.0", "stages.1", "stages.2")
    expected = reference_taps(reference, taps, normalised(images, IMAGENET))
    state = reference.state_dict()
    keys = list(state)
    for unit in ("stages.0.0", "stages.1.0", "stages.2.0"):
        keys = moved(f"{unit}.branch_main", before=f"{unit}.branch_proj")(keys)
    source = source_of_tensors("a.pth", {key: state[key] for key in keys})
    model, plan = transferred("shufflenetv2-0.5", source)
    assert plan.share == 1.0
    assert difference(model, expected, images) <= TOLERANCE


@pytest.mark.parametrize(
    ("backbone", "name", "found"),
    [
        ("shufflenetv2-0.5", "stage2.0.branch2.0", "shuffle: end, .* has start"),
        ("shufflenetv2-0.5-tv", "features.0.branch_main.0", "shuffle: start, .* has end"),
        ("vovnet-39", "stage4.OSA4_2", "identity: True, .* has False"),
        ("vovnet-39-identity", "stages.2.blocks.1.conv_mid.0", "identity: False, .* True"),
    ],
)
def test_the_other_form_of_equal_shapes_is_refused(backbone, name, found):
    """A name of its layers gives it away."""
    source = source_of_tensors("w.pth", {f"{name}.weight": torch.zeros(4, 3, 1, 1)})
    with pytest.raises(UserError, match=found):
        plan_transfer(detector(backbone), source)


def test_another_family_is_refused_and_changes_nothing():
    model = detector("resnet-18")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    plan = plan_transfer(model, source_of_module("timm:mixnet_s", timm.create_model("mixnet_s")))
    with pytest.raises(UserError, match=r"timm:mixnet_s: 0\.0 % .* under 95%.*--allow-partial"):
        plan.apply(model)
    with pytest.raises(UserError, match="would be loaded"):  # nothing is not a part
        plan.apply(model, allow_partial=True)
    assert model.spec.normalisation is None
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_a_part_is_refused_unless_allowed_and_the_rest_stays():
    """ResNet-18 without its third stage: what fits in order goes in, on both sides of the gap."""
    reference = torchvision.models.resnet18()
    state = {k: v for k, v in reference.state_dict().items() if not k.startswith("layer3.")}
    model = detector("resnet-18")
    before = {key: value.clone() for key, value in state_of_backbone(model).items()}
    plan = plan_transfer(model, source_of_tensors("part.pth", state))
    assert plan.share == pytest.approx(1 - 2_099_712 / 11_176_512)
    (row,) = [line for line in plan.text().splitlines() if line.startswith("  P4 ")]
    assert row.split() == ["P4", "-", "25", "tensors,", "2,099,712", "-"]
    with pytest.raises(UserError, match=r"81\.2 %"):
        plan.apply(model)
    plan.apply(model, allow_partial=True)
    taps, after = model.spec.taps(), state_of_backbone(model)
    for key, value in after.items():
        row = int(key.split(".")[1])
        if taps["P3"] < row <= taps["P4"]:
            assert torch.equal(value, before[key]), key
    (first, *_) = (v for k, v in after.items() if k.startswith(f"model.{taps['P4'] + 1}."))
    assert torch.equal(first, state["layer4.0.conv1.weight"])


def test_other_padding_is_told_and_the_epsilon_taken():
    """TensorFlow's form of MixNet pads to one side, which no backbone here does."""
    source = source_of_module("x", timm.create_model("tf_mixnet_s"))
    model, plan = transferred("mixnet-s", source)
    (line,) = [item for item in plan.text().splitlines() if "different here" in item]
    assert "padding: 0.conv (0, 0), here (1, 1), 2.mix.convs.0" in line
    norms = [part for part in model.layers[0].modules() if isinstance(part, nn.BatchNorm2d)]
    assert {part.eps for part in norms} == {1e-3}
    assert model.spec.layers[0].norm == (1e-3, 0.1)


def test_unfit_and_missing_are_told_apart():
    """One convolution of another shape, one BN left out: named, and the rest is loaded."""
    state = dict(torchvision.models.resnet18().state_dict())
    state["layer1.0.conv1.weight"] = torch.zeros(32, 64, 3, 3)
    for key in [key for key in state if key.startswith("layer2.0.bn1.")]:
        del state[key]
    plan = plan_transfer(detector("resnet-18"), source_of_tensors("x.pth", state))
    ((ours, theirs),) = plan.unfit
    assert ours.shape("weight") == (64, 64, 3, 3)
    assert theirs.name == "layer1.0.conv1"
    (missing,) = plan.missing
    assert missing.signature[0] == "normalisation"
    assert missing.parameters == 256
    assert [leaf.name for leaf in plan.unused] == ["fc"]
    assert "64x64x3x3, not 32x64x3x3 of layer1.0.conv1" in plan.text()


@pytest.mark.parametrize(
    ("order", "named"),
    [
        (lambda keys: random.Random(0).sample(keys, len(keys)), ""),
        (moved("layer1.1", before="layer1.0"), r"layer1\.0.*"),
        (moved("layer3.0", before="layer2.0"), ""),
    ],
)
def test_files_in_another_order_are_refused(order, named):
    state = torchvision.models.resnet18().state_dict()
    with pytest.raises(UserError, match=f"{named} is not where a network has it, so the file's"):
        source_of_tensors("x.pth", {key: state[key] for key in order(list(state))})


def test_safetensors_of_unknown_names_are_refused():
    state = {"alpha.weight": torch.zeros(4, 3, 3, 3), "omega.weight": torch.zeros(4, 4, 3, 3)}
    with pytest.raises(UserError, match="alpha, omega is not known"):
        source_of_tensors("x.safetensors", state, ordered=False)


def test_a_linear_layer_fills_a_1x1_convolution():
    """SE of linear layers, as some authors write it."""
    state = dict(timm.create_model("ghostnet_050").state_dict())
    for key, value in state.items():
        if re.search(r"\.se\..*weight", key):
            state[key] = value.flatten(1)
    _, plan = transferred("ghostnet-0.5", source_of_tensors("x.pth", state))
    assert plan.share == 1.0


def test_timm_by_name(monkeypatch):
    net = timm.create_model("ghostnet_050")
    net.pretrained_cfg = {"mean": HALF[0], "std": HALF[1]}
    create = mock.Mock(return_value=net)
    monkeypatch.setattr(timm, "create_model", create)
    source = read_source("timm:ghostnet_050.in1k")
    create.assert_called_once_with("ghostnet_050.in1k", pretrained=True)
    assert source.normalisation == HALF
    assert transferred("ghostnet-0.5", source)[1].share == 1.0


def test_timm_without_network_without_name_without_package(monkeypatch):
    with pytest.raises(UserError, match="no model 'ghostnet_10'; did you mean 'ghostnet_"):
        read_source("timm:ghostnet_10")
    offline = mock.Mock(side_effect=OSError("no route to host"))
    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match=r"the weights \(OSError: no route to host.*a file"):
        read_source("timm:ghostnet_100")
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match="pip install timm"):
        read_source("timm:ghostnet_100")


def test_a_network_that_cannot_run_is_refused():
    with pytest.raises(UserError, match="cannot run on an image of 64 px"):
        source_of_module("x", nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(5, 6)))


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("a.pth", {"epoch": 3}, "no tensors by name"),
        ("a.pt", [torch.zeros(3)], "no tensors by name"),
        ("a.pth", nn.Conv2d(3, 4, 1), r"tensors \(it contains other objects, or is damaged\)"),
        ("a.safetensors", b"none", r"not a \.safetensors file"),
        ("a.pth", None, "does not exist"),
        ("a" * 300 + ".pth", None, "File name too long"),
        ("ghostnet_100", None, r"timm:NAME or a file of \.pth"),
    ],
)
def test_files_without_tensors(tmp_path, file, content, message):
    if isinstance(content, bytes):
        (tmp_path / file).write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / file)
    with pytest.raises(UserError, match=message):
        read_source(str(tmp_path / file))


def test_a_whole_detector_is_refused(tmp_path):
    save_checkpoint(tmp_path / "own.pt", model_payload(detector("resnet-18")))
    with pytest.raises(UserError, match="give it as --weights"):
        read_source(str(tmp_path / "own.pt"))


def test_weights_that_are_not_finite_are_refused():
    net = torchvision.models.resnet18()
    with torch.no_grad():
        net.layer2[0].conv1.weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(UserError, match=r"layer2\.0\.conv1\.weight is not finite"):
        transferred("resnet-18", source_of_module("x", net))


def test_the_models_own_normalisation_serves_files(tmp_path):
    file = tmp_path / "m.yaml"
    file.write_text(
        "extends: yolov5n.yaml\nnormalisation: {mean: [0.5, 0.4, 0.6], std: [0.3, 0.2, 0.25]}\n"
    )
    model = build_detector(load_spec(str(file), backbone="resnet-18"), classes=2)
    plan = plan_transfer(model, source_of_tensors("x", torchvision.models.resnet18().state_dict()))
    assert plan.normalisation == HALF


def test_checkpoints_keep_normalisation_and_epsilon(tmp_path):
    reference = prepared(timm.create_model("mobilenetv3_large_100"), HALF)
    model, plan = transferred("mobilenetv3-large", source_of_module("x", reference, HALF))
    assert "epsilon 1e-05" in plan.text()
    save_checkpoint(tmp_path / "best.pt", model_payload(model))
    loaded = load_detector(tmp_path / "best.pt", device="cpu")
    assert loaded.spec.normalisation == HALF
    model.to(memory_format=torch.channels_last)  # as loaded, so that both run the same kernels
    images = sample_images(5)
    with torch.no_grad():
        for name, value in model.taps(images).items():
            assert torch.equal(loaded.taps(images)[name], value), name
        for found, expected in zip(loaded(images), model(images), strict=True):
            assert torch.equal(found, expected)
