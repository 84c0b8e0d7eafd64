from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from data.index.dataset import load_dataset_config, load_split
from data.index.records import DataIndex
from utils.errors import UserError

Make = Callable[..., Path]


def scan(file: Path, split: str = "train") -> DataIndex:
    return load_split(load_dataset_config(str(file)), split, progress=False)


def box(number: int, image: int = 7, category: int = 9, **other: Any) -> dict[str, Any]:
    found = {"id": number, "image_id": image, "category_id": category}
    return {**found, "bbox": [10, 8, 20, 16], "area": 99.5, "iscrowd": 0, **other}


def test_ids_are_remapped_in_rising_order_and_restored(coco_set: Make) -> None:
    index = scan(coco_set([box(1), box(2, image=3, category=2)]))
    assert index.names == ("dog", "cat")
    assert index.category_ids == (2, 9)
    assert [record.image_id for record in index.records] == [7, 3]
    assert [index.category_ids[record.labels[0]] for record in index.records] == [9, 2]


def test_a_box_by_hand(coco_set: Make) -> None:
    crowd = box(5, iscrowd=1, segmentation={"size": [48, 64], "counts": "abc"})
    del crowd["area"]
    index = scan(coco_set([box(4, bbox=[1.5, 2, 3, 4]), crowd]))
    record = index.records[0]
    np.testing.assert_array_equal(record.boxes, [[1.5, 2, 4.5, 6], [10, 8, 30, 24]])
    np.testing.assert_array_equal(record.areas, np.array([99.5, 320], np.float32))
    np.testing.assert_array_equal(record.crowd, [False, True])
    assert record.segments == (None, None)
    assert (index.boxes, index.crowds, index.backgrounds) == (1, 1, 1)
    assert "1 boxes of 2 classes, 1 background, 1 crowd" in index.describe()


def test_largest_polygon_of_several(coco_set: Make) -> None:
    small, large = [1, 1, 3, 1, 3, 3], [10, 8, 30, 8, 30, 24, 70, 99]
    odd: list[Any] = [[1, 2, 3, 4, 5], ["a"] * 6, [1e300] * 6, "rle", None]
    items = [box(1, segmentation=[small, large]), box(2, bbox=[1, 1, 2, 2], segmentation=[small])]
    items += [box(3 + i, bbox=[i, 0, 9, 9], segmentation=[item]) for i, item in enumerate(odd)]
    segments = scan(coco_set(items)).records[0].segments
    assert segments[0] is not None
    np.testing.assert_array_equal(segments[0], [[10, 8], [30, 8], [30, 24], [64, 48]])
    np.testing.assert_array_equal(segments[1], [[1, 1], [3, 1], [3, 3]])
    assert segments[2:] == (None,) * len(odd)


BAD = {
    "no area": ({"bbox": [1, 1, 0, 0]}, "bbox [1, 1, 0, 0] has no area"),
    "negative width": ({"bbox": [1, 1, -5, 4]}, "has no area"),
    "inf": ({"bbox": [1, 1, float("inf"), 4]}, "is not four numbers"),
    "nan": ({"bbox": [float("nan"), 1, 2, 4]}, "is not four numbers"),
    "huge": ({"bbox": [1, 1, 10**400, 4]}, "is not four numbers"),
    "three numbers": ({"bbox": [1, 1, 4]}, "is not four numbers"),
    "text": ({"bbox": [1, 1, "4", 4]}, "is not four numbers"),
    "no bbox": ({"bbox": None}, "bbox None is not four numbers"),
    "area nan": ({"area": float("nan")}, "area nan is not a finite number"),
    "area negative": ({"area": -3}, "area -3 is not a finite number"),
    "area is text": ({"area": "big"}, "area 'big' is not a finite number"),
    "unknown category": ({"category_id": 1}, "category_id 1 is not in 'categories'"),
    "category is a list": ({"category_id": [9]}, "category_id [9] is not in 'categories'"),
    "outside": ({"bbox": [100, 8, 5, 5]}, "has no area inside the image"),
}


