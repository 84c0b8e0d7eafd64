"""Exports as the annotation tools write them -> data sets, by values."""

import json
import re
from xml.sax.saxutils import escape

import numpy as np
import pytest

from data.convert.command import FORMATS, main
from data.index.dataset import load_dataset_config, load_split
from utils.errors import PartlyDoneError, UserError

BOX = "0 0.5 0.5 0.25 0.5\n"  # of a 64x48 image: 24 12 40 36


def xml(objects, difficult=0):
    parts = []
    for name, corners in objects:
        names = ("xmin", "ymin", "xmax", "ymax")
        box = "".join(f"<{n}>{c}</{n}>" for n, c in zip(names, corners, strict=True))
        parts.append(
            f"<object><name>{escape(name)}</name><difficult>{difficult}</difficult>"
            f"<bndbox>{box}</bndbox></object>"
        )
    return f"<annotation><filename>other.jpg</filename>{''.join(parts)}</annotation>"


def shape(label, points, kind="rectangle"):
    return {"label": label, "points": points, "shape_type": kind, "group_id": None, "flags": {}}


@pytest.fixture
def src(tmp_path, write_image):
    """src({'a.jpg': None, 'a.xml': text, 'j.json': object}) -> the folder of these files."""

    def make(files):
        for name, content in files.items():
            path = tmp_path / "src" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                write_image(path)
            elif isinstance(content, bytes):
                path.write_bytes(content)
            else:
                path.write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / "src"

    return make


@pytest.fixture
def convert(tmp_path, capsys):
    """convert(format, SRC, *flags) -> (boxes by split and file name, stdout); SRC is unchanged."""

    def run(kind, folder, *flags, skips=None):
        before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        argv = [kind, str(folder), str(tmp_path / "out"), *flags]
        if skips is None:
            main(argv)
        else:
            with pytest.raises(PartlyDoneError, match=skips):
                main(argv)
        assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
        config = load_dataset_config(str(tmp_path / "out"))
        found = {}
        for split in config.splits:
            index = load_split(config, split)
            assert not index.problems
            for record in index.records:
                rows = zip(record.labels, record.boxes.tolist(), record.crowd, strict=True)
                found[split, record.path.name] = [
                    (index.names[i], box) + (("crowd",) if crowd else ()) for i, box, crowd in rows
                ]
        return found, capsys.readouterr()

    return run


def test_labelimg_voc_beside_its_images(src, convert):
    objects = [("dog", (1, 2, 11, 22)), ("a<b", (0, 0, 3.5, 4))]
    folder = src({
        "x_2.jpg": None, "x_2.xml": xml(objects), "x_10.jpg": None, "empty_3.png": None,
        "x_10.xml": xml([("dog", (5, 6, 7, 8))], difficult=1), "classes.txt": "dog\ncat\n",
    })  # fmt: skip
    found, printed = convert("voc", folder, "--val", "0")
    assert found == {
        ("train", "x_2.jpg"): [("dog", [1, 2, 11, 22]), ("a<b", [0, 0, 3.5, 4])],
        ("train", "x_10.jpg"): [("dog", [5, 6, 7, 8], "crowd")],
        ("train", "empty_3.png"): [],
    }
    out = folder.parent / "out"
    assert printed.out == (
        "train: 3 images, 2 boxes, 1 background, 1 crowd\n  a<b 1, dog 1\n"
        f"wrote {out}/data.yaml; to train:\n  python train.py --data {out}\n"
    )
    assert "1 of 3 images have no .xml file: background" in printed.err
    data = json.loads((out / "annotations" / "instances_train.json").read_text())
    assert data["annotations"][1] == {
        "id": 2, "image_id": 2, "category_id": 1, "bbox": [0, 0, 3.5, 4], "area": 14, "iscrowd": 0
    }  # fmt: skip
    assert (out / "train" / "x_2.jpg").read_bytes() == (folder / "x_2.jpg").read_bytes()


def test_vocs_own_lists_folders_and_the_order_of_classes(src, convert):
    files = {"ImageSets/Main/train.txt": "a_1\r\n\nb_2\n", "ImageSets/Main/val.txt": "c_3"}
    for name in ("a_1", "b_2", "c_3", "d_4"):
        files[f"JPEGImages/{name}.jpg"] = None
        files[f"Annotations/{name}.xml"] = xml([("dog", (1, 2, 11, 22))])
    found, printed = convert("voc", src(files), "--classes", "cat", "dog")
    assert sorted(found) == [("train", "a_1.jpg"), ("train", "b_2.jpg"), ("val", "c_3.jpg")]
    assert "1 images are in none of the lists" in printed.err
    assert "warning: val has no box of cat" in printed.err


