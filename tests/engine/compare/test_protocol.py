"""Protocols compared field by field, and the folder that is locked to one."""

import copy
import json
import shlex
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from engine.compare import protocol as compare_protocol
from engine.compare.config import EVALUATE, PROFILE, TABLE, TRAIN, CompareConfig
from engine.compare.protocol import (
    comparison_folder,
    conflict,
    differences,
    load_splits,
    locked_folder,
    make_protocol,
    of_a_run,
    read_lock,
    require_equal,
)
from utils.config import parse
from utils.errors import UserError

CPU = torch.device("cpu")
PROTOCOL = {
    "kind": "train",
    "data": {"name": "d", "classes": ["a"], "train": "11", "val": "22", "val_images": 4},
    "image_size": 64,
    "training": {"epochs": 3, "hyp": {"lr0": 0.01, "mosaic": 1.0}},
    "seeds": [0, 1],
    "device": {"name": "cpu", "threads": 1},
}
MODELS = {"one": "aa", "two": "bb"}
LOCKING = "import sys, pathlib, utils.files as f; f.locked(pathlib.Path(sys.argv[1])).__enter__()"


def changed(**fields):
    """PROTOCOL with fields changed, by dotted name with __ for the dot."""
    result = copy.deepcopy(PROTOCOL)
    for name, value in fields.items():
        *path, last = name.split("__")
        part = result
        for key in path:
            part = part[key]
        part[last] = value
    return result


def lock_of(protocol, models):
    return {"protocol": protocol, "models": models}


LOCK = lock_of(PROTOCOL, MODELS)
LARGER, LONGER = (
    lock_of(changed(image_size=96), MODELS),
    lock_of(changed(training__epochs=9), MODELS),
)


def parsed(*words):
    return parse(CompareConfig, list(words), prog="compare.py", description="")


def in_folder(project, exist_ok=False):
    return CompareConfig(cfg=("a",), project=str(project), exist_ok=exist_ok)


def claim(project, lock, **more):
    """The folder, made and locked to `lock`, and let go again."""
    with locked_folder(in_folder(project, **more), lock) as folder:
        return folder


def test_differences_are_named_with_both_values():
    other = changed(training__hyp__lr0=0.02, data__val="33", device__threads=2, kind="evaluate")
    found = [
        "kind: train and evaluate",
        "data.val: 22 and 33",
        "training.hyp.lr0: 0.01 and 0.02",
        "device.threads: 1 and 2",
    ]
    assert differences(PROTOCOL, other) == found
    assert differences(PROTOCOL, copy.deepcopy(PROTOCOL)) == []
    assert differences({"a": 1}, {}) == ["a: 1 and none"]
    with pytest.raises(UserError, match=r"x and z .*cannot be rows of one table") as refused:
        require_equal({"x": PROTOCOL, "y": PROTOCOL, "z": other})
    assert str(refused.value).endswith("; ".join(found))


def test_versions_that_older_records_do_not_state_are_no_difference():
    old = changed(versions={"torch": "2", "numpy": "1"})
    new = changed(versions={"torch": "2", "numpy": "1", "opencv": "5", "tf32": "off"})
    assert require_equal({"old": old, "new": {**new, "seeds": [7]}}) == of_a_run(new)
    assert "seeds" not in of_a_run(new)
    assert conflict(lock_of(new, MODELS), lock_of(old, MODELS)) == []
    other = changed(versions={"torch": "2", "numpy": "1", "opencv": "4", "tf32": "off"})
    with pytest.raises(UserError, match=r"versions.opencv: 5 and 4"):
        require_equal({"old": old, "new": new, "other": other})


def test_the_protocol_has_the_libraries_and_settings_of_cuda(monkeypatch):
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "a GPU")
    config = parsed("--cfg", "yolov5n", "--profile-only")
    made, before = [], torch.backends.cuda.matmul.allow_tf32
    try:
        for allowed in (True, False):
            torch.backends.cuda.matmul.allow_tf32 = allowed
            made.append(make_protocol(config, None, torch.device("cuda")))
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    assert {"cuda", "cudnn", "tf32"} <= set(made[0]["versions"])
    assert made[0]["device"] == {"name": "a GPU", "threads": None}
    (difference,) = differences(*made)
    assert difference.startswith("versions.tf32: matmul")


def test_pretrained_weights_are_part_of_the_protocol_by_their_bytes(rectangles, tmp_path):
    weights = tmp_path / "some.pt"
    weights.write_bytes(b"abc")  # whose SHA-256 begins with ba7816bf8f01
    words = ("--cfg", "yolov5n", "--data", str(rectangles))
    plain, tuned = parsed(*words), parsed(*words, "--init-weights", str(weights))
    made = [make_protocol(one, load_splits(one), CPU) for one in (plain, tuned)]
    found = "training.init_weights: none and some.pt ba7816bf8f01"
    assert found in differences(*made)
    assert made[1]["chosen"]["hyp"] == "finetune"  # the recipe that goes with weights


