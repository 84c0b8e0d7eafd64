from pathlib import Path

import pytest

from data.index.coco import CocoSource
from data.index.dataset import load_dataset_config, load_split
from data.index.yolo import YoloSource
from utils.errors import UserError

BOX = "0 0.5 0.5 0.25 0.5\n"
START = "train: t\n"


@pytest.fixture
def load(yaml_file):
    """load(text of a YAML file) -> its DatasetConfig."""
    return lambda text: load_dataset_config(str(yaml_file(text)))


def test_paths_start_at_path_and_path_at_the_file(tmp_path, load):
    text = (
        "names: [a]\npath: {}\ntrain: [x, /abs/y.txt]\n"
        "val: {{images: v, annotations: j/v.json}}\ntest:\n"
    )
    file = tmp_path / "d.yaml"
    for path, root in {"sub/../set": tmp_path / "set", ".": tmp_path}.items():
        config = load(text.format(path))
        assert config.root == root
        train = (root / "x", Path("/abs/y.txt"))
        assert config.splits == {
            "train": YoloSource(train, (f"{file}:3: train",) * 2, root),
            "val": CocoSource(root / "v", root / "j" / "v.json", f"{file}:4: val"),
        }
    assert load(START + "names: [a]\n").root == tmp_path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: [a, b]\nnc: 2", ("a", "b")),
        ("names:\n  0: a\n  1: b", ("a", "b")),
        ("names: {1: b, 0: a}", ("a", "b")),
        ("names: [0, 1.5, 'yes']", ("0", "1.5", "yes")),
    ],
)
def test_names(load, names, expected):
    assert load(f"{START}{names}\n").names == expected


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("", 1, "expected 'key: value' lines, found nothing"),
        ("- a\n- b\n", 1, "expected 'key: value' lines, found a list"),
        ("names: !!python/object:os.system [x]\ntrain: t\n", 1, "not plain YAML"),
        ("trian: t\nnames: [a]\n", 1, "unknown key 'trian'; did you mean 'train'"),
        (START + "names: [a]\nvalid: v\n", 3, "unknown key 'valid'; did you mean 'val'"),
        (START, None, "no key 'names'"),
        ("names: [a]\n", None, "none of the keys train, val, test names any images"),
        (START + "nc: 3\nnames: [a, b]\n", 2, "nc is 3, but 2 names"),
        (START + "nc: two\nnames: [a, b]\n", 2, "nc is 'two', but 2 names"),
        (START + "nc: 2\n", 2, "'nc' without 'names'"),
        (START + "names:\n  0: a\n  5: b\n", 4, "2 classes have the keys 0 to 1, found 5"),
        (START + "names: {a: 0}\n", 2, "found 'a'"),
        (START + "names: {false: a}\n", 2, "found False"),
        (START + "names:\n- a\n- b\n- a\n", 5, "'a' names both 0 and 2"),
        (START + "names:\n  0: a\n  1: a\n", 4, "'a' names both 0 and 1"),
        (START + "names:\n- yes\n- no\n", 3, "class 0 is True; put the name in quotes"),
        (START + "names: ['']\n", 2, "class 0 is ''"),
        (START + "names: [[a]]\n", 2, "class 0 is"),
        (START + "names: []\n", 2, "expected a list of 1 to 10000 names, found 0"),
        (START + f"names: {list(range(10_001))}\n", 2, "expected a list of 1 to 10000 names, found 10001"),
        (START + "names: cat\n", 2, "expected a list of 1 to 10000 names, found 'cat'"),
        ("train: 3\nnames: [a]\n", 1, "train: expected a path, found 3"),
        ("train: []\nnames: [a]\n", 1, "an empty list"),
        ("train:\n- x\n- {a: b}\nnames: [a]\n", 3, "train.1: expected a path"),
        ("train: {images: t}\n", 1, "train.annotations is missing; a COCO split is train: {images: DIR,"),
        ("train: {annotations: j.json}\n", 1, "train.images is missing; a COCO split is"),
        ("train:\n  images: t\n  annotation: j\n", 3,
         "unknown key train.annotation; did you mean 'annotations'"),
        ("path: [x]\ntrain: t\nnames: [a]\n", 1, "path: expected a path"),
        ("path: ~nosuchuser/x\ntrain: t\nnames: [a]\n", 1, "path: ~nosuchuser/x: "),
        ("train: ~nosuchuser/x\nnames: [a]\n", 1, "train: ~nosuchuser/x: "),
        ("path: \"a\\0b\"\ntrain: t\nnames: [a]\n", 1, "path: expected a path"),
        (START + "names: [a]\ngenerate: circles\n", 3, "'circles'; the only value is shapes"),
        (START + "names: [a]\ngenerate: [x]\n", 3, "the only value is shapes"),
    ],
)  # fmt: skip
def test_mistakes_are_named_by_line(tmp_path, load, text, line, cause):
    with pytest.raises(UserError) as error:
        load(text)
    message = str(error.value)
    assert cause in message
    assert message.startswith(f"{tmp_path}/d.yaml:{line}: " if line else f"{tmp_path}/d.yaml: ")
    assert "\n" not in message
    assert error.value.exit_code == 2


ROBOFLOW = """train: ../train/images
val: ../valid/images
test: ../test/images

nc: 2
names: ['blue cell', 'red']

roboflow:
  workspace: mine
  project: cells-1
  version: 3
  license: CC BY 4.0
  url: https://universe.roboflow.com/mine/cells-1/dataset/3
"""


