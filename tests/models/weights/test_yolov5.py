"""Import of YOLOv5 checkpoints: the genuine one, and small ones made here in the same form."""

from __future__ import annotations

import copy
import operator
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models.builder import build_detector
from models.detector import Detector
from models.weights.yolov5 import Imported, read_yolov5, to_detector
from models.yaml.parser import load_spec, parse_spec
from utils.errors import UserError

# two levels, 8 and 16 channels after the width multiple
YAML: dict[str, Any] = {
    "nc": 2,
    "depth_multiple": 1.0,
    "width_multiple": 0.25,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C3", [32]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "BottleneckCSP", [64]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "SPPF", [64, 5]],
    ],
    "head": [[[4, 6], 1, "Detect", ["nc", "anchors"]]],
}
NAMES = ("cat", "dog")


class Model(nn.Module):
    """In a checkpoint: models.yolo.Model."""


class Row(nn.Module):
    """In a checkpoint: models.yolo.Detect."""


Model.__module__ = Row.__module__ = "models.yolo"
Row.__name__ = Row.__qualname__ = "Detect"


def small(**changes: Any) -> Detector:
    """A detector of YAML with random weights and statistics that are exact in half precision."""
    torch.manual_seed(0)
    model = build_detector(parse_spec({**YAML, **changes}, "test"), classes=2, names=NAMES)
    for value in model.state_dict().values():
        if value.is_floating_point():
            value.copy_((value + torch.rand_like(value) * 0.1).half())
    return model.eval()


def network(model: Detector, **changes: Any) -> Model:
    """The model as the original keeps it, in half precision; `changes` of its plain attributes."""
    rows = [copy.deepcopy(layer) for layer in model.layers]
    detect = Row()
    detect.register_buffer("anchors", model.head.anchors.clone())
    detect.stride = torch.tensor([float(s) for s in model.stride])
    detect.m = copy.deepcopy(model.head.m)
    result = Model()
    result.model = nn.Sequential(*rows[:-1], detect)
    result.yaml, result.names, result.nc = copy.deepcopy(YAML), list(NAMES), 2
    result.stride = detect.stride
    for key, value in changes.items():
        setattr(result, key, value)
    return result.half()


@pytest.fixture
def save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """torch.save with the original's module names; gives the file."""

    def run(content: Any, *, legacy: bool = False, models: str = "models") -> Path:
        path = tmp_path / "x.pt"
        monkeypatch.setitem(sys.modules, "models.yolo", types.ModuleType("models.yolo"))
        vars(sys.modules["models.yolo"]).update(Model=Model, Detect=Row)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the raw format looks for the classes' source text
            torch.save(content, path, _use_new_zipfile_serialization=not legacy)
        monkeypatch.delitem(sys.modules, "models.yolo")

        def renamed(data: bytes) -> bytes:
            data = data.replace(b"cmodels.blocks.conv\nConv\n", b"cmodels.common\nConv\n")
            data = data.replace(b"cmodels.", f"c{models}.".encode())
            assert f"c{models}.yolo\nModel\n".encode() in data
            return data

        if legacy:
            path.write_bytes(renamed(path.read_bytes()))
            return path
        with zipfile.ZipFile(path) as archive:
            members = {item: archive.read(item) for item in archive.namelist()}
        with zipfile.ZipFile(path, "w") as archive:
            for item, data in members.items():
                archive.writestr(item, renamed(data) if item.endswith(".pkl") else data)
        return path

    return run


@pytest.fixture(scope="module")
def genuine(shared: Path) -> Path:
    return shared / "weights" / "yolov5n.pt"


@pytest.fixture(scope="module")
def found(genuine: Path) -> Imported:
    return read_yolov5(genuine)


def test_plain_values_of_the_genuine_file(found: Imported) -> None:
    assert len(found.names) == 80
    assert (found.names[0], found.names[-1]) == ("person", "toothbrush")
    assert found.strides == (8, 16, 32)
    assert found.anchors.tolist() == [
        [[10, 13], [16, 30], [33, 23]],
        [[30, 61], [62, 45], [59, 119]],
        [[116, 90], [156, 198], [373, 326]],
    ]
    assert found.spec_yaml["activation"] == "SiLU"