def test_bccd_comes_back(shared, tmp_path, convert):
    source = shared / "datasets" / "bccd"
    data = json.loads((source / "annotations" / "instances_val.json").read_text())
    names = {item["id"]: item["name"] for item in data["categories"]}
    for image in data["images"]:
        objects = [
            (names[item["category_id"]], (x, y, x + w, y + h))
            for item in data["annotations"]
            if item["image_id"] == image["id"]
            for x, y, w, h in [item["bbox"]]
        ]
        file = tmp_path / "voc" / image["file_name"]
        file.parent.mkdir(exist_ok=True)
        file.symlink_to(source / "val" / file.name)
        file.with_suffix(".xml").write_text(xml(objects))
    flags = ("--classes", "RBC", "WBC", "Platelets", "--val", "0", "--link")
    convert("voc", tmp_path / "voc", *flags, skips="0 images, 1 boxes")
    made = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert made["images"] == data["images"]
    boxes = [item for item in data["annotations"] if item["area"]]  # one box has none
    assert made["annotations"] == [{**item, "id": i} for i, item in enumerate(boxes, start=1)]
    assert [(c["id"], c["name"]) for c in made["categories"]] == [*names.items()]
    copy = tmp_path / "out" / "train" / data["images"][0]["file_name"]
    assert copy.is_symlink()
    assert copy.resolve() == (source / "val" / copy.name).resolve()


def test_labelme_shapes(src, convert):
    shapes = [
        shape("dog", [[11, 22], [1, 2]]),  # drawn upwards
        shape("dog", [[1, 1], [9, 1], [9, 7]], "polygon"),
        shape("ball", [[20, 20], [23, 24]], "circle"),
        shape("dog", [[1, 1], [9, 9]], "line"),
        shape("dog", [[3, 3]], "point"),
        shape("", [[1, 1], [9, 9]]),
        shape("dog", [["a", 1], [9, 9]]),
    ]
    files = {"a.jpg": None, "a.json": {"imagePath": "a.jpg", "imageData": None, "shapes": shapes}}
    folder = src({**files, "b.jpg": None, "b.json": {"version": 1}, "lost.json": {"shapes": []}})
    found, printed = convert("labelme", folder, "--val", "0", skips="skipped: 2 images, 4 boxes")
    assert found == {
        ("train", "a.jpg"): [
            ("dog", [1, 2, 11, 22]), ("dog", [1, 1, 9, 7]), ("ball", [15, 15, 25, 25])
        ]
    }  # fmt: skip
    problems = (folder.parent / "out" / "problems.txt").read_text().splitlines()
    for text in (
        "lost.json: no image with this name; image skipped",
        "b.json: no list 'shapes'; not a file of labelme; image skipped",
        "a.json: object 4: a line has no area; box skipped",
        "a.json: object 5: a point has no area; box skipped",
        "a.json: object 6: has no name; box skipped",
    ):
        assert f"{folder}/{text}" in problems
        assert text in printed.err
    data = json.loads((folder.parent / "out" / "annotations" / "instances_train.json").read_text())
    assert data["annotations"][1]["segmentation"] == [[1, 1, 9, 1, 9, 7]]


def test_label_studio_yolo_is_split_the_same_way_each_time(src, convert, tmp_path):
    files = {"classes.txt": "cat\r\ndog\r\n", "notes.json": {"categories": [], "info": {}}}
    for i in range(10):
        files[f"images/{i}f-p.jpg"] = None
        files[f"labels/{i}f-p.txt"] = f"{i % 2} 0.5 0.5 0.{i + 1:02} 0.5\n"
    folder = src(files)
    first, printed = convert("yolo", folder)
    assert printed.out.startswith("train: 8 images, 8 boxes, 0 background\n")
    assert sorted(split for split, _ in first) == ["train"] * 8 + ["val"] * 2
    index = load_split(load_dataset_config(str(tmp_path / "out")), "train")
    original = {name: box for (_, name), box in first.items()}
    for i in range(10):
        width = float(f"0.{i + 1:02}")
        corners = np.float32([(0.5 - width / 2) * 64, 12, (0.5 + width / 2) * 64, 36])
        assert original[f"{i}f-p.jpg"] == [(("cat", "dog")[i % 2], corners.tolist())]
    assert index.names == ("cat", "dog")
    (tmp_path / "out").rename(tmp_path / "first")
    assert convert("yolo", folder)[0] == first
    (tmp_path / "out").rename(tmp_path / "second")
    assert convert("yolo", folder, "--seed", "1")[0] != first
    (tmp_path / "out").rename(tmp_path / "third")
    assert sum(split == "val" for split, _ in convert("yolo", folder, "--val", ".5")[0]) == 5


