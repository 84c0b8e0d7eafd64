"""Records: what is rounded and how much, and what is the same when read again."""

import functools
import json
import operator
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from engine.compare.record import (
    Record,
    model_id,
    plain_spec,
    records_in,
    run_id,
    save_record,
)
from engine.compare.runs import read_curves
from engine.compare.schema import Model
from engine.evaluate.coco import coco_metrics
from engine.evaluate.matching import BoxTable, coco_order
from models.spec import ModelSpec
from models.yaml.parser import load_spec
from tests.engine.evaluate.test_coco import random_case
from utils.errors import UserError

PROTOCOL = {
    "data": {
        "name": "d",
        "val": "0123456789abcdef",
        "classes": ["a", "b"],
        "train_images": 30,
        "val_images": 20,
    },
    "image_size": 64,
}


def random_data(images=20, boxes=120, detections=800):
    """Ground truth and detections, clipped as a detector's are."""
    shape = {"images": images, "classes": 2, "boxes": boxes, "detections": detections}
    truth, found = random_case(np.random.default_rng(0), **shape)
    found.boxes.clip(0, 640, out=found.boxes)
    return truth, found


def metrics_of(found, truth):
    return {
        "precision": 0.5,
        "recall": 0.25,
        "coco": coco_metrics(found, truth, images=20, classes=2).twelve,
        "per_class": [{"name": name, "instances": 9, "ap": 0.2, "ap50": 0.4} for name in "ab"],
    }


def a_record(**changes):
    spec = load_spec("yolov5n")
    record = Record(
        name="yolov5n",
        model_id=model_id(spec),
        model=Model("yolov5n", "", "", "", "", "cfg/yolov5n.yaml", []),
        spec=plain_spec(spec, "cfg/yolov5n.yaml"),
        seed=3,
        protocol=PROTOCOL,
        command="python train.py",
        metrics={},
        best_epoch=1,
        curves={"epoch": [0.0, 1.0], "metrics/mAP_0.5": [None, 0.5]},
        cost={"params": 1, "macs": 2, "flops": 4},
    )
    return replace(record, **changes)


@pytest.fixture
def saved(tmp_path):
    """A record on the disk."""
    truth, found = random_data()
    return save_record(tmp_path, a_record(metrics=metrics_of(found, truth)), found, truth)


def test_rounding_is_as_small_as_documented(saved):
    truth, found = random_data()
    again = saved.detections()
    assert np.array_equal(again.image, found.image)
    assert np.array_equal(again.labels, found.labels)
    assert np.abs(again.boxes - found.boxes).max() <= 1 / 32
    assert np.abs(again.scores / found.scores - 1).max() < 2e-4
    assert again.scores.max() <= 1
    assert (again.boxes.dtype, again.image.dtype) == (np.float32, np.int64)
    exact, rounded = (metrics_of(boxes, truth)["coco"] for boxes in (found, again))
    assert exact["AP"] > 0.1
    for key, value in exact.items():
        error = 2e-3 if key == "AP" else 1e-2  # at one threshold a single box may change sides
        assert rounded[key] == pytest.approx(value, abs=error), key


def test_only_what_no_metric_looks_at_is_left_out(saved, tmp_path):
    truth, found = random_data(images=3, detections=750)
    kept = save_record(tmp_path, saved, found, truth).detections()
    groups = np.unique(np.stack((kept.image, kept.labels)), axis=1, return_counts=True)[1]
    assert groups.max() == 100
    assert len(kept) == len(coco_order(kept)) == len(coco_order(found))
    assert len(save_record(tmp_path, saved, BoxTable.concatenate([]), truth).detections()) == 0


