import os
import pickle
import time
from io import BytesIO

import numpy as np
import pytest

from data.index import cache

BOX = "0 0.5 0.5 0.25 0.5\n"
POLYGON = "1 .25 .25 .75 .25 .5 .75\n"
ITEM = {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 5}


def kept(cache_home):
    (file,) = (cache_home / "featherdet").glob("*.scan")
    return file


@pytest.fixture
def settled(monkeypatch):
    """The files of the test count as written long ago."""
    monkeypatch.setattr("data.index.files._SETTLED", -1 << 60)


@pytest.mark.parametrize("age", ["just written", "settled"])
def test_second_start_equals_the_first_and_reads_nothing_anew(
    scan, yolo_set, coco_set, monkeypatch, age, request
):
    names = ["scan.image_size"]
    if age == "settled":
        request.getfixturevalue("settled")
        names += ["rows._content", "coco._read", "scan.hashlib", "dataset.save_cache"]
    yolo = yolo_set({"a.jpg": BOX + POLYGON, "b.jpg": None, "c.jpg": BOX + "9 1 1 1 1\n"})
    (yolo.parent / "set" / "images" / "train" / "gone.jpg").symlink_to("nothing")
    crowd = {**ITEM, "iscrowd": 1, "segmentation": {"counts": "x", "size": [1, 1]}}
    polygon = {**ITEM, "category_id": 2, "segmentation": [[1, 2, 4, 2, 4, 6]]}
    coco = coco_set([ITEM, crowd, polygon, {**ITEM, "bbox": []}])
    first = [repr(scan(file)) for file in (yolo, coco)]
    for name in names:
        monkeypatch.setattr(f"data.index.{name}", None)
    assert [repr(scan(file)) for file in (yolo, coco)] == first


def test_a_missing_label_that_becomes_a_dangling_link_is_noticed(scan, yolo_set, settled):
    file = yolo_set({"a.jpg": BOX, "b.jpg": None})
    assert scan(file).backgrounds == 1
    (file.parent / "set" / "labels" / "train" / "b.txt").symlink_to("nothing")
    assert "dangling" in scan(file).problems[0].cause


def test_a_settled_image_that_keeps_size_and_time_is_noticed(scan, yolo_set, settled):
    file = yolo_set({"a.jpg": BOX, "b.jpg": BOX})
    before, path = scan(file), file.parent / "set" / "images" / "train" / "a.jpg"
    status, content = path.stat(), path.read_bytes()
    time.sleep(0.02)  # the system's clock ticks every 10 ms at most
    path.write_bytes(content[:-2] + b"xx")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = scan(file)
    assert (len(before), len(after)) == (2, 1)
    assert "truncated" in after.problems[0].cause


@pytest.mark.parametrize("kind", ["label", "JSON"])
def test_an_edit_that_keeps_size_and_time_is_noticed(
    scan, yolo_set, coco_set, tmp_path, kind, settled
):
    yolo, coco = yolo_set({"a.jpg": POLYGON, "b.jpg": BOX}), coco_set([ITEM])
    file, path, old, new = {
        "label": (yolo, tmp_path / "set" / "labels" / "train" / "a.txt", ".5 .75", ".5 .50"),
        "JSON": (coco, tmp_path / "coco" / "ann.json", "[1, 2, 3, 4]", "[1, 2, 3, 5]"),
    }[kind]
    before, status = scan(file), path.stat()
    time.sleep(0.02)  # the system's clock ticks every 10 ms at most
    path.write_text(path.read_text().replace(old, new))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = scan(file)
    boxes = {"label": [[16, 12, 48, 24]], "JSON": [[1, 2, 4, 7]]}
    assert after.records[0].boxes.tolist() == boxes[kind]
    assert before.fingerprint != after.fingerprint


def test_labels_images_and_names_that_change_are_noticed(scan, yolo_set, write_image):
    file = yolo_set({"a.jpg": "2 .5 .5 .5 .5\n", "b.jpg": None})
    assert scan(file).backgrounds == 1
    label = file.parent / "set" / "labels" / "train" / "b.txt"
    label.write_text(BOX)
    assert scan(file).backgrounds == 0
    label.unlink()
    assert scan(file).backgrounds == 1
    image = write_image(file.parent / "set" / "images" / "train" / "c.jpg")
    assert len(scan(file)) == 3
    image.unlink()
    assert len(scan(file)) == 2
    file.write_text(file.read_text().replace("['c0', 'c1', 'c2']", "['c0', 'c1']"))
    assert scan(file).boxes == 0


