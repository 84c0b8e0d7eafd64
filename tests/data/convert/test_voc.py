from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import pytest
from PIL import Image

from data.convert.voc import VocConfig, convert_voc, read_voc
from utils.errors import UserError

OBJECT = "<object><name>{}</name><difficult>{}</difficult><bndbox>{}</bndbox></object>"


def xml(objects: list[tuple[str, tuple[Any, ...]]], difficult: int = 0) -> str:
    parts = []
    for name, corners in objects:
        names = ("xmin", "ymin", "xmax", "ymax")
        box = "".join(f"<{n}>{c}</{n}>" for n, c in zip(names, corners, strict=True))
        parts.append(OBJECT.format(escape(name), difficult, box))
    return f"<annotation><filename>other.jpg</filename>{''.join(parts)}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """Two images, three objects, in VOC's layout."""
    for folder in ("images", "xml"):
        (tmp_path / folder).mkdir()
    for name, size in (("x_2", (64, 48)), ("x_10", (40, 30))):
        Image.new("RGB", size).save(tmp_path / "images" / f"{name}.jpg")
    (tmp_path / "xml" / "x_2.xml").write_text(
        xml([("dog", (1, 2, 11, 22)), ("a<b", (0, 0, 3.5, 4))])
    )
    (tmp_path / "xml" / "x_10.xml").write_text(xml([("dog", (5, 6, 7, 8))], difficult=1))
    (tmp_path / "train.txt").write_text("x_10\r\n\nx_2\n")
    return tmp_path


def config(folder: Path, **changes: Any) -> VocConfig:
    values: dict[str, Any] = {
        "images": str(folder / "images"),
        "annotations": str(folder / "xml"),
        "split": (str(folder / "train.txt"),),
        "out": str(folder / "out"),
    }
    return VocConfig(**{**values, **changes})


def test_a_set_by_hand(voc: Path) -> None:
    (file,) = convert_voc(config(voc), progress=False)
    assert json.loads(file.read_text()) == {
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


def test_image_ids_count_where_numbers_are_not_unique(voc: Path) -> None:
    for folder, suffix in (("images", ".jpg"), ("xml", ".xml")):
        (voc / folder / f"x_10{suffix}").rename(voc / folder / f"y_2{suffix}")
    (voc / "train.txt").write_text("y_2\nx_2\n")
    (file,) = convert_voc(config(voc), progress=False)
    images = json.loads(file.read_text())["images"]
    assert [(im["id"], im["file_name"]) for im in images] == [(1, "y_2.jpg"), (2, "x_2.jpg")]


@pytest.mark.parametrize("split", ["train", "val"])
def test_bccd_comes_back_byte_for_byte(shared: Path, tmp_path: Path, split: str) -> None:
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
    (file,) = convert_voc(
        VocConfig(
            images=str(source / split),
            annotations=str(tmp_path),
            split=(str(tmp_path / f"{split}.txt"),),
            out=str(tmp_path / "bccd"),
            classes=("RBC", "WBC", "Platelets"),
            supercategory="cell",
            description="BCCD blood cells (MIT, github Shenggan/BCCD_Dataset), split {split}",
        ),
        progress=False,
    )
    assert file == tmp_path / "bccd" / "annotations" / f"instances_{split}.json"
    assert file.read_text() == original
    assert sorted(p.name for p in (tmp_path / "bccd" / split).iterdir()) == sorted(
        p.name for p in (source / split).iterdir()
    )


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
        ('<!DOCTYPE a SYSTEM "file:///etc/passwd"><annotation/>', "has a DTD"),
        (xml([("cow", (1, 2, 3, 4))]), r"x_2\.xml: class 'cow' is not one of --classes"),
    ],
)
def test_bad_xml_is_named(voc: Path, text: str, cause: str) -> None:
    (voc / "xml" / "x_2.xml").write_text(text)
    with pytest.raises(UserError, match=cause):
        convert_voc(config(voc, classes=("dog", "a<b")), progress=False)
    assert not (voc / "out").exists()


def test_entities_never_expand(tmp_path: Path) -> None:
    file = tmp_path / "a.xml"
    file.write_text(f'<!DOCTYPE a [<!ENTITY b "dog">]>{xml([("dog", (1, 2, 3, 4))])}', "utf-16")
    with pytest.raises(UserError, match="has a DTD"):
        read_voc(file)


def test_what_is_missing_is_named(voc: Path) -> None:
    with pytest.raises(UserError, match=r"--images .*: no such folder"):
        convert_voc(config(voc, images="nowhere"), progress=False)
    with pytest.raises(UserError, match=r"--split .*val\.txt"):
        convert_voc(config(voc, split=(str(voc / "val.txt"),)), progress=False)
    with pytest.raises(UserError, match="same name"):
        convert_voc(config(voc, split=("a/train.txt", "b/train.txt")), progress=False)
    (voc / "xml" / "x_2.xml").unlink()
    with pytest.raises(UserError, match=r"x_2\.xml"):
        convert_voc(config(voc), progress=False)
    (voc / "train.txt").write_text("x_2\nx_3\n")
    (voc / "xml" / "x_2.xml").write_text(xml([]))
    with pytest.raises(UserError, match=r"train\.txt:2: no image 'x_3' .*did you mean 'x_2'"):
        convert_voc(config(voc), progress=False)


def test_nothing_is_overwritten(voc: Path) -> None:
    convert_voc(config(voc), progress=False)
    with pytest.raises(UserError, match=r"instances_train\.json exists"):
        convert_voc(config(voc), progress=False)


def test_the_command(voc: Path, root: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "data.convert", *arguments]
        return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)

    done = run(
        "voc", "--images", f"{voc}/images", "--annotations", f"{voc}/xml",
        "--split", f"{voc}/train.txt", "--out", f"{voc}/out", "--classes", "dog", "a<b",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"{voc}/out/annotations/instances_train.json\n"
    wrong = run("vox")
    assert wrong.returncode == 2
    assert wrong.stderr == "error: unknown format 'vox'; known: voc\n"


@pytest.mark.parametrize(
    ("lines", "classes", "cause"),
    [
        ("x_2\nx_10\nx_2\n", (), r"train\.txt:3: image 'x_2' is listed twice"),
        ("\n", (), r"train\.txt: the list is empty"),
        ("x_2\n", ("dog", "a<b", "dog"), "--classes: a name is given twice: dog a<b dog"),
    ],
)
def test_what_would_make_a_wrong_set_is_refused(
    voc: Path, lines: str, classes: tuple[str, ...], cause: str
) -> None:
    (voc / "train.txt").write_text(lines)
    with pytest.raises(UserError, match=cause):
        convert_voc(config(voc, classes=classes), progress=False)
    assert not (voc / "out").exists()