def test_tensors_equal_the_bytes(genuine: Path, found: Imported) -> None:
    """Decoded by numpy from the members that the pickle's listing names.

    Not used: anchors in pixels, class weights, three cached grids, the strides twice.
    """
    with zipfile.ZipFile(genuine) as archive:
        stored = [name for name in archive.namelist() if "/data/" in name]
        stem = np.frombuffer(archive.read("archive/data/0"), "<f2").reshape(16, 3, 6, 6)
        anchors = np.frombuffer(archive.read("archive/data/342"), "<f2").reshape(3, 3, 2)
        variance = np.frombuffer(archive.read("archive/data/10"), "<f2")
    state = found.state_dict
    assert (len(state), len(stored)) == (349, 349 + 7)
    assert np.array_equal(state["model.0.conv.weight"].numpy(), stem.astype("f4"))
    assert np.array_equal(state["model.24.anchors"].numpy(), anchors.astype("f4"))
    assert np.array_equal(state["model.1.bn.running_var"].numpy(), variance.astype("f4"))
    assert {value.dtype for value in state.values()} == {torch.float32, torch.int64}


def test_detector_of_the_genuine_file(found: Imported) -> None:
    """The rows are those of the shipped model file."""
    model = to_detector(found)
    assert sum(p.numel() for p in model.parameters()) == 1_872_157
    assert (model.stride, model.names) == (found.strides, found.names)
    own = model.state_dict()
    assert set(found.state_dict) == set(own)
    assert all(torch.equal(own[name], found.state_dict[name]) for name in own)
    assert model.spec.source == "yolov5n.pt (model)"
    shipped = load_spec("yolov5n")
    rows = [(r.sources, r.repeats, r.block, dict(r.args)) for r in model.spec.layers]
    assert rows == [(r.sources, r.repeats, r.block, dict(r.args)) for r in shipped.layers]
    assert model.spec.anchors == shipped.anchors


def outputs(model: Detector) -> list[Tensor]:
    with torch.no_grad():
        return model.eval()(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    "form",
    [{}, {"legacy": True}, {"models": "yolov5.models"}],
    ids=["zip", "legacy", "PyPI package yolov5"],
)
def test_round_trip_computes_the_same(save, form: dict[str, Any]) -> None:
    model = small()
    content = {"epoch": 3, "model": network(model), "ema": None, "optimizer": None}
    found = to_detector(read_yolov5(save(content, **form)))
    own = model.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in found.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(outputs(found), outputs(model), strict=True))


def test_ema_is_preferred(save) -> None:
    averaged = network(small())
    nn.init.constant_(averaged.model[0].conv.weight, 0.5)
    found = read_yolov5(save({"model": network(small()), "ema": averaged}))
    assert found.source == "x.pt (ema)"
    assert found.state_dict["model.0.conv.weight"].unique().tolist() == [0.5]


def test_activation_comes_from_the_modules(save) -> None:
    """Files of v1-v6 do not name it: LeakyReLU(0.1) up to v3.0, SiLU since v4."""
    model = small(activation="nn.LeakyReLU(0.1)")
    imported = read_yolov5(save({"model": network(model)}))
    assert imported.spec_yaml["activation"] == "LeakyReLU(0.1)"
    found = outputs(to_detector(imported))
    assert all(torch.equal(a, b) for a, b in zip(found, outputs(model), strict=True))


def test_anchors_and_names_come_from_the_checkpoint(save) -> None:
    model = small()
    pixels = torch.tensor([[[8, 8], [16, 8], [8, 24]], [[64, 32], [32, 64], [96, 96]]]).float()
    model.head.set_anchors(pixels)
    imported = read_yolov5(save({"model": network(model, names={1: "zwei", 0: "eins"})}))
    found = to_detector(imported)
    assert torch.equal(imported.anchors, pixels)
    assert found.names == ("eins", "zwei")
    assert torch.equal(found.head.anchors * torch.tensor([8.0, 16]).view(-1, 1, 1), pixels)
    assert found.spec.anchors == ((8, 8, 16, 8, 8, 24), (64, 32, 32, 64, 96, 96))


