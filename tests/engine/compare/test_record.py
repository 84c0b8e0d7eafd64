"""Records: what is rounded and how much, and what is the same when read again."""

import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest

from engine.compare.arrays import load_detections, load_truth, pack, save_truth, unpack
from engine.compare.record import (
    Record,
    load_record,
    model_id,
    plain_spec,
    read_curves,
    records_in,
    run_id,
    save_record,
)
from engine.compare.schema import Model
from engine.evaluate.box_table import BoxTable
from engine.evaluate.coco import coco_metrics
from engine.evaluate.matching import coco_order
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
    values = {
        "name": "yolov5n",
        "model_id": model_id(spec),
        "model": Model("yolov5n", "", "", "", "", "cfg/yolov5n.yaml", []),
        "spec": plain_spec(spec, "cfg/yolov5n.yaml"),
        "seed": 3,
        "protocol": PROTOCOL,
        "command": "python train.py",
        "metrics": {},
        "best_epoch": 1,
        "curves": {"epoch": [0.0, 1.0], "metrics/mAP_0.5": [None, 0.5]},
        "cost": {"params": 1, "macs": 2, "flops": 4},
    }
    return Record(**{**values, **changes})


def test_rounding_is_as_small_as_documented():
    _, found = random_data()
    again = unpack(pack(found))
    assert np.array_equal(again.image, found.image)
    assert np.array_equal(again.labels, found.labels)
    assert np.abs(again.boxes - found.boxes).max() <= 1 / 32
    assert np.abs(again.scores / found.scores - 1).max() < 2e-4
    assert again.scores.max() <= 1
    assert (again.boxes.dtype, again.image.dtype) == (np.float32, np.int64)


def test_the_metrics_of_rounded_detections_are_nearly_those_of_exact_ones():
    truth, found = random_data()
    exact = coco_metrics(found, truth, images=20, classes=2).twelve
    rounded = coco_metrics(unpack(pack(found)), truth, images=20, classes=2).twelve
    assert exact["AP"] > 0.1
    for key, value in exact.items():
        error = 2e-3 if key == "AP" else 1e-2  # at one threshold a single box may change sides
        assert rounded[key] == pytest.approx(value, abs=error), key


def test_only_what_no_metric_looks_at_is_left_out():
    _, found = random_data(images=3, detections=750)
    kept = unpack(pack(found))
    groups = np.unique(np.stack((kept.image, kept.labels)), axis=1, return_counts=True)[1]
    assert groups.max() == 100
    assert len(kept) == len(coco_order(kept)) == len(coco_order(found))


def test_no_detection_at_all():
    none = BoxTable.concatenate([])
    assert len(unpack(pack(none))) == 0


def test_a_record_comes_back_as_it_was(tmp_path):
    truth, found = random_data()
    record = a_record(metrics=metrics_of(found, truth))
    path = save_record(tmp_path, record, found, truth).path
    assert path.name == record.stem + ".json"
    assert load_record(path) == record
    assert len(load_detections(path)) == len(found)
    again = load_truth(tmp_path, record.fingerprint)
    assert all(np.array_equal(vars(again)[key], value) for key, value in vars(truth).items())
    assert [item.path for item in records_in(tmp_path)] == [path]
    assert ModelSpec.from_dict(record.spec).layers[0].block == "Conv"
    assert sorted(item.suffix for item in tmp_path.iterdir()) == [".json", ".npz", ".npz"]


def test_no_path_of_this_machine_is_in_a_record():
    record = a_record()
    assert {layer["where"] for layer in record.spec["layers"]} == {""}
    assert record.spec["source"] == "cfg/yolov5n.yaml"


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
    moved = replace(
        spec,
        source="elsewhere",
        notes=("a note",),
        layers=tuple(replace(layer, where="x:1") for layer in spec.layers),
    )
    assert model_id(moved) == model_id(spec)
    assert model_id(load_spec("yolov5n-ghost")) != model_id(spec)
    assert model_id(ModelSpec.from_dict(plain_spec(spec, "x"))) == model_id(spec)