@pytest.mark.parametrize(("change", "cause"), BAD.values(), ids=BAD)
def test_a_bad_annotation_is_rejected_counted_and_named(
    coco_set: Make, tmp_path: Path, change: dict[str, Any], cause: str
) -> None:
    index = scan(coco_set([box(1), box(2, **change), box(3, image=3)]))
    (problem,) = index.problems
    assert problem.where == f"{tmp_path}/coco/ann.json: annotation 2 (a.jpg)"
    assert cause in problem.cause
    assert index.skipped("row") == 1
    assert [len(record.boxes) for record in index.records] == [1, 1]


@pytest.mark.parametrize("item", [{}, None, "x", {"id": 5, "image_id": 8, "bbox": [1, 1, 2, 2]}])
def test_annotations_of_no_image(coco_set: Make, item: Any) -> None:
    index = scan(coco_set([box(1), item]))
    assert index.skipped("row") == 1
    assert "is not in 'images'" in index.problems[0].cause
    assert len(index.records) == 2


def test_an_image_with_bad_annotations_only_is_no_background(coco_set: Make) -> None:
    index = scan(coco_set([box(1, bbox=[1, 1, 0, 0]), box(2, image=3)]))
    assert [record.image_id for record in index.records] == [3]
    assert [problem.kind for problem in index.problems] == ["row", "image"]
    assert "none of its 1 annotations is usable" in index.problems[1].cause


def test_clipping_and_duplicates_are_counted(coco_set: Make) -> None:
    over = [
        box(1, bbox=[50, 40, 20, 20]),
        box(2, bbox=[-5, -5, 10, 10]),
        box(3, bbox=[0, 0, 64.05, 48]),
    ]
    same = [box(4), box(5), box(6, iscrowd=1), box(7, category=2)]
    index = scan(coco_set([*over, *same]))
    np.testing.assert_array_equal(
        index.records[0].boxes[:3], [[50, 40, 64, 48], [0, 0, 5, 5], [0, 0, 64, 48]]
    )
    assert index.clipped == 2
    assert index.duplicates == 1
    assert index.records[0].crowd.tolist() == [False, False, False, False, True, False]
    assert index.records[0].labels.tolist() == [1, 1, 1, 1, 1, 0]


def test_missing_images_and_other_sizes_are_said(coco_set: Make) -> None:
    images = [
        {"id": 7, "file_name": "a.jpg", "width": 640, "height": 480},
        {"id": 8, "file_name": "gone.jpg"},
        {"id": 3, "file_name": "b.jpg"},
        {"id": 3, "file_name": "b.jpg"},
        {"id": 4},
    ]
    index = scan(coco_set([box(1)], images=images))
    assert [record.image_id for record in index.records] == [7, 3]
    causes = {problem.where.rpartition("/")[2]: problem for problem in index.problems}
    assert "64x48 pixels, but 640x480 in" in causes["a.jpg"].cause
    assert causes["a.jpg"].kind == "note"
    assert causes["gone.jpg"].cause == "No such file or directory"
    assert "id 3 (b.jpg) appears twice" in causes["ann.json: images[3]"].cause
    assert causes["ann.json: images[3]"].kind == "note"
    assert causes["ann.json: images[4]"].kind == "image"
    assert index.skipped() == 2


