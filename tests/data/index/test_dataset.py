from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.index.coco import CocoSource
from data.index.dataset import load_dataset_config, load_split
from data.index.yolo import YoloSource
from utils.errors import UserError

Make = Callable[..., Path]
BOX = "0 0.5 0.5 0.25 0.5\n"
START = "train: t\n"


def write(folder: Path, text: str) -> Path:
    file = folder / "d.yaml"
    file.write_text(text)
    return file


def test_paths_start_at_path_and_path_at_the_file(tmp_path: Path) -> None:
    (tmp_path / "cfg").mkdir()
    file = write(
        tmp_path / "cfg",
        "path: ../set\nnames: [a]\ntrain: [x, /abs/y.txt]\n"
        "val: {images: v, annotations: j/v.json}\ntest:\n",
    )
    config = load_dataset_config(str(file))
    assert config.root == tmp_path / "set"
    assert config.splits == {
        "train": YoloSource(
            (tmp_path / "set" / "x", Path("/abs/y.txt")),
            (f"{file}:3: train", f"{file}:3: train"),
            tmp_path / "set",
        ),
        "val": CocoSource(
            tmp_path / "set" / "v", tmp_path / "set" / "j" / "v.json", f"{file}:4: val"
        ),
    }


def test_path_may_be_left_out(tmp_path: Path) -> None:
    config = load_dataset_config(str(write(tmp_path, START + "names: [a]\n")))
    assert config.root == tmp_path


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        ("names: [a, b]\nnc: 2", ("a", "b")),
        ("names:\n  0: a\n  1: b", ("a", "b")),
        ("names: {1: b, 0: a}", ("a", "b")),
        ("names: [0, 1.5, 'yes']", ("0", "1.5", "yes")),
    ],
)
def test_names(tmp_path: Path, names: str, expected: tuple[str, ...]) -> None:
    assert load_dataset_config(str(write(tmp_path, f"{START}{names}\n"))).names == expected