def test_cvat_yolo_1_1_and_folders_named_like_splits(src, convert):
    files = {"obj.names": "cat\n", "obj.data": "classes = 1\nnames = data/obj.names\n"}
    for part, name in (("train", "a"), ("valid", "b")):
        files[f"obj_{part}_data/{name}.jpg"] = None
        files[f"obj_{part}_data/{name}.txt"] = BOX
        files[f"{part}.txt"] = f"data/obj_{part}_data/{name}.jpg\n"
    found, _ = convert("yolo", src(files))
    box = [("cat", [24, 12, 40, 36])]
    assert found == {("train", "a.jpg"): box, ("val", "b.jpg"): box}


def test_coco_of_label_studio_with_paths_of_its_server(src, convert):
    names = (r"..\..\label-studio\media\upload\4\a.jpg", "images/b.jpg", "/data/c.jpg")
    data = {
        "images": [{"id": i, "file_name": name, "width": 64, "height": 48} for i, name in enumerate(names)],
        "categories": [{"id": 0, "name": "cat"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 0, "bbox": [i, 8, 20.25, 16], "ignore": 0,
             "iscrowd": 0, "area": 320, "segmentation": []} for i in range(3)
        ],
    }  # fmt: skip
    folder = src({"result.json": data, **{f"images/{name}.jpg": None for name in "abc"}})
    found, _ = convert("coco", folder, "--val", "0.34")
    assert {name: box for (_, name), box in found.items()} == {
        f"{name}.jpg": [("cat", [i, 8, i + 20.25, 24])] for i, name in enumerate("abc")
    }
    assert sorted(split for split, _ in found) == ["train", "train", "val"]


@pytest.mark.parametrize("home", ["images/default", "images", "default", "", "images/train"])
def test_coco_of_cvat_wherever_its_images_are(src, convert, home):
    data = {
        "images": [{"id": 1, "file_name": "a.jpg", "width": 64, "height": 48}],
        "categories": [{"id": 1, "name": "cat", "supercategory": ""}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 2, 3, 4]}],
    }
    folder = src({"annotations/instances_default.json": data, f"{home}/a.jpg".lstrip("/"): None})
    assert convert("coco", folder, "--val", "0")[0] == {("train", "a.jpg"): [("cat", [1, 2, 4, 6])]}


def test_roboflows_coco_keeps_its_splits(src, convert):
    files = {}
    for part, name in (("train", "a"), ("valid", "b"), ("test", "c")):
        files[f"{part}/{name}.jpg"] = None
        files[f"{part}/_annotations.coco.json"] = {
            "images": [{"id": 0, "file_name": f"{name}.jpg", "width": 64, "height": 48}],
            "categories": [{"id": 0, "name": "cells"}, {"id": 1, "name": "red"}],
            "annotations": [{"id": 0, "image_id": 0, "category_id": 1, "bbox": [1, 2, 3, 4]}],
        }
    found, _ = convert("coco", src(files))
    box = [("red", [1, 2, 4, 6])]
    assert found == {("train", "a.jpg"): box, ("val", "b.jpg"): box, ("test", "c.jpg"): box}


