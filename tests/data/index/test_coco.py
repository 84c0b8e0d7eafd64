import os

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from utils.errors import UserError


def box(number, image=7, category=9, **other):
    found = {"id": number, "image_id": image, "category_id": category}
    return {**found, "bbox": [10, 8, 20, 16], "area": 99.5, "iscrowd": 0, **other}


def test_boxes_by_hand_and_ids_there_and_back(scan, coco_set):
    crowd = box(5, iscrowd=1, segmentation={"size": [48, 64], "counts": "abc"})
    del crowd["area"]
    index = scan(coco_set([box(4, bbox=[1.5, 2, 3, 4]), box(2, image=3, category=2), crowd]))
    assert index.names == ("dog", "cat")
    assert index.category_ids == (2, 9)  # in rising order
    first, second = index.records
    assert (first.image_id, second.image_id) == (7, 3)
    np.testing.assert_array_equal(first.boxes, [[1.5, 2, 4.5, 6], [10, 8, 30, 24]])
    np.testing.assert_array_equal(first.areas, np.array([99.5, 320], np.float32))
    np.testing.assert_array_equal(first.crowd, [False, True])
    assert (first.labels.tolist(), second.labels.tolist()) == ([1, 1], [0])
    assert first.segments == (None, None)
    assert (index.boxes, index.crowds, index.backgrounds) == (2, 1, 0)


def test_largest_polygon_of_several(scan, coco_set):
    small, large = [1, 1, 3, 1, 3, 3], [10, 8, 30, 8, 30, 24, 70, 99]
    odd = [[1, 2, 3, 4, 5], ["a"] * 6, [1e300] * 6, [10**400, 1.5] * 3, [[1, 2], 3], "rle", None]
    items = [box(1, segmentation=[small, large]), box(2, bbox=[1, 1, 2, 2], segmentation=[small])]
    items += [box(3 + i, bbox=[i, 0, 9, 9], segmentation=[item]) for i, item in enumerate(odd)]
    segments = scan(coco_set(items)).records[0].segments
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
def test_a_bad_annotation_is_rejected_counted_and_named(scan, coco_set, tmp_path, change, cause):
    index = scan(coco_set([box(1), box(2, **change), box(3, image=3)]))
    (problem,) = index.problems
    assert problem.where == f"{tmp_path}/coco/ann.json: annotation 2 (a.jpg)"
    assert cause in problem.cause
    assert index.skipped("row") == 1
    assert [len(record.boxes) for record in index.records] == [1, 1]


def test_annotations_of_no_image(scan, coco_set):
    index = scan(coco_set([box(1), {}, None, "x", box(5, image=8)]))
    assert index.skipped("row") == 4
    assert all("is not in 'images'" in problem.cause for problem in index.problems)
    assert len(index) == 2


def test_an_image_with_bad_annotations_only_is_no_background(scan, coco_set):
    index = scan(coco_set([box(1, bbox=[1, 1, 0, 0]), box(2, image=3)]))
    assert [record.image_id for record in index.records] == [3]
    assert [problem.kind for problem in index.problems] == ["row", "image"]
    assert "none of its 1 annotations is usable" in index.problems[1].cause


def test_clipping_and_duplicates_are_counted(scan, coco_set):
    boxes = [[50, 40, 20, 20], [-5, -5, 10, 10], [0, 0, 64.05, 48]]
    items = [box(i, bbox=bbox) for i, bbox in enumerate(boxes)]
    items += [box("x"), box(2**70), box(6, iscrowd=1), box(7, category=2)]
    index = scan(coco_set(items))
    assert (index.clipped, index.duplicates) == (2, 1)
    expected = [[50, 40, 64, 48], [0, 0, 5, 5], [0, 0, 64, 48], *[[10, 8, 30, 24]] * 3]
    np.testing.assert_array_equal(index.records[0].boxes, expected)
    assert index.records[0].crowd.tolist() == [False, False, False, False, True, False]
    assert index.records[0].labels.tolist() == [1, 1, 1, 1, 1, 0]


def test_images_that_are_missing_repeated_or_of_another_size_are_named(scan, coco_set, tmp_path):
    images = [
        {"id": 7, "file_name": "a.jpg", "width": 640, "height": 480},
        {"id": 8, "file_name": "gone.jpg"},
        {"id": 3, "file_name": "b.jpg", "width": "64", "height": 48},
        {"id": 3, "file_name": "b.jpg"},
        {"id": 3, "file_name": "a.jpg"},
        {"id": 4},
        {"id": 5, "file_name": "a\0"},
        *({"id": 10 + i, "file_name": "b.jpg"} for i in range(2)),
    ]
    index = scan(coco_set([box(1)], images=images))
    assert [record.image_id for record in index.records] == [7, 3, 10, 11]
    assert [p.text.removeprefix(f"{tmp_path}/coco/") for p in index.problems] == [
        "ann.json: images[2]: height and width (48, '64') are not numbers of pixels",
        "ann.json: images[3]: id 3 (b.jpg) appears twice",
        "ann.json: images[4]: id 3 (a.jpg) appears twice; image skipped",
        "ann.json: images[5]: has no 'id' or no 'file_name'; image skipped",
        "ann.json: images[6]: a zero byte in 'file_name'; image skipped",
        f"pics/a.jpg: is 64x48 pixels, but 640x480 in {tmp_path}/coco/ann.json; boxes are used"
        " unchanged",
        "pics/gone.jpg: No such file or directory; image skipped",
    ]