@pytest.mark.parametrize(
    ("protocol", "models", "reasons"),
    [
        (PROTOCOL, MODELS, []),
        (changed(seeds=[0, 1, 2]), {**MODELS, "three": "cc"}, []),
        (changed(seeds=[0]), MODELS, ["seeds: [0, 1] and [0]"]),
        (PROTOCOL, {"one": "aa"}, ["row two: only the folder has it"]),
        (PROTOCOL, {**MODELS, "two": "xx"}, ["row two: another model of that name"]),
        (changed(image_size=32), MODELS, ["image_size: 64 and 32"]),
        (PROTOCOL, {**MODELS, "two": ""}, []),  # it cannot be built now
    ],
)
def test_a_folder_is_continued_by_the_same_or_a_larger_comparison(protocol, models, reasons):
    assert conflict(LOCK, lock_of(protocol, models)) == reasons


def test_how_times_are_taken_parts_tables_of_costs_alone():
    half = {"latency": {"dtype": "fp16", "graph": True}}
    runs = lock_of(changed(**half), MODELS)
    assert conflict(LOCK, runs) == []  # what was trained is there, and is timed anew
    assert of_a_run(runs["protocol"]) == of_a_run(PROTOCOL)
    costs = lock_of(changed(kind=PROFILE), MODELS)
    eager = lock_of(changed(kind=PROFILE, latency={"dtype": "fp32", "graph": False}), MODELS)
    assert conflict(costs, eager) == []
    found = conflict(costs, lock_of(changed(kind=PROFILE, **half), MODELS))
    assert found == ["latency.dtype: fp32 and fp16", "latency.graph: false and true"]


def test_a_model_that_could_not_be_built_may_be_repaired(tmp_path):
    """And one that is broken for a while is still held to what it was."""
    for two in ("", "bb", "", "bb", "", "xx"):
        folder = "exp2" if two == "xx" else "exp"
        assert claim(tmp_path, lock_of(PROTOCOL, {**MODELS, "two": two})) == tmp_path / folder


def test_the_same_comparison_finds_its_folder_again(tmp_path, capsys):
    first = claim(tmp_path, LOCK)
    assert first == tmp_path / "exp"
    assert claim(tmp_path, LOCK) == first
    assert claim(tmp_path, LONGER) == tmp_path / "exp2"
    assert "training.epochs: 3 and 9" in capsys.readouterr().err
    assert claim(tmp_path, LONGER) == tmp_path / "exp2"
    assert claim(tmp_path, LOCK, exist_ok=True) == first
    with pytest.raises(UserError, match=r"training.epochs: 3 and 9.*another --name"):
        claim(tmp_path, LONGER, exist_ok=True)
    assert read_lock(first) == LOCK
    (tmp_path / "exp3").mkdir()  # a strange folder
    assert comparison_folder(in_folder(tmp_path), LARGER) == tmp_path / "exp4"
    assert list((tmp_path / "exp3").iterdir()) == []
    assert not (tmp_path / "exp4").exists()


def test_what_a_lock_says_is_not_obeyed_by_the_terminal(tmp_path, capsys):
    claim(tmp_path, lock_of(changed(kind="a\x1b[2J\nb"), {"c\x1b[2J\nd": "aa"}))
    assert claim(tmp_path, LOCK) == tmp_path / "exp2"
    (line,) = capsys.readouterr().err.splitlines()
    assert "kind: a [2J b and train; row c [2J d: only the folder has it" in line
    assert line.isprintable()


def test_a_damaged_lock_is_named(tmp_path):
    (tmp_path / "exp").mkdir()
    for protocol in ("[]", '{"seeds": 1}', '{"seeds": [[0]]}'):
        for text in ("[1, 2]", f'{{"protocol": {protocol}, "models": {{}}}}'):
            (tmp_path / "exp" / "protocol.json").write_text(text)
            with pytest.raises(UserError, match=r"protocol.json: not a protocol"):
                claim(tmp_path, LOCK)


