"""Checkpoints: complete or absent, plain values only, by their kind, never loaded in part."""

import collections
import enum
import io
import os
import pickle
import resource
import signal
import socket
import subprocess
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data.loading.workers import dead_workers_named
from engine import checkpoint
from engine.checkpoint import (
    load_checkpoint,
    load_detector,
    model_payload,
    save_checkpoint,
    strip_checkpoint,
    transfer,
)
from models.builder import build_detector
from models.yaml.parser import parse_spec
from utils.environment import run_environment
from utils.errors import FeatherDetError, TerminatedError, UserError
from utils.files import TEMPORARY

YAML: dict[str, Any] = {
    "width_multiple": 0.25,
    "anchors": [[10, 13, 16, 30, 33, 23], [30, 61, 62, 45, 59, 119]],
    "backbone": [
        [-1, 1, "Conv", [32, 6, 2, 2]],
        [-1, 1, "Conv", [32, 3, 2]],
        [-1, 1, "C3", [32]],
        [-1, 1, "Conv", [64, 3, 2]],
        [-1, 1, "Conv", [64, 3, 2]],
    ],
    "head": [[[3, 4], 1, "Detect", ["nc", "anchors"]]],
}


def small(classes=2, **changes):
    torch.manual_seed(classes)
    names = [f"class {index}" for index in range(classes)]
    return build_detector(parse_spec({**YAML, **changes}, "test"), classes=classes, names=names)


def saved(path, model, **more):
    save_checkpoint(path, {**model_payload(model), **more})
    return path


def in_child(work):
    """Do `work` in a forked process, as a training run that dies; its exit code or -signal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of forking with threads: the child uses none of them
        process = os.fork()
    if process == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def die(*_, **__):
    """What the kernel does when memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def test_round_trip(tmp_path):
    base = torch.arange(6.0).view(2, 3)
    payload = {
        "tensors": {"a": base, "b": base.half(), "c": base.T, "d": torch.tensor(True)},
        "parameter": torch.nn.Parameter(base),
        "part": torch.zeros(1_000_000)[:10],
        "list": [1, 2.5, "text", None, True, (1, [2])],
        3: {"deep": collections.OrderedDict(x=1)},
        "version": torch.__version__,  # a subclass of str, as the next is of float
        "score": np.float64(0.25),
    }
    path = tmp_path / "x.pt"
    save_checkpoint(path, payload)
    assert path.stat().st_size < 20_000  # the part of the large tensor is stored alone
    found = load_checkpoint(path)
    assert torch.load(path, weights_only=True).keys() == found.keys()
    assert found.pop("format") == "featherdet-1"
    assert found.keys() == payload.keys()
    for name, value in payload["tensors"].items():
        assert torch.equal(found["tensors"][name], value)
        assert found["tensors"][name].dtype == value.dtype
    assert type(found["parameter"]) is Tensor
    assert torch.equal(found["parameter"], base)
    assert found["list"] == payload["list"]
    assert type(found[3]["deep"]) is dict
    assert found[3] == {"deep": {"x": 1}}
    assert (type(found["version"]), type(found["score"])) == (str, float)
    assert found["score"] == 0.25


@pytest.mark.parametrize(
    ("value", "cause"),
    [
        ({"a": [0, {"b": Path("x")}]}, r"checkpoint\.top\.a\.1\.b is a PosixPath"),
        ({"a": {1, 2}}, r"checkpoint\.top\.a is a set"),
        (np.zeros(2), r"checkpoint\.top is a ndarray"),
        ([np.float32(1)], r"checkpoint\.top\.0 is a float32"),
        ({(1, 2): 0}, r"checkpoint\.top has a tuple as a key"),
        (torch.nn.Linear(1, 1), r"checkpoint\.top is a Linear"),
        (enum.Enum("E", "a").a, r"checkpoint\.top is a E"),
        (torch.zeros(2).to_sparse(), r"checkpoint\.top is a tensor without plain values"),
        (torch.zeros(2, device="meta"), r"checkpoint\.top is a tensor without plain values"),
    ],
)
def test_other_values_are_named(tmp_path, value, cause):
    with pytest.raises(TypeError, match=cause):
        save_checkpoint(tmp_path / "x.pt", {"top": value})
    assert list(tmp_path.iterdir()) == []


VALUES = 30_000  # so few that torch starts no threads, which a forked process lacks


def save_epoch(path: Path, epoch: int) -> None:
    save_checkpoint(path, {"epoch": epoch, "w": torch.full((VALUES,), float(epoch))})


