from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest

import data.index.cache
import data.index.dataset
from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex

Make = Callable[..., Path]
BOX = "0 0.5 0.5 0.25 0.5\n"
POLYGON = "1 .25 .25 .75 .25 .5 .75\n"


def scan(file: Path) -> DataIndex:
    return load_split(load_dataset_config(str(file)), "train", progress=False)


def cache_of(cache_home: Path) -> Path:
    (file,) = (cache_home / "featherdet").glob("*.scan")
    return file


def same(a: DataIndex, b: DataIndex) -> None:
    assert (a.names, a.category_ids, a.problems) == (b.names, b.category_ids, b.problems)
    assert (a.fingerprint, a.clipped, a.duplicates) == (b.fingerprint, b.clipped, b.duplicates)
    for x, y in zip(a.records, b.records, strict=True):
        assert (x.path, x.height, x.width, x.image_id) == (y.path, y.height, y.width, y.image_id)
        for name in ("boxes", "labels", "crowd", "areas"):
            np.testing.assert_array_equal(getattr(x, name), getattr(y, name))
            assert getattr(x, name).dtype == getattr(y, name).dtype
        for p, q in zip(x.segments, y.segments, strict=True):
            assert (p is None) == (q is None)
            if p is not None:
                np.testing.assert_array_equal(p, q)