@pytest.mark.parametrize("text", ["", '{"format": "featherdet-record-1", "a": 1}'])
def test_what_is_no_record_is_named(tmp_path, text):
    refused(tmp_path, text)


@pytest.mark.parametrize("text", ["{}", "[]", '{"format": "another"}'])
def test_files_of_other_formats_are_passed_over(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    assert records_in(tmp_path) == []


GONE = object()


def plant(content, key, value):
    *path, last = key.split(".")
    for part in path:
        content = content[part]
    if value is GONE:
        del content[last]
    else:
        content[last] = value


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A record's content as it lies on the disk."""
    truth, found = random_data()
    record = a_record(metrics=metrics_of(found, truth))
    folder = tmp_path_factory.mktemp("written")
    return save_record(folder, record, found, truth).path.read_text()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "a\x1b[2Jb"),
        ("name", 3),
        ("seed", "0"),
        ("seed", True),
        ("command", GONE),
        ("model.notes", "none"),
        ("model.backbone", GONE),
        ("model", []),
        ("protocol.data", GONE),
        ("protocol.data.val", "../../etc/passwd"),
        ("protocol.data.classes", []),
        ("protocol.data.val_images", -1),
        ("protocol.data.train_images", GONE),
        ("protocol.image_size", 0),
        ("protocol.image_size", 10**6),
        ("protocol.data.val_images", 10**12),
        ("protocol.device", "cpu"),
        ("metrics.recall", 1e300),
        pytest.param("metrics.coco.AP", 10**400, id="metrics.coco.AP-huge"),
        ("metrics.coco.AP", "high"),
        ("metrics.coco", GONE),
        ("metrics.per_class", [{"name": "a"}]),
        ("metrics.per_class", []),
        ("metrics.per_class", [{"name": "a", "instances": 1, "ap": 0.5, "ap50": 0.5}] * 2),
        ("curves.epoch", GONE),
        ("curves", {"epoch": [0.0], "val_seconds": [1.0, 2.0]}),
        ("curves", {"epoch": [0.0], "images_per_second": [5e-324]}),
        ("curves", {"epoch": ["x"]}),
        ("environment", {"commit": ["x"]}),
        ("environment", {"commit": 3}),
        ("training", []),
    ],
)
def test_a_record_of_another_shape_is_named_with_its_key(tmp_path, written, key, value):
    content = json.loads(written)
    plant(content, key, value)
    refused(tmp_path, json.dumps(content), f": '{key}")


def refused(folder, text, why=""):
    file = folder / "x.json"
    file.write_text(text)
    with pytest.raises(UserError, match=rf"x.json: not a record{why}") as error:
        load_record(file)
    assert str(error.value).isprintable()


def nested(levels):
    return [nested(levels - 1)] if levels else "end"


@pytest.mark.parametrize("part", ["protocol", "training", "spec", "metrics"])
@pytest.mark.parametrize(
    "value",
    ["a\x1b[2J\nb", "\ud800", {"a\x1b": 1}, 10**400, 5e-324, nested(100), {"x": nested(15)}],
    ids=["control", "surrogate", "key", "huge", "tiny", "deep", "mixed"],
)
def test_what_nothing_could_be_made_of_is_refused_anywhere(tmp_path, written, part, value):
    content = json.loads(written)
    content[part]["note"] = {"more": [1, None, True, "ü", 0.0, -2.5]}
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    assert load_record(file).name == "yolov5n"
    content[part]["note"] = value
    refused(tmp_path, json.dumps(content), f": '{part}")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_what_is_no_number_is_refused(tmp_path, written, number):
    content = json.loads(written)
    content["metrics"]["coco"]["AP"] = "here"
    refused(tmp_path, json.dumps(content).replace('"here"', number), ": 'metrics.coco.AP'")


