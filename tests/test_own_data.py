"""docs/own-data.md is true: its transcripts, run on small exports."""

import re
import shlex
from pathlib import Path

import cv2
import numpy as np
import pytest

import train
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
    """Ten images, each with a red and a white square, as three tools export them."""
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
        part, name = ("train" if i < 8 else "valid"), f"im_{i}"
        for home, labels, text in (
            (
                f"Cells.v3i.yolov5pytorch/{part}/images",
                f"Cells.v3i.yolov5pytorch/{part}/labels",
                rows,
            ),
            ("task_1/obj_train_data", "task_1/obj_train_data", rows),
            ("labelimg", "labelimg", f"<annotation>{objects}</annotation>"),
        ):
            if i < 10:
                suffix = "xml" if home == "labelimg" else "txt"
                write(folder / labels / f"{name}.{suffix}", text)
            if i < 10 or home == "labelimg":
                (folder / home).mkdir(parents=True, exist_ok=True)
                (folder / home / f"{name}.jpg").write_bytes(content)
    write(folder / "Cells.v3i.yolov5pytorch" / "data.yaml", ROBOFLOW)
    write(folder / "task_1" / "obj.names", "red cell\nwhite cell\n")
    write(folder / "task_1" / "train.txt", "data/obj_train_data/im_0.jpg\n")


@pytest.mark.parametrize("block", BLOCKS, ids=["roboflow", "cvat", "labelimg"])
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