def test_exif_turns_the_record(coco_set: Make, tmp_path: Path) -> None:
    file = coco_set([box(1, bbox=[30, 50, 10, 10])])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "coco" / "pics" / "a.jpg", exif=exif)
    index = scan(file)
    assert (index.records[0].height, index.records[0].width) == (64, 48)
    np.testing.assert_array_equal(index.records[0].boxes, [[30, 50, 40, 60]])
    assert "is 48x64 pixels, but 64x48 in" in index.problems[0].cause


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{\n'a': 1}", "ann.json:2: not JSON"),
        ("[]", "expected a COCO object, found a list"),
        ("{}", "'categories' is missing"),
        ('{"categories": {}}', "'categories' is a dict"),
        ('{"categories": [{"id": 1}], "images": []}', "lacks a whole 'id' or a 'name'"),
        ('{"categories": [], "images": []}', "0 categories"),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], "images": []}',
            "id 1 appears twice",
        ),
        (
            '{"categories": [{"id": 1, "name": "a"}, {"id": 4, "name": "a"}], "images": []}',
            r"the ids \[1, 4\]",
        ),
        ('{"categories": [{"id": 1, "name": "a"}]}', "'images' is missing"),
        ('{"categories": [{"id": 1, "name": "a"}], "images": []}', "no images found"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_files_that_are_no_coco_json(
    coco_set: Make, tmp_path: Path, content: str, cause: str
) -> None:
    file = coco_set([])
    (tmp_path / "coco" / "ann.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=cause):
        scan(file)


def test_images_without_any_annotations_are_said_loudly(
    coco_set: Make, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scan(coco_set([])).backgrounds == 2
    assert "NOT ONE BOX in 2 images" in capsys.readouterr().err


def test_missing_folder_and_file(tmp_path: Path, coco_set: Make) -> None:
    file = coco_set([box(1)])
    file.write_text(
        "path: coco\ntrain: {images: pics, annotations: no.json}\nval: {images: none, annotations: ann.json}\n"
    )
    with pytest.raises(UserError, match=r"coco\.yaml:2: train: .*no\.json: No such file"):
        scan(file)
    with pytest.raises(UserError, match=r"coco\.yaml:3: val: no such folder of images: .*/none$"):
        scan(file, "val")


def test_names_in_the_yaml_must_agree(coco_set: Make) -> None:
    file = coco_set([box(1)])
    text = file.read_text()
    file.write_text(text + "names: [dog, cat]\n")
    assert scan(file).names == ("dog", "cat")
    for names in ("[cat, dog]", "[dog]", "[dog, cat, cow]"):
        file.write_text(text + f"names: {names}\n")
        with pytest.raises(UserError, match=r"class \d is .* in 'names' but"):
            scan(file)


def test_equal_to_pycocotools_on_real_annotations(shared: Path, tmp_path: Path) -> None:
    folder = shared / "datasets" / "coco_tiny"
    file = tmp_path / "tiny.yaml"
    file.write_text(
        f"path: {folder}\nval: {{images: val2017, annotations: annotations/instances_val2017.json}}\n"
    )
    index = scan(file, "val")
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(folder / "annotations" / "instances_val2017.json"))
    assert [record.image_id for record in index.records] == [
        im["id"] for im in coco.dataset["images"]
    ]
    assert index.category_ids == tuple(sorted(coco.getCatIds()))
    assert index.names == tuple(item["name"] for item in coco.loadCats(list(index.category_ids)))
    assert index.crowds == sum(item["iscrowd"] for item in coco.dataset["annotations"]) > 0
    for record in index.records:
        items = coco.loadAnns(coco.getAnnIds(imgIds=record.image_id))
        xywh = np.array([item["bbox"] for item in items])
        corners = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1)
        np.testing.assert_allclose(record.boxes, corners, atol=0.02)
        np.testing.assert_allclose(record.areas, [item["area"] for item in items], rtol=1e-6)
        ids = [index.category_ids[label] for label in record.labels]
        assert ids == [item["category_id"] for item in items]
        for segment, item in zip(record.segments, items, strict=True):
            assert (segment is None) == isinstance(item["segmentation"], dict)


def test_bccd_has_one_box_without_area_in_each_split(shared: Path, tmp_path: Path) -> None:
    file = tmp_path / "bccd.yaml"
    lines = [f"path: {shared / 'datasets' / 'bccd'}"]
    lines += [
        f"{s}: {{images: {s}, annotations: annotations/instances_{s}.json}}"
        for s in ("train", "val")
    ]
    file.write_text("\n".join(lines))
    train, val = scan(file, "train"), scan(file, "val")
    assert (len(train.records), train.boxes, train.skipped("row")) == (205, 2804, 1)
    assert (len(val.records), val.boxes, val.skipped("row")) == (87, 1137, 1)
    assert "annotation 887 (BloodImage_00338.jpg)" in val.problems[0].where
    assert val.names == train.names == ("RBC", "WBC", "Platelets")
    count = len(
        json.loads((shared / "datasets/bccd/annotations/instances_val.json").read_text())[
            "annotations"
        ]
    )
    assert count == 1138


@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_annotations_are_a_regular_file(coco_set: Make, tmp_path: Path, kind: str) -> None:
    file = coco_set([])
    path = tmp_path / "coco" / "ann.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero")
    with pytest.raises(UserError, match=r"coco.yaml:2: train: .*ann\.json: not a regular file"):
        scan(file)
