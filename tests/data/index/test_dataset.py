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
        (START + "names: [a]\ndownload: |\n  import os\n", 3, "'download' is never run"),
        ("trian: t\nnames: [a]\n", 1, "unknown key 'trian'; did you mean 'train'"),
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
        ("train: {images: t}\n", 1, "train.annotations: expected a path, found None"),
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