def open_and_write_half(path: Path, mode: str) -> Any:
    class Half(io.FileIO):
        def write(self, content: Any) -> int:
            super().write(content[: len(content) // 2])
            die()
            return 0

    return Half(path, mode.replace("b", ""))


@pytest.mark.parametrize(
    ("owner", "name", "replacement"),
    [(Path, "open", open_and_write_half), (os, "fsync", die), (Path, "replace", die)],
    ids=["half", "before the disk", "before the name"],
)
def test_c4_kill_half_way_in_the_write(tmp_path, owner, name, replacement):
    def work() -> None:
        setattr(owner, name, replacement)
        save_epoch(path, 2)

    path = tmp_path / "last.pt"
    save_epoch(path, 1)
    assert in_child(work) == -signal.SIGKILL
    (temporary,) = tmp_path.glob(TEMPORARY)  # a run removes it, see test_resume
    assert temporary.stat().st_size > 0  # the write had really begun
    found = load_checkpoint(path)
    assert found["epoch"] == 1
    assert torch.equal(found["w"], torch.ones(VALUES))
    save_epoch(path, 2)
    assert load_checkpoint(path)["epoch"] == 2


def test_c5_write_fails(tmp_path):
    path = tmp_path / "last.pt"
    save_epoch(path, 1)
    before = path.read_bytes()

    def work():
        for limit in (1, 1000, len(before) // 2, len(before) - 1):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            with pytest.raises(UserError) as caught:
                save_epoch(path, 2)
            message = f"{path}: could not be written (File too large); the previous file is intact"
            assert str(caught.value) == message
            assert path.read_bytes() == before
            assert list(tmp_path.iterdir()) == [path]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        save_epoch(path, 3)

    assert in_child(work) == 0
    assert load_checkpoint(path)["epoch"] == 3


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt, None),
        (RuntimeError("not on this device"), RuntimeError, "not on this device"),
        # torch raises this wherever the program is at that moment
        (
            RuntimeError("DataLoader worker (pid 7) is killed"),
            FeatherDetError,
            "a loader process died",
        ),
    ],
)
def test_what_interrupts_a_write_is_not_a_write_error(
    tmp_path, monkeypatch, error, expected, message
):
    def interrupted(*_: Any) -> None:
        raise error

    path = saved(tmp_path / "x.pt", small(), epoch=1)
    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(expected, match=message), dead_workers_named():
        save_checkpoint(path, {"epoch": 2})
    assert [item.name for item in tmp_path.iterdir()] == ["x.pt"]
    assert load_checkpoint(path)["epoch"] == 1


READERS = {
    "load_checkpoint": load_checkpoint,
    "load_detector": lambda path: load_detector(path, device="cpu"),
    "transfer": lambda path: transfer(small(), path),
}
every_reader = pytest.mark.parametrize("reader", READERS.values(), ids=READERS)