def test_a_folder_is_locked_before_it_is_looked_at_again(tmp_path, monkeypatch):
    """Another one with the same name, a moment earlier: the second sees it and goes elsewhere."""
    look = compare_protocol.comparison_folder
    quicker = iter([True])

    def late(*args):
        found = look(*args)
        if next(quicker, False):
            claim(tmp_path, LARGER)
        return found

    monkeypatch.setattr(compare_protocol, "comparison_folder", late)
    with locked_folder(in_folder(tmp_path), LOCK) as folder:
        assert folder == tmp_path / "exp2"
        assert (read_lock(tmp_path / "exp"), read_lock(folder)) == (LARGER, LOCK)
        command = [sys.executable, "-c", LOCKING, str(folder)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert "another process is using this folder" in second.stderr


def test_the_protocol_of_each_kind(rectangles):
    data = ("--data", str(rectangles), "--img", "64")
    words = ("--epochs", "3", "--seeds", "0", "4", "--batch", "4", "--workers", "0")
    config = parsed("--cfg", "yolov5n", *data, *words, "--hyp", "no-augmentation")
    splits = load_splits(config)
    protocol = make_protocol(config, splits, CPU)
    assert protocol["data"]["train"] == splits.trained["train"].fingerprint
    assert protocol["data"]["val"] == splits.evaluated.fingerprint
    assert (protocol["data"]["train_images"], protocol["data"]["val_images"]) == (10, 5)
    assert protocol["seeds"] == [0, 4]
    assert (protocol["training"]["epochs"], protocol["training"]["patience"]) == (3, 0)
    assert protocol["training"]["hyp"]["mosaic"] == 0.0
    assert protocol["training"]["hyp"]["min_updates"] == 1000
    assert protocol["training"]["optimizer"] == "SGD"
    assert protocol["chosen"] == {"hyp": "no-augmentation", "optimizer": "SGD"}
    auto = make_protocol(replace(config, hyp="auto"), splits, CPU)
    given = make_protocol(replace(config, hyp="small", optimizer="AdamW"), splits, CPU)
    assert auto["chosen"] == {"hyp": "small", "optimizer": "AdamW"}
    assert "chosen" not in given
    assert of_a_run(auto) == of_a_run(given)
    assert protocol["evaluation"]["conf"] == 0.001
    packages = {"torch", "torchvision", "numpy", "opencv", "pillow", "hotcoco", "pycocotools"}
    assert set(protocol["versions"]) == {"python", *packages}
    assert protocol["device"]["threads"] == torch.get_num_threads()
    assert "commit" not in str(protocol)
    weights = parsed("--weights", "a.pt", *data)
    protocol = make_protocol(weights, load_splits(weights), CPU)
    assert protocol["kind"] == EVALUATE
    assert "train" not in protocol["data"]
    assert not {"training", "seeds"} & set(protocol)
    profile = parsed("--cfg", "yolov5n", "--profile-only", "--classes", "3")
    assert make_protocol(profile, None, CPU)["classes"] == 3


@pytest.mark.parametrize(
    ("folder", "size", "epochs"), [("bccd-n", "224", "30"), ("shapes-n", "192", "20")]
)
def test_committed_records_are_of_the_protocol_that_their_command_has_now(
    root, rectangles, folder, size, epochs
):
    """They are where docs/results.md goes on from, with more seeds or models."""
    config = parsed(
        *("--cfg", "yolov5n", "--data", str(rectangles), "--img", size, "--epochs", epochs),
        *("--hyp", "small", "--optimizer", "AdamW", "--workers", "2"),
    )
    now = make_protocol(config, load_splits(config), CPU)
    records = sorted((root / "docs" / "results" / folder).glob("*.json"))
    assert records
    for path in records:
        protocol = json.loads(path.read_text(encoding="utf-8"))["protocol"]
        assert protocol["training"] == now["training"]
        assert protocol["evaluation"] == now["evaluation"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "nothing to compare"),
        ("--cfg a --weights b", "exclude each other"),
        ("--weights b --neck pan", "give --cfg"),
        ("--records d --profile-only", "needs --cfg"),
        ("--cfg a --seeds 1 1", "--seeds has 1 twice"),
        ("--cfg a --seeds -1", "--seeds"),
        ("--cfg a --epochs 0", "--epochs"),
        ("--cfg a --device 0,cuda:0", "--device has 0 twice"),
        ("--cfg a --jobs 0", "--jobs"),
        ("--cfg a --latency-seconds 0", "--latency-seconds"),
        ("--cfg a --epoch 3", "--epochs"),
    ],
)
def test_mistakes_of_the_command_line(words, message):
    with pytest.raises(UserError, match=message):
        parsed(*words.split())


@pytest.mark.parametrize(
    ("words", "kind"),
    [
        ("--cfg a 'b c' --seeds 0 3 --img 96 --cache", TRAIN),
        ("--weights x.pt --device cpu --exist-ok", EVALUATE),
        ("--cfg a --profile-only --fit gflops=1.5 --latency-batches 1", PROFILE),
        ("--records folder", TABLE),
    ],
)
def test_the_command_that_is_noted_says_the_same(words, kind):
    config = parsed(*shlex.split(words))
    assert config.kind == kind
    assert parsed(*shlex.split(config.command())[2:]) == config