def test_a_record_comes_back_as_it_was(saved, tmp_path):
    truth, _ = random_data()
    assert saved.path.name == saved.stem + ".json"
    (again,) = records_in(tmp_path)
    assert again == saved
    assert again.path == saved.path
    boxes = vars(again.ground_truth())
    assert all(np.array_equal(boxes[key], value) for key, value in vars(truth).items())
    assert sorted(item.suffix for item in tmp_path.iterdir()) == [".json", ".npz", ".npz"]
    assert ModelSpec.from_dict(saved.spec).layers[0].block == "Conv"
    # no path of this machine
    assert {layer["where"] for layer in saved.spec["layers"]} == {""}
    assert saved.spec["source"] == "cfg/yolov5n.yaml"


def test_a_record_older_than_its_training_settings_is_read(saved):
    content = json.loads(saved.path.read_text())
    del content["training"]
    saved.path.write_text(json.dumps(content))
    (again,) = records_in(saved.path.parent)
    assert again.training == {}


def test_runs_are_told_apart():
    names = {
        a_record().stem,
        a_record(seed=4).stem,
        a_record(model_id="other").stem,
        a_record(protocol={**PROTOCOL, "image_size": 96}).stem,
    }
    assert len(names) == 4
    assert all(name.startswith("d-yolov5n-seed") for name in names)
    assert run_id("a + b/c", None, "x", PROTOCOL).startswith("d-a-b-c-")


def test_the_models_hash_is_of_what_it_computes():
    spec = load_spec("yolov5n")
    layers = tuple(replace(layer, where="x:1") for layer in spec.layers)
    moved = replace(spec, source="elsewhere", notes=("a note",), layers=layers)
    assert model_id(moved) == model_id(spec)
    assert model_id(load_spec("yolov5n-ghost")) != model_id(spec)
    assert model_id(ModelSpec.from_dict(plain_spec(spec, "x"))) == model_id(spec)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "another"}'])
