"""docs/own-data.md is true: its transcripts, run on small exports."""

import json
import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

import detect
import train
import val
from data.convert.command import main as convert

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "docs" / "own-data.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
NAMES = ("red cell", "white cell")
ROBOFLOW = f"train: ../train/images\nval: ../valid/images\n\nnc: 2\nnames: {[*NAMES]}\n\nroboflow:\n  version: 3\n"
OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)


def write(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)


def exports(folder: Path) -> None:
    """Ten images, each with a red and a white square, as four tools export them."""
    rng = np.random.default_rng(0)
    for i in range(12):
        image = np.full((64, 64, 3), 90, np.uint8)
        x, y = rng.integers(2, 10, 2).tolist()
        image[y : y + 16, x : x + 16] = 40, 40, 220
        image[y + 30 : y + 46, x + 30 : x + 46] = 250
        content = cv2.imencode(".jpg", image)[1].tobytes()
        corners = [(x, y, x + 16, y + 16), (x + 30, y + 30, x + 46, y + 46)]
        rows = "".join(
            f"{n} {(a + c) / 128} {(b + d) / 128} 0.25 0.25\n"
            for n, (a, b, c, d) in enumerate(corners)
        )
        objects = "".join(OBJECT.format(NAMES[n], *box) for n, box in enumerate(corners))
        shapes = [
            {"label": NAMES[n], "shape_type": "rectangle", "points": [box[:2], box[2:]]}
            for n, box in enumerate(corners)
        ]
        part, name = ("train" if i < 8 else "valid"), f"im_{i}"
        photo = {"imagePath": f"{name}.jpg", "imageWidth": 64, "imageHeight": 64}
        for home, labels, text in (
            (
                f"Cells.v3i.yolov5pytorch/{part}/images",
                f"Cells.v3i.yolov5pytorch/{part}/labels",
                rows,
            ),
            ("task_1/obj_train_data", "task_1/obj_train_data", rows),
            ("labelimg", "labelimg", f"<annotation>{objects}</annotation>"),
            ("labelme", "labelme", json.dumps({"shapes": shapes, **photo})),
        ):
            if i < 10:
                suffix = {"labelimg": "xml", "labelme": "json"}.get(home, "txt")
                write(folder / labels / f"{name}.{suffix}", text)
            if i < 10 or home == "labelimg":
                (folder / home).mkdir(parents=True, exist_ok=True)
                (folder / home / f"{name}.jpg").write_bytes(content)
    write(folder / "Cells.v3i.yolov5pytorch" / "data.yaml", ROBOFLOW)
    write(folder / "task_1" / "obj.names", "red cell\nwhite cell\n")
    write(folder / "task_1" / "train.txt", "data/obj_train_data/im_0.jpg\n")


@pytest.mark.parametrize("block", BLOCKS, ids=["roboflow", "cvat", "labelimg", "labelme"])
def test_transcripts(block, tmp_path, monkeypatch, capsys):
    exports(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for part in block.split("$ ")[1:]:
        command, *lines = part.strip().replace("ROOT", str(tmp_path)).split("\n")
        words = shlex.split(command)
        if words[1] == "train.py":
            train.main([*words[2:], "--device", "cpu", "--workers", "0", "--noplots"])
        else:
            convert(words[3:])
        printed = "".join(capsys.readouterr()).splitlines()
        for line in lines:
            assert line in printed


def test_the_other_steps(tmp_path, monkeypatch, capsys):
    """Steps 2 to 5 in their order, in small; from random weights, since none may be downloaded."""
    exports(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    convert(["yolo", "task_1", "mine"])
    (tmp_path / "labelimg").rename(tmp_path / "my-images")
    commands = re.findall(r"```\npython (\w+)\.py (.*)\n```", PAGE)
    assert [name for name, _ in commands] == ["train", "train", "val", "detect"]
    small = ["--device", "cpu"]
    for name, text in commands:
        words = shlex.split(text.replace("--weights yolov5n.pt", "--cfg yolov5n"))
        if name == "train":
            flags = [*words, "--img", "64", "--epochs", "1", "--workers", "0", *small]
            train.main([*flags, *["--noplots"] * ("look" not in words)])
        else:
            extra = ["--workers", "0", "--noplots"] if name == "val" else []
            (val if name == "val" else detect).main([*words, *extra, *small])
    run = tmp_path / "runs" / "train"
    assert {"labels.jpg", "train_batch0.jpg", "val_batch0_pred.jpg"} <= {
        file.name for file in (run / "look").iterdir()
    }
    assert (tmp_path / "runs" / "val" / "exp" / "metrics.json").is_file()
    assert len([*(tmp_path / "runs" / "detect" / "exp").glob("im_*.jpg")]) == 12
    assert "--img 64 (the size of its training)" in "".join(capsys.readouterr())