def nested(value: Any, times: int, width: int) -> list[Any]:
    for _ in range(times):
        value = [value] * width
    return value


# fmt: off
SPOILT: dict[str, tuple[Callable[[Model], Any], str]] = {
    "missing tensor": (
        lambda m: setattr(m.model[0], "bn", nn.Identity()),
        r"5 missing \(model.0.bn.weight, .*a fused model"),
    "unknown tensor": (
        lambda m: m.model[0].register_buffer("extra", torch.zeros(1)), r"1 unknown \(model.0.extra\)"),
    "other shape": (
        lambda m: operator.setitem(m.model[-1].m, 0, nn.Conv2d(16, 24, 1)),
        r"of another shape \(model.7.m.0.weight 24x16x1x1 for 21x16x1x1"),
    "other epsilon": (
        lambda m: setattr(m.model[0].bn, "eps", 1e-5), "model.0.bn has eps 1e-05, built with 0.001"),
    "other stride": (
        lambda m: setattr(m.model[0].conv, "stride", (1, 1)),
        r"model.0.conv has stride \(1, 1\), built with \(2, 2\)"),
    "other activation": (
        lambda m: setattr(m.model[4], "act", nn.Hardswish()),
        "model.4.act is a torch.nn.modules.activation.Hardswish"),
    "names": (lambda m: setattr(m, "names", ["one"]), "1 class names, but nc is 2"),
    "no names": (lambda m: delattr(m, "names"), "no usable class names"),
    "no yaml": (lambda m: delattr(m, "yaml"), "no 'yaml'"),
    "endless yaml": (
        lambda m: m.yaml["backbone"].append(m.yaml["backbone"]), "not a table of plain values"),
    "wide yaml": (
        lambda m: m.yaml.update(head=nested(1, 8, 900)), "not a table of plain values"),
    "vast class count": (
        lambda m: setattr(m, "nc", nested(1, 60, 2)), "2 class names, but nc is a list"),
    "channels": (lambda m: m.yaml.update(ch=4), "4 image channels"),
    "unknown block": (
        lambda m: operator.setitem(m.yaml["backbone"][2], 2, "C3Unknown"), "C3Unknown"),
    "anchors": (
        lambda m: setattr(m.model[-1], "anchors", torch.zeros(2, 3, 2)), "anchors are not all over 0"),
    "anchors in pixels": (
        lambda m: m.model[-1].register_buffer("anchor_grid", m.model[-1].anchors.view(2, 1, 3, 1, 1, 2)),
        "anchor_grid is not anchors times stride"),
    "stride": (
        lambda m: setattr(m.model[-1], "stride", torch.tensor([8.0, 12.5])), "no usable 'stride'"),
    "wrong stride": (
        lambda m: setattr(m.model[-1], "stride", torch.tensor([8.0, 32.0])),
        r"strides \(8, 32\), but the rows give \(8, 16\)"),
    "no detector": (lambda m: setattr(m, "model", m.model[:-1]), "expected models.yolo.Detect"),
    "own child": (lambda m: setattr(m.model[0], "again", m.model[0]), "damaged .RecursionError"),
    "no module": (lambda m: operator.setitem(m._modules, "model", {}), "odd _modules of a models.yolo.Model"),
}
# fmt: on


@pytest.mark.parametrize(("spoil", "cause"), SPOILT.values(), ids=SPOILT)
def test_a_model_that_does_not_fit_is_refused(save, spoil, cause) -> None:
    model = network(small())
    spoil(model)
    path = save({"model": model})
    with pytest.raises(UserError, match=cause) as caught:
        to_detector(read_yolov5(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ({"model": {"0.weight": torch.zeros(1)}}, r"contains no detector, .*\(found: model\)"),
        ([torch.zeros(1)], "found: list"),
        ({"model": nn.Linear(1, 1)}, "model is a torch.nn.modules.linear.Linear, expected"),
    ],
)
def test_other_checkpoints_are_distinguished(tmp_path: Path, content: Any, cause: str) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(UserError, match=cause):
        read_yolov5(tmp_path / "x.pt")
