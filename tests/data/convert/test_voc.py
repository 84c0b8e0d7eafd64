import json
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from PIL import Image

from data.convert.voc import VocConfig, convert_voc, main
from utils.errors import UserError


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


@pytest.fixture
def voc(tmp_path):
    """Two images, three objects, in VOC's layout."""
    for folder in ("images", "xml"):
        (tmp_path / folder).mkdir()
    for name, size in (("x_2", (64, 48)), ("x_10", (40, 30))):
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.jpg")
    objects = [("dog", (1, 2, 11, 22)), ("a<b", (0, 0, 3.5, 4))]
    (tmp_path / "xml" / "x_2.xml").write_text(xml(objects))
    (tmp_path / "xml" / "x_10.xml").write_text(xml([("dog", (5, 6, 7, 8))], difficult=1))
    (tmp_path / "train.txt").write_text("x_10\r\n\nx_2\n")
    return tmp_path


def convert(folder, **changes):
    values = {
        "images": str(folder / "images"),
        "annotations": str(folder / "xml"),
        "split": (str(folder / "train.txt"),),
        "out": str(folder / "out"),
    }
    (file,) = convert_voc(VocConfig(**{**values, **changes}))
    return file


def test_a_set_by_hand_which_is_not_overwritten(voc):
    assert json.loads(convert(voc).read_text()) == {
        "info": {"description": ""},
        "images": [
            {"id": 2, "file_name": "x_2.jpg", "width": 64, "height": 48},
            {"id": 10, "file_name": "x_10.jpg", "width": 40, "height": 30},
        ],
        "annotations": [
            {"id": 1, "image_id": 2, "category_id": 2, "bbox": [1, 2, 10, 20], "area": 200, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 1, "bbox": [0, 0, 3.5, 4], "area": 14.0, "iscrowd": 0},
            {"id": 3, "image_id": 10, "category_id": 2, "bbox": [5, 6, 2, 2], "area": 4, "iscrowd": 1},
        ],
        "categories": [
            {"id": 1, "name": "a<b", "supercategory": ""},
            {"id": 2, "name": "dog", "supercategory": ""},
        ],
    }  # fmt: skip
    original = (voc / "images" / "x_2.jpg").read_bytes()
    assert (voc / "out" / "train" / "x_2.jpg").read_bytes() == original
    with pytest.raises(UserError, match=r"instances_train\.json exists"):
        convert(voc)


def test_image_ids_count_where_numbers_are_not_unique(voc):
    for folder, suffix in (("images", ".jpg"), ("xml", ".xml")):
        (voc / folder / f"x_10{suffix}").rename(voc / folder / f"y_2{suffix}")
    (voc / "train.txt").write_text("y_2\nx_2\n")
    images = json.loads(convert(voc).read_text())["images"]
    assert [(im["id"], im["file_name"]) for im in images] == [(1, "y_2.jpg"), (2, "x_2.jpg")]


@pytest.mark.parametrize("split", ["train", "val"])
def test_bccd_comes_back_byte_for_byte(shared, tmp_path, split):
    source = shared / "datasets" / "bccd"
    original = (source / "annotations" / f"instances_{split}.json").read_text()
    data = json.loads(original)
    names = {item["id"]: item["name"] for item in data["categories"]}
    for image in data["images"]:
        objects = [
            (names[item["category_id"]], (x, y, x + w, y + h))
            for item in data["annotations"]
            if item["image_id"] == image["id"]
            for x, y, w, h in [item["bbox"]]
        ]
        (tmp_path / Path(image["file_name"]).with_suffix(".xml")).write_text(xml(objects))
    stems = [Path(image["file_name"]).stem for image in data["images"]]
    (tmp_path / f"{split}.txt").write_text("\n".join(reversed(stems)))
    file = convert(
        tmp_path,
        images=str(source / split),
        annotations=str(tmp_path),
        split=(str(tmp_path / f"{split}.txt"),),
        classes=("RBC", "WBC", "Platelets"),
        supercategory="cell",
        description="BCCD blood cells (MIT, github Shenggan/BCCD_Dataset), split {split}",
    )
    assert file == tmp_path / "out" / "annotations" / f"instances_{split}.json"
    assert file.read_text() == original
    copies = sorted(path.name for path in (tmp_path / "out" / split).iterdir())
    assert copies == sorted(path.name for path in (source / split).iterdir())


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("<annotation>", r"x_2\.xml:1: not XML"),
        ("<annotation><object/></annotation>", "object 1 has no name"),
        (xml([("dog", (1, 2, 3, "x"))]), r"object 1 \(dog\): bndbox .* not four numbers"),
        (xml([("dog", (1, 2, 3, "nan"))]), "not four numbers"),
        (xml([("dog", (5, 2, 3, 4))]), r"object 1 \(dog\): bndbox .* max is less than min"),
        ("<annotation><object><name>dog</name></object></annotation>", "not four numbers"),
        ('<!DOCTYPE a [<!ENTITY b "dog">]><annotation/>', "has a DTD"),
        ('<!DOCTYPE a [<!ENTITY b "dog">]><annotation/>'.encode("utf-16"), "has a DTD"),
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "has a DTD"),
        (xml([("cow", (1, 2, 3, 4))]), r"x_2\.xml: class 'cow' is not one of --classes"),
        (None, r"x_2\.xml'?: .*No such file"),
    ],
)
def test_bad_xml_is_named(voc, text, cause):
    (voc / "xml" / "x_2.xml").unlink()
    if text is not None:
        content = text if isinstance(text, bytes) else text.encode()
        (voc / "xml" / "x_2.xml").write_bytes(content)
    with pytest.raises(UserError, match=cause):
        convert(voc, classes=("dog", "a<b"))
    assert not (voc / "out").exists()


@pytest.mark.parametrize(
    ("lines", "changes", "cause"),
    [
        ("x_2\n", {"images": "nowhere"}, r"--images .*: no such folder"),
        ("x_2\n", {"split": ("nowhere.txt",)}, r"--split .*nowhere\.txt"),
        ("x_2\n", {"split": ("a/train.txt", "b/train.txt")}, "same name"),
        ("x_2\nx_3\n", {}, r"train\.txt:2: no image 'x_3' .*did you mean 'x_2'"),
        ("x_2\nx_10\nx_2\n", {}, r"train\.txt:3: image 'x_2' is listed twice"),
        ("\n", {}, r"train\.txt: the list is empty"),
        ("x_2\n", {"classes": ("dog", "a<b", "dog")}, "a name is given twice: dog a<b dog"),
    ],
)
def test_what_is_missing_or_would_make_a_wrong_set_is_named(voc, lines, changes, cause):
    (voc / "train.txt").write_text(lines)
    with pytest.raises(UserError, match=cause):
        convert(voc, **changes)
    assert not (voc / "out").exists()


def test_the_command(voc, capsys):
    flags = {"images": "images", "annotations": "xml", "split": "train.txt", "out": "out"}
    argv = [part for name, value in flags.items() for part in (f"--{name}", f"{voc}/{value}")]
    main(["voc", *argv, "--classes", "dog", "a<b"])
    assert capsys.readouterr().out == f"{voc}/out/annotations/instances_train.json\n"
    with pytest.raises(UserError, match="unknown format 'vox'; known: voc"):
        main(["vox"])