def test_images_of_one_name_keep_their_folders(src, convert, tmp_path):
    files = {
        f"{folder}/a{end}": text for folder in "xy" for end, text in ((".jpg", None), (".txt", BOX))
    }
    convert("yolo", src(files), "--classes", "cat", "--val", "0")
    data = json.loads((tmp_path / "out" / "annotations" / "instances_train.json").read_text())
    assert [image["file_name"] for image in data["images"]] == ["x/a.jpg", "y/a.jpg"]
    assert (tmp_path / "out" / "train" / "y" / "a.jpg").is_file()


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("<annotation>", r"a\.xml: not XML: .*; image skipped"),
        ("<annotation><object/></annotation>", "object 1: has no name"),
        (xml([("dog", (1, 2, 3, "x"))]), r"object 1: dog: box \['1', '2', '3', 'x'\] is not four"),
        (xml([("dog", (1, 2, 3, "nan"))]), "is not four numbers"),
        (xml([("dog", (5, 2, 3, 4))]), "has no area"),
        (xml([("dog", (70, 2, 90, 4))]), r"annotation 1 \(a\.jpg\): box .* has no area inside"),
        ("<annotation><object><name>dog</name></object></annotation>", "is not four numbers"),
        ('<!DOCTYPE a [<!ENTITY b "dog">]><annotation/>', "has a DTD"),
        ('<!DOCTYPE a [<!ENTITY b "dog">]><annotation/>'.encode("utf-16"), "has a DTD"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "has a DTD"),
    ],
)
def test_what_is_wrong_with_an_xml_file_is_named_and_its_image_skipped(src, convert, text, cause):
    good = {"b.jpg": None, "b.xml": xml([("dog", (1, 2, 3, 4))])}
    folder = src({"a.jpg": None, "a.xml": text, **good})
    found, printed = convert("voc", folder, "--val", "0", skips=r"skipped: 1 images, [01] boxes")
    assert found == {("train", "b.jpg"): [("dog", [1, 2, 3, 4])]}
    assert re.search(cause, printed.err), printed.err


@pytest.mark.parametrize(
    ("kind", "files", "flags", "cause"),
    [
        ("voc", {"a.jpg": None}, (), r"no image below .* has an object in a \*\.xml file"),
        ("voc", {"a.xml": xml([("dog", (1, 2, 3, 4))])}, (), "no image below"),
        ("voc", {"a.jpg": None, "a.xml": xml([("cow", (1, 2, 3, 4))])}, ("--classes", "cows"),
         r"a\.xml: class 'cow' is not one of --classes; did you mean 'cows'"),
        ("voc", {"a.jpg": None}, ("--classes", "a", "a"), "a name appears twice: a a"),
        ("voc", {"a.jpg": None}, ("--images", "nowhere"), "nowhere: no such folder"),
        ("coco", {"a.jpg": None}, ("--images", "nowhere"), "nowhere: no such folder"),
        ("yolo", {"a.jpg": None}, (), "neither a data.yaml nor classes.txt nor obj.names"),
        ("yolo", {"a.jpg": None, "classes.txt": "a\na\n"}, (), r"classes\.txt: expected one name"),
        ("yolo", {"a.jpg": None}, ("--images", "."), "--images: images and labels of YOLO"),
        ("coco", {"a.json": {"x": 1}}, (), "no COCO JSON"),
        ("coco", {"a.json": {"x": 1}}, ("--classes", "a"), "a COCO JSON brings its own class names"),
        ("coco", {"a.json": {"categories": [], "images": [{"file_name": "q.jpg"}]}}, (),
         r"its first image q\.jpg is not in .*--images DIR"),
        ("coco", {f"{n}.json": {"categories": [], "images": [{"file_name": "a.jpg"}]} for n in "ab"}
         | {"a.jpg": None}, (), "could both be train; give one file as SRC"),
    ],
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(src, tmp_path, kind, files, flags, cause):
    with pytest.raises(UserError, match=cause):
        main([kind, str(src(files)), str(tmp_path / "out"), *flags])
    assert not (tmp_path / "out").exists()


def test_out_and_the_command_line_are_checked_first(src, tmp_path, capsys):
    folder = src({"a.jpg": None, "a.xml": xml([("dog", (1, 2, 3, 4))])})
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    for out, cause in (
        (tmp_path / "full", "exists and is not empty"),
        (folder / "out", "is inside"),
    ):
        with pytest.raises(UserError, match=cause):
            main(["voc", str(folder), str(out)])
    for kind, name in (("voc", "nowhere"), ("yolo", "src/a.xml"), ("coco", "nowhere")):
        with pytest.raises(UserError, match=f"{name}: no such folder"):
            main([kind, str(tmp_path / name), str(tmp_path / "out")])
    with pytest.raises(UserError, match=r"expected: python -m data.convert voc\|coco"):
        main(["voc", str(folder)])
    with pytest.raises(UserError, match="vox"):
        main(["vox", str(folder), str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="0"):
        main([])
    printed = capsys.readouterr().out
    assert all(name in printed for name in FORMATS)
    spaced = tmp_path / "my set"
    spaced.mkdir()  # empty: fine
    main(["voc", str(folder), str(spaced)])
    assert capsys.readouterr().out.endswith(f'python train.py --data "{spaced}"\n')
    assert sorted(path.name for path in spaced.iterdir()) == [
        "annotations",
        "data.yaml",
        "train",
    ]