@pytest.mark.parametrize(
    ("text", "line", "cause"),
    [
        ("", 1, "expected 'key: value' lines, found nothing"),
        ("- a\n- b\n", 1, "expected 'key: value' lines, found a list"),
        ("train: [t\n", 2, "not plain YAML"),
        ("names: [a]\ntrain: t\ntrain: u\n", 3, "key 'train' appears twice"),
        ("names: !!python/object:os.system [x]\ntrain: t\n", 1, "not plain YAML"),
        (START + "names: [a]\ndownload: bash x.sh\n", 3, "'download' is never run"),
        (START + "names: [a]\ndownload: |\n  import os\n", 3, "'download' is never run"),
        ("trian: t\nnames: [a]\n", 1, "unknown key 'trian'; did you mean 'train'"),
        ("nmes: [a]\n" + START, 1, "unknown key 'nmes'; did you mean 'names'"),
        (START, None, "no key 'names'"),
        ("names: [a]\n", None, "none of the keys train, val, test names any images"),
        (START + "nc: 3\nnames: [a, b]\n", 2, "nc is 3, but 2 names"),
        (START + "nc: two\nnames: [a, b]\n", 2, "nc is 'two', but 2 names"),
        (START + "nc: 2\n", 2, "'nc' without 'names'"),
        (START + "names:\n  0: a\n  5: b\n", 4, "2 classes have the keys 0 to 1, found 5"),
        (START + "names:\n  1: a\n  2: b\n", 4, "found 2"),
        (START + "names: {a: 0}\n", 2, "found 'a'"),
        (START + "names: {false: a}\n", 2, "found False"),
        (START + "names:\n- a\n- b\n- a\n", 5, "'a' names both 0 and 2"),
        (START + "names:\n  0: a\n  1: a\n", 4, "'a' names both 0 and 1"),
        (START + "names:\n- yes\n- no\n", 3, "class 0 is True; put the name in quotes"),
        (START + "names: ['']\n", 2, "class 0 is ''"),
        (START + "names: [[a]]\n", 2, "class 0 is"),
        (START + "names: []\n", 2, "expected a list of 1 to 10000, found 0"),
        (START + f"names: {list(range(10_001))}\n", 2, "expected a list of 1 to 10000, found 10001"),
        (START + "names: cat\n", 2, "expected a list of 1 to 10000, found 'cat'"),
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
def test_mistakes_are_named_by_line(
    tmp_path: Path, text: str, line: int | None, cause: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(UserError) as error:
        load_dataset_config(str(file))
    message = str(error.value)
    assert cause in message
    assert message.startswith(f"{file}:{line}: " if line else f"{file}: ")
    assert "\n" not in message
    assert error.value.exit_code == 2


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    start = time.perf_counter()
    with pytest.raises(UserError):
        load_dataset_config(str(write(tmp_path, "\n".join(levels))))
    assert time.perf_counter() - start < 1


def test_missing_file_and_missing_split(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"did you mean 'bccd'"):
        load_dataset_config("bcd")
    config = load_dataset_config(str(write(tmp_path, START + "names: [a]\n")))
    with pytest.raises(UserError, match=r"d\.yaml: no key 'val'; it has train"):
        load_split(config, "val")
    with pytest.raises(UserError, match=r"d\.yaml:1: train: .*/t: no such folder or list file$"):
        load_split(config, "train")


@pytest.mark.parametrize(
    "name", ["bccd", "data/bccd.yaml", "coco", "coco128", "cfg/data/coco.yaml"]
)
def test_shipped_files(name: str, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    config = load_dataset_config(name)
    assert config.root == root / "datasets" / config.file.stem
    assert {"train", "val"} <= set(config.splits)
    assert all(".." not in str(source) for source in config.splits.values())


def test_shipped_coco128_names_are_cocos(root: Path, shared: Path, tmp_path: Path) -> None:
    shutil.copy(root / "cfg" / "data" / "coco128.yaml", tmp_path / "c.yaml")
    text = (tmp_path / "c.yaml").read_text().replace("../../datasets", str(shared / "datasets"))
    (tmp_path / "c.yaml").write_text(text)
    index = load_split(load_dataset_config(str(tmp_path / "c.yaml")), "train", progress=False)
    assert (len(index.records), index.boxes, index.backgrounds) == (128, 929, 2)
    assert not index.problems
    file = write(
        tmp_path,
        f"path: {shared}/datasets/coco_tiny\n"
        "val: {images: val2017, annotations: annotations/instances_val2017.json}\n",
    )
    assert load_split(load_dataset_config(str(file)), "val", progress=False).names == index.names


def test_generate_draws_the_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Path] = []
    monkeypatch.setattr("data.index.dataset.ensure_shapes", drawn.append)
    load_dataset_config(str(write(tmp_path, START + "names: [a]\npath: s\ngenerate: shapes\n")))
    assert drawn == [tmp_path / "s"]


def test_single_class(yolo_set: Make) -> None:
    file = yolo_set({"a.jpg": BOX + "1" + BOX[1:] + "2 .5 .5 .5 .5\n"})
    index = load_split(load_dataset_config(str(file)), "train", single_cls=True, progress=False)
    assert index.names == ("object",)
    assert index.category_ids == (0,)
    assert index.records[0].labels.tolist() == [0, 0]
    assert index.duplicates == 1  # the same box as another class is the same object now
    assert load_split(load_dataset_config(str(file)), "train", progress=False).boxes == 3


def test_scan_line(yolo_set: Make, capsys: pytest.CaptureFixture[str]) -> None:
    file = yolo_set({"a.jpg": BOX, "b.jpg": BOX + BOX + "0 .9 .5 .4 .5\n", "c.jpg": None})
    index = load_split(load_dataset_config(str(file)), "train", progress=False)
    line = (
        "3 images, 3 boxes of 3 classes, 1 background, 0 crowd; skipped: 0 images, 0 boxes; "
        "1 boxes clipped, 1 duplicates removed"
    )
    assert index.describe() == line
    assert capsys.readouterr().err == f"set-train: {line}\n"


def test_records_are_contiguous_views_of_the_right_types(yolo_set: Make) -> None:
    index = load_split(load_dataset_config(str(yolo_set({"a.jpg": BOX}))), "val", progress=False)
    record = index.records[0]
    kinds = {name: getattr(record, name).dtype for name in ("boxes", "labels", "crowd", "areas")}
    assert kinds == {"boxes": np.float32, "labels": np.int64, "crowd": bool, "areas": np.float32}
