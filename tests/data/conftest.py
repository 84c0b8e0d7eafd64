"""Fixtures of the data tests: a cache folder of their own, and small data sets made by hand."""

import json

import cv2
import numpy as np
import pytest

from data.index.columns import ImageRecord
from data.index.dataset import load_dataset_config, load_split


@pytest.fixture(autouse=True)
def cache_home(tmp_path_factory, monkeypatch):
    """The user's cache folder, empty for each test."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    monkeypatch.delenv("RANK", raising=False)
    return folder


@pytest.fixture
def write_image():
    """write_image(path, width=64, height=48): a smooth image, as the suffix says."""

    def write(path, width=64, height=48):
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(len(path.name)).integers(0, 255, (4, 5, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(noise, (width, height)))
        return path

    return write


@pytest.fixture
def make_record():
    """make_record(path, height, width, boxes): the record of an image, box i of class i."""

    def make(path, height, width, boxes=(), **changes):
        boxes = np.array(boxes, np.float32).reshape(-1, 4)
        count = len(boxes)
        values = {
            "image_id": path.stem,
            "labels": np.arange(count),
            "crowd": np.zeros(count, bool),
            "areas": np.ones(count, np.float32),
            "segments": (None,) * count,
            **changes,
        }
        return ImageRecord(file=str(path), height=height, width=width, boxes=boxes, **values)

    return make


@pytest.fixture
def scan():
    """scan(YAML file) -> the DataIndex of 'train'."""
    return lambda file, **options: load_split(load_dataset_config(str(file)), "train", **options)


@pytest.fixture
def yaml_file(tmp_path):
    """yaml_file('train: x', name) -> the YAML file of a data set in tmp_path."""

    def write(text, name="d.yaml"):
        (tmp_path / name).write_text(text)
        return tmp_path / name

    return write


@pytest.fixture
def yolo_set(tmp_path, write_image, yaml_file):
    """yolo_set({'a.jpg': '0 .5 .5 .2 .2\\n', 'b.jpg': None}) -> the YAML file; three classes."""

    def make(labels):
        folder = tmp_path / "set" / "labels" / "train"
        folder.mkdir(parents=True)
        for name, text in labels.items():
            image = write_image(tmp_path / "set" / "images" / "train" / name)
            if text is not None:
                content = text if isinstance(text, bytes) else text.encode()
                (folder / f"{image.stem}.txt").write_bytes(content)
        text = "path: set\ntrain: images/train\nnames: ['c0', 'c1', 'c2']\n"
        return yaml_file(text, "set.yaml")

    return make


@pytest.fixture
def coco_set(tmp_path, write_image, yaml_file):
    """coco_set(annotations, images=[...], categories=[...]) -> the YAML file; two 64x48 images."""

    def make(annotations, **parts):
        for name in ("a.jpg", "b.jpg"):
            write_image(tmp_path / "coco" / "pics" / name)
        data = {
            "images": [
                {"id": 7, "file_name": "a.jpg", "width": 64, "height": 48},
                {"id": 3, "file_name": "b.jpg", "width": 64, "height": 48},
            ],
            "annotations": annotations,
            "categories": [{"id": 9, "name": "cat"}, {"id": 2, "name": "dog"}],
            **parts,
        }
        (tmp_path / "coco" / "ann.json").write_text(json.dumps(data))
        text = "path: coco\ntrain: {images: pics, annotations: ann.json}\n"
        return yaml_file(text, "coco.yaml")

    return make