@pytest.fixture
def no_parsing(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called: from now on neither labels nor images may be read as new."""

    def forbid(*_: object, **__: object) -> None:
        raise AssertionError("was read again")

    def apply() -> None:
        monkeypatch.setattr("data.index.yolo.split_rows", forbid)
        monkeypatch.setattr("data.index.coco._parse", forbid)
        monkeypatch.setattr("data.index.scan.decode_image", forbid)
        monkeypatch.setattr("data.index.dataset.save_cache", forbid)

    return apply


def test_second_start_equals_the_first_and_reads_nothing_anew(
    yolo_set: Make, no_parsing: Callable[[], None]
) -> None:
    file = yolo_set({"a.jpg": BOX + POLYGON, "b.jpg": None, "c.jpg": BOX + "9 1 1 1 1\n"})
    (file.parent / "set" / "images" / "train" / "gone.jpg").symlink_to("nothing")
    first = scan(file)
    no_parsing()
    same(scan(file), first)


def test_the_same_for_coco(coco_set: Make, no_parsing: Callable[[], None]) -> None:
    item = {"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4], "area": 5}
    rle = {"iscrowd": 1, "segmentation": {"counts": "x", "size": [1, 1]}}
    polygon = {"segmentation": [[1, 2, 4, 2, 4, 6]]}
    file = coco_set(
        [item, {**item, **rle}, {**item, "category_id": 2, **polygon}, {**item, "bbox": []}]
    )
    first = scan(file)
    no_parsing()
    same(scan(file), first)


def test_labels_edited_in_place_are_noticed(yolo_set: Make) -> None:
    file = yolo_set({"a.jpg": BOX, "b.jpg": BOX})
    before = scan(file)
    label = file.parent / "set" / "labels" / "train" / "a.txt"
    status = label.stat()
    label.write_text("1" + BOX[1:])
    os.utime(label, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert label.stat().st_size == status.st_size
    after = scan(file)
    assert (before.records[0].labels[0], after.records[0].labels[0]) == (0, 1)
    assert before.fingerprint != after.fingerprint


def test_json_edited_in_place_is_noticed(coco_set: Make, tmp_path: Path) -> None:
    file = coco_set([{"id": 1, "image_id": 7, "category_id": 9, "bbox": [1, 2, 3, 4]}])
    scan(file)
    path = tmp_path / "coco" / "ann.json"
    status = path.stat()
    path.write_text(path.read_text().replace("[1, 2, 3, 4]", "[1, 2, 3, 5]"))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert scan(file).records[0].boxes.tolist() == [[1, 2, 4, 7]]


def test_labels_and_images_that_come_and_go_are_noticed(yolo_set: Make, write_image: Make) -> None:
    file = yolo_set({"a.jpg": BOX, "b.jpg": None})
    assert scan(file).backgrounds == 1
    label = file.parent / "set" / "labels" / "train" / "b.txt"
    label.write_text(BOX)
    assert scan(file).backgrounds == 0
    label.unlink()
    assert scan(file).backgrounds == 1
    image = write_image(file.parent / "set" / "images" / "train" / "c.jpg")
    assert len(scan(file).records) == 3
    image.unlink()
    assert len(scan(file).records) == 2


def test_other_names_are_noticed(yolo_set: Make) -> None:
    file = yolo_set({"a.jpg": "2 .5 .5 .5 .5\n", "b.jpg": BOX})
    assert scan(file).boxes == 2
    file.write_text(file.read_text().replace("['c0', 'c1', 'c2']", "['c0', 'c1']"))
    assert scan(file).boxes == 1


def test_fingerprint_is_of_the_content(yolo_set: Make, tmp_path: Path) -> None:
    file = yolo_set({"a.jpg": BOX, "b.jpg": None})
    first = scan(file).fingerprint
    (tmp_path / "set").rename(tmp_path / "other")
    file.write_text(file.read_text().replace("path: set", "path: other"))
    assert scan(file).fingerprint == first
    single = load_split(load_dataset_config(str(file)), "train", single_cls=True, progress=False)
    assert single.fingerprint != first


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


def poison(file: Path, kind: str, marker: Path) -> None:
    if kind == "pickle":
        file.write_bytes(pickle.dumps(Payload(marker)))
    elif kind == "object array":
        objects = np.empty(1, object)
        objects[0] = Payload(marker)
        stream = BytesIO()
        np.savez(stream, texts=objects)
        arrays = stream.getvalue()
        file.write_bytes(data.index.cache._digest(arrays) + arrays)
    elif kind == "truncated":
        file.write_bytes(file.read_bytes()[:-200])
    elif kind == "text":
        file.write_text("hello")
    elif kind == "empty":
        file.write_bytes(b"")
    else:  # a whole file of another content
        content = file.read_bytes()
        digest, rest = content[:32], content[32:]
        with np.load(BytesIO(rest), allow_pickle=False) as arrays:
            columns = dict(arrays)
        stream = BytesIO()
        np.savez(stream, **{**columns, "image": columns["image"] + 99})
        if kind == "written by another program":
            digest = data.index.cache._digest(stream.getvalue()[:-1])
        elif kind == "not a cache":
            stream = BytesIO(b"text")
            digest = data.index.cache._digest(b"text")
        file.write_bytes(digest + stream.getvalue())


@pytest.mark.parametrize(
    "kind",
    [
        "pickle",
        "object array",
        "truncated",
        "text",
        "empty",
        "changed",
        "written by another program",
        "not a cache",
    ],
)
def test_a_bad_cache_is_reported_and_replaced(
    yolo_set: Make, cache_home: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = yolo_set({"a.jpg": BOX + POLYGON, "b.jpg": None})
    first = scan(file)
    poison(cache_of(cache_home), kind, tmp_path / "marker")
    capsys.readouterr()
    same(scan(file), first)
    assert f"warning: {cache_of(cache_home)}: not a usable scan cache" in capsys.readouterr().err
    assert not (tmp_path / "marker").exists()
    same(scan(file), first)
    assert "warning" not in capsys.readouterr().err


def test_a_cache_in_the_data_set_is_never_read(yolo_set: Make, tmp_path: Path) -> None:
    file = yolo_set({"a.jpg": BOX})
    for place in ("labels/train.cache", "images/train.cache", "labels/train/a.cache"):
        (tmp_path / "set" / place).write_bytes(pickle.dumps(Payload(tmp_path / "marker")))
    assert scan(file).boxes == 1
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("blocked", ["folder", "file"])
def test_without_a_writable_cache_folder_it_works_with_one_warning(
    yolo_set: Make,
    cache_home: Path,
    blocked: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = yolo_set({"a.jpg": BOX, "b.jpg": BOX + "0 .5 .5 0 0\n"})
    if (
        blocked == "folder"
    ):  # as root, rights do not stop anybody: a file stands where a folder should
        (cache_home / "featherdet").write_text("")
    else:
        monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "full")))
    assert scan(file).boxes == 2
    error = capsys.readouterr().err
    assert error.count("warning") == 1
    assert "no scan cache, every start scans again" in error
    assert not list(cache_home.rglob("*.tmp"))


def test_the_cache_lies_in_the_users_folder(
    yolo_set: Make, cache_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = yolo_set({"a.jpg": BOX})
    before = sorted(tmp_path.rglob("*"))
    scan(file)
    assert sorted(tmp_path.rglob("*")) == before
    assert cache_of(cache_home).name.startswith("set-train-")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(data.index.cache.cache_file("x", "y")).startswith(
        "/home/somebody/.cache/featherdet/x-"
    )


def test_second_start_is_fast(shared: Path, tmp_path: Path) -> None:
    file = tmp_path / "bccd.yaml"
    folder = shared / "datasets" / "bccd"
    file.write_text(
        f"path: {folder}\ntrain: {{images: train, annotations: annotations/instances_train.json}}\n"
    )
    scan(file)
    start = time.perf_counter()
    scan(file)
    assert time.perf_counter() - start < 2  # measured: 0.1
