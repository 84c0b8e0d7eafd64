"""Fixtures shared by all tests."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def default_signals() -> None:
    """nohup and background jobs start with ignored signals, which child processes inherit."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data sets and weights that lie next to the project and are not part of it."""
    folder = ROOT.parent / "shared"
    if not (folder / "datasets").is_dir():
        pytest.skip("../shared (real data sets, genuine weights) is not on this machine")
    return folder


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """The CPU, and with `-m gpu` a CUDA device where there is one."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("this machine has no CUDA device")
    return torch.device(request.param)


# A data set of a few coloured rectangles and a very small detector, for whole training runs

COLOURS = ((220, 40, 40), (40, 200, 60), (50, 70, 230))


def write_rectangles(root, split, count, seed):
    rng = np.random.default_rng(seed)
    images, annotations = [], []
    (root / split).mkdir(parents=True)
    for number in range(count):
        pixels = rng.integers(90, 130, (64, 64, 3), dtype=np.uint8)
        for _ in range(number % 3):  # some images stay empty
            w, h = (int(side) for side in rng.integers(12, 40, 2))
            x, y = int(rng.integers(0, 64 - w)), int(rng.integers(0, 64 - h))
            label = int(rng.integers(0, 3))
            pixels[y : y + h, x : x + w] = COLOURS[label]
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": number,
                    "category_id": label + 1,
                    "bbox": [x, y, w, h],
                    "area": w * h,
                    "iscrowd": 0,
                }
            )
        Image.fromarray(pixels).save(root / split / f"{number}.png")
        images.append({"id": number, "file_name": f"{number}.png", "height": 64, "width": 64})
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(("red", "green", "blue"))]
    content = {"images": images, "annotations": annotations, "categories": categories}
    (root / f"{split}.json").write_text(json.dumps(content))


@pytest.fixture(scope="session")
def rectangles(tmp_path_factory):
    """The data set YAML of 10 training and 5 validation images of 64 px, three classes."""
    root = tmp_path_factory.mktemp("rectangles")
    write_rectangles(root, "train", 10, seed=0)
    write_rectangles(root, "val", 5, seed=1)
    file = root / "rectangles.yaml"
    file.write_text(
        "train: {images: train, annotations: train.json}\n"
        "val: {images: val, annotations: val.json}\n"
    )
    return file


TINY = """
anchors: [[10,13, 16,30, 33,23], [30,61, 62,45, 59,119], [116,90, 156,198, 373,326]]
backbone:
  - [-1, 1, Conv, [16, 6, 2, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, C3, [32]]
  - [-1, 1, Conv, [32, 3, 2]]
  - [-1, 1, Conv, [64, 3, 2]]
head:
  - [[3, 4, 5], 1, Detect, [nc, anchors]]
"""


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """The YAML of a detector of seven rows, strides 8, 16 and 32."""
    file = tmp_path_factory.mktemp("model") / "tiny.yaml"
    file.write_text(TINY)
    return file


@pytest.fixture
def train_flags(rectangles, tiny_model, tmp_path):
    """Flags of a quick run: 64 px, batch 4, no workers, runs under tmp_path."""
    return [
        *("--data", str(rectangles), "--cfg", str(tiny_model), "--imgsz", "64", "--batch", "4"),
        *("--workers", "0", "--device", "cpu", "--project", str(tmp_path / "runs"), "--noplots"),
    ]