def test_exif_turns_the_record(scan, coco_set, tmp_path):
    file = coco_set([box(1, bbox=[30, 50, 10, 10])])
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (64, 48)).save(tmp_path / "coco" / "pics" / "a.jpg", exif=exif)
    index = scan(file)
    assert (index.records[0].height, index.records[0].width) == (64, 48)
    np.testing.assert_array_equal(index.records[0].boxes, [[30, 50, 40, 60]])
    assert "is 48x64 pixels, but 64x48 in" in index.problems[0].cause


A = '{"images": [], "categories": [{"id": 1, "name": "a"}'


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        ("{\n'a': 1}", "ann.json:2: not JSON"),
        ("[]", "expected a COCO object, found a list"),
        ("{}", "'categories' is missing"),
        ('{"categories": {}}', "'categories' is a dict"),
        ('{"categories": []}', "'images' is missing"),
        ('{"categories": [], "images": [], "annotations": 3}', "'annotations' is a int"),
        ('{"categories": [{"id": 1}], "images": []}', "has no integer 'id' or no 'name'"),
        ('{"categories": [3], "images": []}', "category 3 has no integer 'id' or no 'name'"),
        ('{"categories": [], "images": []}', "0 categories"),
        (A + ', {"id": 1, "name": "b"}]}', "id 1 appears twice"),
        (A + ', {"id": 4, "name": "a"}]}', r"'a' has the ids \[1, 4\]"),
        (A + "]}", "no images found"),
        ("[" * 100_000, "not JSON"),
        ("\udcff", "not JSON"),
    ],
)
def test_files_that_are_no_coco_json(scan, coco_set, tmp_path, content, cause):
    file = coco_set([])
    (tmp_path / "coco" / "ann.json").write_text(content, errors="surrogateescape")
    with pytest.raises(UserError, match=cause):
        scan(file)


def test_paths_that_are_no_regular_file_and_no_folder(scan, tmp_path, coco_set):
    file = coco_set([box(1)])
    os.mkfifo(tmp_path / "coco" / "pipe.json")
    (tmp_path / "coco" / "zero.json").symlink_to("/dev/zero")
    for name, cause in {
        "no.json": "No such file",
        "pipe.json": "not a regular file",
        "zero.json": "not a regular file",
        "pics": "not a regular file",
    }.items():
        file.write_text(f"path: coco\ntrain: {{images: pics, annotations: {name}}}\n")
        with pytest.raises(UserError, match=rf"coco\.yaml:2: train: .*{name}: {cause}"):
            scan(file)
    file.write_text("path: coco\ntrain: {images: none, annotations: ann.json}\n")
    with pytest.raises(
        UserError, match=r"coco\.yaml:2: train: no such folder of images: .*/none .nothing is"
    ):
        scan(file)


def test_names_in_the_yaml_must_agree(scan, coco_set):
    file = coco_set([box(1)])
    text = file.read_text()
    file.write_text(text + "names: [dog, cat]\n")
    assert scan(file).names == ("dog", "cat")
    for names in ("[cat, dog]", "[dog]", "[dog, cat, cow]"):
        file.write_text(text + f"names: {names}\n")
        with pytest.raises(UserError, match=r"class \d is .* in 'names' but"):
            scan(file)


@pytest.fixture
def real(shared, yaml_file):
    """real(data set, name of the split) -> a YAML file, and its JSON file."""

    def write(name, split):
        folder = shared / "datasets" / name
        annotations = folder / "annotations" / f"instances_{split}.json"
        text = f"train: {{images: {folder / split}, annotations: {annotations}}}\n"
        return yaml_file(text), annotations

    return write


def test_equal_to_pycocotools_on_real_annotations(scan, real):
    file, annotations = real("coco_tiny", "val2017")
    index, coco = scan(file), COCO(str(annotations))
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


@pytest.mark.parametrize(("split", "expected"), [("train", (205, 2804, 1)), ("val", (87, 1137, 1))])
def test_bccd_has_one_box_without_area_in_each_split(scan, real, split, expected):
    index = scan(real("bccd", split)[0])
    assert (len(index), index.boxes, index.skipped("row")) == expected
    assert index.names == ("RBC", "WBC", "Platelets")
    assert split == "train" or "annotation 887 (BloodImage_00338.jpg)" in index.problems[0].where


def test_file_names_of_other_machines_are_found_by_their_last_part(
    scan, coco_set, tmp_path, monkeypatch
):
    """Until there is a file of the whole name; a name that two images would share is left out."""
    monkeypatch.setattr("data.index.dataset.MAX_BAD", 1)
    names = {7: "images\\a.jpg", 3: "/srv/upload/b.jpg", 8: "x/c.jpg", 9: "y/c.jpg", 5: "q/no.jpg"}
    images = [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in names.items()]
    pics = tmp_path / "coco" / "pics"
    file = coco_set([box(1), box(2, image=3)], images=images)
    (pics / "c.jpg").write_bytes((pics / "a.jpg").read_bytes())
    index = scan(file)
    assert [r.path for r in index.records] == [pics / "a.jpg", pics / "b.jpg"]
    assert [r.boxes.tolist() for r in index.records] == [[[10, 8, 30, 24]]] * 2
    texts = [problem.text for problem in index.problems]
    for n, folder in ((2, "x"), (3, "y")):
        text = f"images[{n}]: {folder}/c.jpg: no such file, and {pics}/c.jpg may be another image's"
        assert any(text in item for item in texts), texts
    assert f"{pics}/q/no.jpg: No such file or directory; image skipped" in texts
    (pics / "q").mkdir()
    (pics / "b.jpg").rename(pics / "q" / "no.jpg")  # noticed, although the JSON is as before
    assert [r.path for r in scan(file).records] == [pics / "a.jpg", pics / "q" / "no.jpg"]