def test_roboflows_export_loads_as_it_is(tmp_path, write_image, capsys):
    """The YOLOv5 zip; its paths are meant for a folder next to its own."""
    root = tmp_path / "cells-1"
    for part, name in (("train", "a"), ("valid", "b"), ("test", "c")):
        write_image(root / part / "images" / f"{name}_jpg.rf.0123.jpg")
        (root / part / "labels").mkdir()
        (root / part / "labels" / f"{name}_jpg.rf.0123.txt").write_text("1 0.5 0.5 0.25 0.5")
    (root / "data.yaml").write_text(ROBOFLOW)
    (root / "README.roboflow.txt").write_text("text")
    config = load_dataset_config(str(root))  # the folder
    assert config == load_dataset_config(str(root / "data.yaml"))
    for split, name in (("train", "a"), ("val", "b"), ("test", "c")):
        (record,) = load_split(config, split).records
        assert record.path.name == f"{name}_jpg.rf.0123.jpg"
        assert (record.labels.tolist(), record.boxes.tolist()) == ([1], [[24, 12, 40, 36]])
    lines = capsys.readouterr().err.splitlines()
    assert f"{root}/data.yaml: ignored: roboflow" in lines
    assert (
        f"{root}/data.yaml:1: ../train/images does not exist; {root}/train/images is used" in lines
    )
    write_image(tmp_path / "train" / "images" / "x.jpg")  # now it does
    assert load_dataset_config(str(root)).splits["train"].paths == (tmp_path / "train" / "images",)


def test_yolov5s_download_is_not_run(load, tmp_path, capsys):
    load(START + f"names: [a]\ndownload: |\n  open('{tmp_path}/ran', 'w')\nlicense: x\n")
    expected = "ignored: download, license ('download' is never run: fetch the data yourself)"
    assert capsys.readouterr().err == f"{tmp_path}/d.yaml: {expected}\n"
    assert not (tmp_path / "ran").exists()


def test_a_folder_stands_for_its_yaml_file(tmp_path, yaml_file, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    with pytest.raises(UserError, match=r"mine: a folder needs a data\.yaml .* found: none"):
        load_dataset_config(str(folder))
    (folder / "cells.yml").write_text(START + "names: [a]\n")
    monkeypatch.chdir(tmp_path)
    assert load_dataset_config("mine").file == Path("mine/cells.yml")
    (folder / "other.yaml").write_text(START + "names: [a]\n")
    with pytest.raises(UserError, match=r"found: cells\.yml, other\.yaml"):
        load_dataset_config("mine")
    (folder / "data.yaml").write_text(START + "names: [a]\n")
    assert load_dataset_config("mine/").file == Path("mine/data.yaml")


def test_missing_file_and_missing_split(load):
    with pytest.raises(UserError, match=r"did you mean 'bccd'"):
        load_dataset_config("bcd")
    with pytest.raises(UserError, match=r"d\.yaml: no key 'val'; it has train"):
        load_split(load(START + "names: [a]\n"), "val")


@pytest.mark.parametrize(
    "name", ["bccd", "data/bccd.yaml", "coco", "coco128", "cfg/data/coco.yaml"]
)
def test_shipped_files(name, root, monkeypatch):
    monkeypatch.chdir(root)
    config = load_dataset_config(name)
    assert config.root == root / "datasets" / config.file.stem
    assert {"train", "val"} <= set(config.splits)
    assert all(".." not in str(source) for source in config.splits.values())


def test_shipped_coco128_names_are_cocos(root, shared, load):
    text = (root / "cfg" / "data" / "coco128.yaml").read_text()
    index = load_split(load(text.replace("../../datasets", str(shared / "datasets"))), "train")
    assert (len(index), index.boxes, index.backgrounds) == (128, 929, 2)
    assert not index.problems
    tiny = shared / "datasets" / "coco_tiny"
    coco = (
        f"val: {{images: {tiny}/val2017, annotations: {tiny}/annotations/instances_val2017.json}}"
    )
    assert load_split(load(coco), "val").names == index.names


def test_generate_draws_the_set(tmp_path, load, monkeypatch):
    drawn = []
    monkeypatch.setattr("data.index.dataset.ensure_shapes", drawn.append)
    load(START + "names: [a]\npath: s\ngenerate: shapes\n")
    assert drawn == [tmp_path / "s"]


def test_single_class(scan, yolo_set):
    file = yolo_set({"a.jpg": BOX + "1" + BOX[1:] + "2 .5 .5 .5 .5\n"})
    index = scan(file, single_cls=True)
    assert (index.names, index.category_ids) == (("object",), (0,))
    assert index.records[0].labels.tolist() == [0, 0]
    assert index.duplicates == 1  # the same box as another class is the same object now
    assert scan(file).boxes == 3


def test_scan_line(scan, yolo_set, capsys):
    scan(yolo_set({"a.jpg": BOX, "b.jpg": BOX * 2 + "0 .9 .5 .4 .5\n9 1 1 1 1\n", "c.jpg": None}))
    assert capsys.readouterr().err.splitlines()[-1] == (
        "set-train: 3 images, 3 boxes of 3 classes, 1 background, 0 crowd; skipped: 0 images, "
        "1 boxes; 1 boxes clipped, 1 duplicates removed"
    )