@every_reader
def test_c1_c2_not_a_checkpoint(tmp_path, monkeypatch, reader):
    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "socket", no_network)
    whole = saved(tmp_path / "x.pt", small()).read_bytes()
    os.mkfifo(tmp_path / "pipe.pt")
    for name, content, cause in (
        ("zero.pt", b"", "not a checkpoint: the file is empty"),
        ("text.pt", b"hello\n", "not a checkpoint: it is text"),
        ("cut.pt", whole[: len(whole) // 2], "not a checkpoint: truncated or damaged"),
        ("last byte.pt", whole[:-1], "not a checkpoint: truncated or damaged"),
        ("pickle.pt", pickle.dumps({"a": 1}, 2), "not a checkpoint: a pickle that torch.save did"),
        ("missing.pt", None, r"missing\.pt: no such file \(nothing is downloaded\)"),
        (".", None, "not a checkpoint: it is a directory"),
        ("pipe.pt", None, "not a checkpoint: it is not a regular file"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=cause) as caught:
            reader(str(tmp_path / name))
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        reader("https://example.invalid/yolov5n.pt")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@every_reader
def test_s4_s5_payload_never_runs(tmp_path, reader, legacy):
    marker, path = tmp_path / "marker", tmp_path / "evil.pt"

    class Payload:
        def __reduce__(self):
            return os.system, (f"touch {marker}",)

    content = {"format": "featherdet-1", "model": [torch.zeros(2), Payload()]}
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"refused: the file names '(posix|nt)\.system'") as caught:
        reader(path)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the payload is a real one
    assert marker.exists()


def test_s12_genuine_file_and_its_copy_are_equal(shared, tmp_path):
    """Imported, written as our own, read again: the same tensors, names, strides and output."""
    genuine = shared / "weights/yolov5n.pt"
    model = load_detector(genuine, device="cpu")
    assert not model.training
    again = load_detector(saved(tmp_path / "x.pt", model), device="cpu")
    first, second = model.state_dict(), again.state_dict()
    assert list(first) == list(second)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert (again.names, again.stride, again.spec) == (model.names, model.stride, model.spec)
    image = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        pairs = zip(model(image), again(image), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    with pytest.raises(UserError, match="not written by FeatherDet"):
        load_checkpoint(genuine)  # to resume it


def test_fused_model_computes_the_same(tmp_path):
    path, image = saved(tmp_path / "x.pt", small()), torch.rand(1, 3, 64, 64)
    plain, fused = (load_detector(path, device="cpu", fuse=fuse) for fuse in (False, True))
    assert not any(".bn." in name for name in fused.state_dict())
    with torch.no_grad():
        for a, b in zip(plain(image), fused(image), strict=True):
            assert torch.allclose(a, b, atol=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_r4_non_finite_weights_are_named(tmp_path, bad):
    model = small()
    model.state_dict()["model.1.bn.running_var"][3] = bad
    path = saved(tmp_path / "x.pt", model)
    cause = "non-finite weights: 1 of 8 values of model.1.bn.running_var"
    with pytest.raises(UserError, match=cause):
        load_detector(path, device="cpu")
    with pytest.raises(UserError, match=cause):
        transfer(small(), path)


ONE_SHORT = {k: v for k, v in small().state_dict().items() if k != "model.3.conv.weight"}
DAMAGED = "x.pt: not a detector's checkpoint, or damaged: "


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"spec": None}, DAMAGED),
        ({"spec": {"layers": []}}, DAMAGED),
        ({"names": 3}, DAMAGED),
        ({"names": []}, DAMAGED),
        ({"names": ["a", "b", "c"]}, "of another shape"),
        ({"model": 5}, DAMAGED),
        ({"model": {}}, "missing"),
        ({"model": {"a": 1}}, DAMAGED),
        ({"model": {"a": torch.zeros(1)}}, r"1 unknown \(a\)"),
        ({"model": ONE_SHORT}, r"1 missing \(model\.3\.conv\.weight\), 0 unknown, 0 of"),
        ({"format": "featherdet-9"}, "format 'featherdet-9' is not known, expected 'featherdet-1'"),
    ],
)
def test_partial_or_damaged_content_is_refused(tmp_path, change, cause):
    path = tmp_path / "x.pt"
    save_checkpoint(path, {**model_payload(small()), **change})
    with pytest.raises(UserError, match=cause) as caught:
        load_detector(path, device="cpu")
    assert "\n" not in str(caught.value)


@every_reader
def test_a_flipped_bit_in_a_tensor_is_noticed(tmp_path, reader):
    model = small()
    content = bytearray(saved(tmp_path / "x.pt", model).read_bytes())
    weight = model.model[1].conv.weight.detach().numpy().tobytes()
    content[content.index(weight) + len(weight) // 2] ^= 1
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"x\.pt: not a checkpoint: damaged, the checksum of .* is"):
        reader(tmp_path / "x.pt")


@pytest.mark.parametrize("error", [TerminatedError(), KeyboardInterrupt()], ids=["term", "int"])
def test_a_signal_while_a_checkpoint_is_read_is_not_a_damaged_file(tmp_path, monkeypatch, error):
    def interrupted(*_: Any, **__: Any) -> None:
        raise error

    path = saved(tmp_path / "x.pt", small())
    for owner, name in ((torch, "load"), (zipfile.ZipFile, "testzip"), (zipfile.ZipFile, "open")):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, interrupted)
            with pytest.raises(type(error)):
                load_checkpoint(path)


def test_no_path_of_this_machine_is_kept(tmp_path):
    file = tmp_path / "own.yaml"
    model = build_detector(parse_spec(YAML, str(file)), classes=2)
    assert model.spec.source == str(file)
    found = load_checkpoint(saved(tmp_path / "x.pt", model))["spec"]
    assert found["source"] == "own.yaml"
    assert str(tmp_path) not in str(found)


def test_strip_takes_the_training_state_only(tmp_path):
    state = {"optimizer": torch.zeros(100_000)}
    path = saved(tmp_path / "best.pt", small(), train_state=state, epoch=7)
    before = load_checkpoint(path)
    strip_checkpoint(path)
    after = load_checkpoint(path)
    assert path.stat().st_size < 200_000
    assert (after["train_state"], after["epoch"]) == (None, 7)
    assert all(torch.equal(before["model"][name], after["model"][name]) for name in before["model"])