def test_fingerprint_is_of_the_content(scan, yolo_set, tmp_path):
    file = yolo_set({"a.jpg": BOX, "b.jpg": None})
    first = scan(file).fingerprint
    (tmp_path / "set").rename(tmp_path / "other")
    file.write_text(file.read_text().replace("path: set", "path: other"))
    assert scan(file).fingerprint == first
    assert scan(file, single_cls=True).fingerprint != first


class Payload:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def archive(**arrays):
    stream = BytesIO()
    np.savez(stream, **arrays)
    return stream.getvalue()


def signed(content):
    return cache._digest_of_rest(BytesIO(content)) + content


def changed(whole):
    with np.load(BytesIO(whole[32:]), allow_pickle=False) as arrays:
        return whole[:32] + archive(**{**arrays, "labels.image": arrays["labels.image"] + 99})


BAD = {
    "pickle": lambda whole, payload: pickle.dumps(payload),
    "object array": lambda whole, payload: signed(archive(texts=np.array([payload], object))),
    "truncated": lambda whole, payload: whole[:-200],
    "empty": lambda whole, payload: b"",
    "not an archive": lambda whole, payload: signed(b"text"),
    "whole, but of another content": lambda whole, payload: changed(whole),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_cache_is_reported_and_replaced(scan, yolo_set, cache_home, tmp_path, kind, capsys):
    file = yolo_set({"a.jpg": BOX + POLYGON, "b.jpg": None})
    first, path = repr(scan(file)), kept(cache_home)
    path.write_bytes(BAD[kind](path.read_bytes(), Payload(tmp_path / "marker")))
    capsys.readouterr()
    assert repr(scan(file)) == first
    assert f"warning: {path}: not a usable scan cache" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    assert repr(scan(file)) == first
    assert "warning" not in capsys.readouterr().err


def test_a_cache_in_the_data_set_is_never_read(scan, yolo_set, tmp_path):
    file = yolo_set({"a.jpg": BOX})
    for name in ("labels/train.cache", "images/train.cache", "labels/train/a.cache"):
        (tmp_path / "set" / name).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    assert scan(file).boxes == 1
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("blocked", ["folder", "disk"])
def test_without_a_writable_cache_folder_it_works_with_one_warning(
    scan, yolo_set, cache_home, blocked, monkeypatch, capsys
):
    def full(_):
        raise OSError(28, "No space left on device")

    file = yolo_set({"a.jpg": BOX, "b.jpg": BOX + "0 .5 .5 0 0\n"})
    if blocked == "folder":  # as root, rights do not stop anybody: a file stands in its place
        (cache_home / "featherdet").write_text("")
    else:
        monkeypatch.setattr(os, "fsync", full)
    assert scan(file).boxes == 2
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert "no scan cache, so every start scans again" in error
    assert not list(cache_home.rglob("*.tmp"))


def test_the_cache_lies_in_the_users_folder(scan, yolo_set, cache_home, tmp_path, monkeypatch):
    file = yolo_set({"a.jpg": BOX})
    before = sorted(tmp_path.rglob("*"))
    scan(file)
    assert sorted(tmp_path.rglob("*")) == before
    assert kept(cache_home).name.startswith("set-train-")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(cache.cache_file("x", "y")).startswith("/home/somebody/.cache/featherdet/x-")


def test_records_of_spawned_workers_lie_in_one_block(scan, yolo_set):
    records = scan(yolo_set({"1.jpg": BOX + POLYGON, "b.jpg": None, "c.jpg": BOX})).records
    first, second = (pickle.loads(pickle.dumps(records)) for _ in range(2))
    assert repr(first) == repr(second) == repr(records)
    assert repr(pickle.loads(pickle.dumps(first))) == repr(records)
    first.labels[0] = 99
    assert second.labels[0] == 99