def test_a_record_older_than_its_training_settings_is_read(tmp_path, written):
    content = json.loads(written)
    del content["training"]
    file = tmp_path / "x.json"
    file.write_text(json.dumps(content))
    assert load_record(file).training == {}


def test_damaged_truth_is_written_anew(tmp_path):
    truth, _ = random_data()
    path = tmp_path / "truth-0123456789ab.npz"
    save_truth(path, truth)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="truth-"):
        load_truth(tmp_path, "0123456789abcdef")
    save_truth(path, truth)
    assert len(load_truth(tmp_path, "0123456789abcdef")) == len(truth)


BYTES = np.zeros(2, np.uint8)
FOUND = {"image": BYTES, "labels": BYTES, "boxes": np.zeros((2, 4), np.uint8), "scores": BYTES}


@pytest.mark.parametrize(
    ("what", "name", "array"),
    [
        ("detections", "labels", np.zeros(3, np.uint8)),
        ("detections", "labels", GONE),
        ("detections", "more", BYTES),
        ("detections", "image", np.uint8(0)),
        ("detections", "image", np.array(["a", "b"])),
        ("detections", "image", np.zeros((2, 1), np.uint8)),
        ("detections", "boxes", np.zeros((2, 3), np.uint8)),
        ("detections", "boxes", np.full((2, 4), np.nan)),
        ("detections", "scores", np.array([-1, 0])),
        ("ground truth", "image", np.uint8(0)),
        ("ground truth", "labels", np.array(["a"] * 120)),
        ("ground truth", "boxes", np.full((120, 4), np.inf, np.float32)),
        ("ground truth", "crowd", np.zeros(120)),
        ("ground truth", "areas", np.zeros(119)),
    ],
)
def test_arrays_of_another_shape_are_named(tmp_path, what, name, array):
    truth = tmp_path / "truth-0123456789ab.npz"
    np.savez(tmp_path / "x.npz", **FOUND)
    save_truth(truth, random_data()[0])

    def load():
        if what == "detections":
            return load_detections(tmp_path / "x.json")
        return load_truth(tmp_path, "0123456789abcdef")

    assert len(load()) == (2 if what == "detections" else 120)
    path = tmp_path / "x.npz" if what == "detections" else truth
    changed = {**np.load(path), name: array}
    np.savez(path, **{key: item for key, item in changed.items() if item is not GONE})
    with pytest.raises(UserError, match=rf"{path.name}: not the {what}"):
        load()


def test_an_encrypted_archive_is_a_damaged_one(tmp_path):
    np.savez(tmp_path / "x.npz", **FOUND)
    content = bytearray((tmp_path / "x.npz").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # each file has both
        for found in re.finditer(re.escape(mark), bytes(content)):
            content[found.start() + flags] |= 1
    (tmp_path / "x.npz").write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"x.npz: not readable.*encrypted"):
        load_detections(tmp_path / "x.json")


def test_what_is_no_regular_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(UserError, match=r"x.json: not a record: not a regular file"):
        records_in(tmp_path)
    os.mkfifo(tmp_path / "x.npz")
    with pytest.raises(UserError, match=r"x.npz: not readable.*not a regular file"):
        load_detections(tmp_path / "x.json")


def test_missing_detections_are_named(tmp_path):
    with pytest.raises(UserError, match=r"x.npz"):
        load_detections(tmp_path / "x.json")
    (tmp_path / "x.npz").write_text("not an archive")
    with pytest.raises(UserError, match=r"x.npz"):
        load_detections(tmp_path / "x.json")


def test_curves_by_column(tmp_path):
    file = tmp_path / "results.csv"
    file.write_text("epoch,a/b,c\n0,0.5,\n1,nan,2\n")
    assert read_curves(file) == {"epoch": [0.0, 1.0], "a/b": [0.5, None], "c": [None, 2.0]}