def test_files_of_other_formats_are_passed_over(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert records_in(tmp_path) == []


def refused(path, text, why=""):
    path.write_text(text)
    with pytest.raises(UserError, match=rf"{path.name}: not a record{why}") as error:
        records_in(path.parent)
    assert str(error.value).isprintable()


GONE = object()


ONE_CLASS = {"name": "a", "instances": 1, "ap": 0.5, "ap50": 0.5}
WRONG = {
    "name": ["a\x1b[2Jb", 3],
    "seed": ["0", True, -1],
    "command": [GONE],
    "model": [[]],
    "model.notes": ["none"],
    "model.backbone": [GONE],
    "protocol.data": [GONE],
    "protocol.data.val": ["../../etc/passwd", GONE],
    "protocol.data.classes": [[]],
    "protocol.data.val_images": [-1, 10**12],
    "protocol.data.train_images": [GONE],
    "protocol.split": ["train"],
    "protocol.image_size": [0, 10**6],
    "protocol.device": ["cpu"],
    "metrics.recall": [1e300],
    "metrics.coco": [GONE, {"AP": 0.5}],
    "metrics.coco.AP": ["high", 10**400, float("nan"), float("inf")],
    "metrics.per_class": [[], [{"name": "a"}], [ONE_CLASS] * 2],
    "curves": [{"epoch": ["x"]}, {"epoch": [0.0], "b": [1.0, 2.0]}, {"epoch": [5e-324]}],
    "curves.epoch": [GONE],
    "environment": [{"commit": 3}, {"torch": ["x"]}],
    "training": [[]],
}


@pytest.mark.parametrize("key", WRONG)
def test_a_record_of_another_shape_is_named_with_its_key(saved, key):
    whole, (*path, last) = saved.path.read_text(), key.split(".")
    for value in WRONG[key]:
        content = json.loads(whole)
        part = functools.reduce(operator.getitem, path, content)
        part[last] = value
        if value is GONE:
            del part[last]
        refused(saved.path, json.dumps(content), f": '{key}")


def test_what_nothing_could_be_made_of_is_refused_anywhere(saved):
    whole = saved.path.read_text()
    for text in ("", '{"format": "featherdet-record-1", "a": 1}', whole.replace("0.5", "1e999")):
        refused(saved.path, text)

    def nested(levels):
        return [nested(levels - 1)] if levels else "end"

    strange = [
        "a\x1b[2J\nb",
        "\ud800",
        {"a\x1b": 1},
        10**400,
        5e-324,
        nested(100),
        {"x": nested(15)},
    ]
    for part in ("protocol", "training", "spec", "metrics"):
        content = json.loads(whole)
        content[part]["note"] = {"more": [1, None, True, "ü", 0.0, -2.5]}
        saved.path.write_text(json.dumps(content))
        assert records_in(saved.path.parent)[0].name == "yolov5n"
        for value in strange:
            content[part]["note"] = value
            refused(saved.path, json.dumps(content), f": '{part}")


FEW = np.zeros(2, np.uint8)


DETECTIONS = {
    "labels": [np.zeros(3, np.uint8), FEW + 2, GONE],
    "more": [FEW],
    "image": [np.uint8(0), np.array(["a", "b"]), np.zeros((2, 1), np.uint8), FEW + 20],
    "boxes": [np.zeros((2, 3), np.uint8), np.full((2, 4), np.nan)],
    "scores": [np.array([-1, 0])],
}
TRUTH = {
    "image": [np.uint8(0), np.full(120, -1), np.full(120, 20)],
    "labels": [np.array(["a"] * 120), np.full(120, 2)],
    "boxes": [np.full((120, 4), np.inf, np.float32)],
    "crowd": [np.zeros(120)],
    "areas": [np.zeros(119)],
}


def test_arrays_of_another_shape_or_other_images_are_named(saved):
    found = saved.path.with_suffix(".npz")
    np.savez(found, image=FEW, labels=FEW, boxes=np.zeros((2, 4), np.uint8), scores=FEW)
    assert (len(saved.detections()), len(saved.ground_truth())) == (2, 120)
    for path, load, wrong in (
        (found, saved.detections, DETECTIONS),
        (saved.truth_path, saved.ground_truth, TRUTH),
    ):
        whole = dict(np.load(path))
        for name, arrays in wrong.items():
            for array in arrays:
                changed = {**whole, name: array}
                np.savez(path, **{key: x for key, x in changed.items() if x is not GONE})
                with pytest.raises(UserError, match=rf"{path.name}: (not the|boxes beyond the 20)"):
                    load()


def encrypted(content):
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # each file has both
        for found in re.finditer(re.escape(mark), content):
            content = bytearray(content)
            content[found.start() + flags] |= 1
    return bytes(content)


@pytest.mark.parametrize(
    ("damage", "cause"),
    [
        (lambda content: None, "No such file"),
        (lambda content: b"", ""),
        (lambda content: b"not an archive", ""),
        (lambda content: content[: len(content) // 2], ""),
        (encrypted, "encrypted"),
    ],
)
def test_damaged_arrays_are_named_and_written_anew(saved, tmp_path, damage, cause):
    truth, found = random_data()
    for path, load in (
        (saved.path.with_suffix(".npz"), saved.detections),
        (saved.truth_path, saved.ground_truth),
    ):
        content = damage(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(UserError, match=rf"{path.name}: not readable.*{cause}"):
            load()
    save_record(tmp_path, saved, found, truth)
    assert (len(saved.detections()), len(saved.ground_truth())) == (len(found), len(truth))


def test_what_is_no_regular_file_does_not_block(saved, tmp_path):
    for path in (saved.path, saved.path.with_suffix(".npz")):
        path.unlink()
        os.mkfifo(path)
    with pytest.raises(UserError, match=r"json: not a record: not a regular file"):
        records_in(tmp_path)
    with pytest.raises(UserError, match=r"npz: not readable.*not a regular file"):
        saved.detections()


def test_curves_by_column(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("epoch,a/b,c\n0,0.5,\n1,nan,2\n")
    assert read_curves(file) == {"epoch": [0.0, 1.0], "a/b": [0.5, None], "c": [None, 2.0]}
    file.write_text("epoch\nx\n")
    with pytest.raises(UserError, match=r"results.csv: not the results of a run"):
        read_curves(file)