def listed(report: str, what: str) -> set[str]:
    """The names in the line of a transfer's report about `what`."""
    (names,) = (line.split(f" {what}: ")[1] for line in report.splitlines() if f" {what}: " in line)
    return set(names.split(", "))


class TestTransfer:
    @pytest.fixture(autouse=True)
    def all_names(self, monkeypatch):
        monkeypatch.setattr(checkpoint, "LISTED", 1000)

    def test_same_shape_by_chance_does_not_fit(self, tmp_path):
        """3 anchors x (5 + 5) and 2 anchors x (5 + 10) outputs: 30 each."""
        model = small(10, anchors=[[10, 13, 16, 30], [30, 61, 62, 45]])
        source = small(5)
        assert source.head.m[0].weight.shape == model.head.m[0].weight.shape
        report = transfer(model, saved(tmp_path / "x.pt", source))
        assert listed(report, "of another shape") >= {"model.5.m.0.weight", "model.5.anchors"}

    def test_anchors_need_the_same_strides(self, tmp_path):
        backbone = [*YAML["backbone"][:-1], [-1, 1, "Conv", [64, 3, 1]]]
        model = small(2, backbone=backbone)
        assert model.stride == (8, 8)
        before = model.head.anchors.clone()
        report = transfer(model, saved(tmp_path / "x.pt", small(2)))
        assert listed(report, "of another shape") == {"model.5.anchors"}
        assert torch.equal(model.head.anchors, before)

    def test_other_architecture(self, tmp_path):
        backbone = [list(row) for row in YAML["backbone"]]
        backbone[2][2] = "C3Ghost"
        backbone[3][3] = [96, 3, 2]
        report = transfer(small(2, backbone=backbone), saved(tmp_path / "x.pt", small(2)))
        missing = listed(report, "not in the file")
        unfit = listed(report, "of another shape")
        unused = listed(report, "in the file but not in the model")
        assert "model.2.cv1.conv.weight" not in missing | unfit
        assert "model.3.conv.weight" in unfit
        assert "model.2.m.0.cv1.conv.weight" in unused
        assert any(name.startswith("model.2.m.0.conv") for name in missing)
        assert [line.split(":")[0] for line in report.splitlines()[1:]] == [
            f"  {len(missing)} not in the file",
            f"  {len(unfit)} of another shape",
            f"  {len(unused)} in the file but not in the model",
        ]

    def test_genuine_file(self, shared):
        weights = shared / "weights/yolov5n.pt"
        source = load_detector(weights, device="cpu")
        model = build_detector(source.spec, classes=3)
        report = transfer(model, weights)
        lines = report.splitlines()
        assert lines[0] == f"{weights}: 343 of the model's 349 tensors loaded"
        assert len(lines) == 2
        unfit = listed(report, "of another shape")
        assert len(unfit) == 6
        assert all(name.startswith("model.24.m.") for name in unfit)
        assert torch.equal(model.model[0].conv.weight, source.model[0].conv.weight)


def test_environment_is_plain_and_names_no_path(root):
    found = run_environment(torch.device("cpu"))
    assert found["torch"] == str(torch.__version__)
    assert found["numpy"] == np.__version__
    assert all(value is None or type(value) is str for value in found.values())
    assert not any("/" in str(value) for value in found.values())
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True)
    if head.returncode == 0:
        assert str(found["commit"]).removesuffix("-dirty") == head.stdout.strip()


def test_transfer_takes_the_settings_that_the_weights_expect(tmp_path):
    mean, std = (0.5, 0.25, 0.125), (0.5, 1.0, 2.0)
    trained, plain, own = small(), small(), small()
    trained.set_normalisation(mean, std)
    trained.set_backbone_epsilon(0.5)
    own.set_normalisation(std, std)
    path = saved(tmp_path / "trained.pt", trained)
    report = transfer(plain, path)
    count = len(plain.state_dict())
    lines = report.splitlines()
    assert lines[0] == f"{path}: {count} of the model's {count} tensors loaded"
    assert [line.split(":")[0] for line in lines[1:]] == ["  input", "  BatchNorm of the backbone"]
    assert plain.spec.normalisation == (mean, std)
    assert plain.backbone_epsilon == 0.5
    images = torch.rand(1, 3, 64, 64)
    for ours, theirs in zip(plain.eval()(images), trained.eval()(images), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    text = transfer(own, path)
    assert own.spec.normalisation == (mean, std)  # the weights decide, and the report says so
    assert "mean 0.5 0.25 0.125, std 0.5 1 2" in text
    assert "epsilon 0.5" in text
