"""The images exist, have the right size, and show the boxes where they are."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from data.index.records import DataIndex
from data.loading.plots import plot_batch, plot_labels
from data.loading.sample import Batch
from utils import drawing
from utils.boxes import Targets
from utils.drawing import color
from utils.errors import UserError


@pytest.fixture
def index_of(tmp_path, make_record):
    def make(boxes, classes=3):
        labels = np.arange(len(boxes)) % classes
        names = tuple(f"class {i}" for i in range(classes))
        record = make_record(tmp_path / "a.png", 100, 200, boxes, labels=labels)
        return DataIndex((record,), names, tuple(range(classes)), (), "")

    return make


def batch_of(count):
    boxes = torch.tensor([[8.0, 24.0, 40.0, 56.0]]).repeat(count, 1)
    images = torch.full((count, 3, 64, 64), 10, dtype=torch.uint8)
    targets = Targets(torch.arange(count), torch.arange(count) % 3, boxes)
    return Batch(images, targets, (), tuple(range(count)))


@pytest.fixture
def images_of(make_record):
    """count -> an index of so many images, whose ids are their numbers."""

    def make(count):
        records = [
            make_record(Path(f"folder/image_{n}.jpg"), 64, 64, image_id=n) for n in range(count)
        ]
        return DataIndex(tuple(records), ("a", "b", "c"), (0, 1, 2), (), "")

    return make


@pytest.mark.parametrize("classes", [1, 3, 80])
def test_labels_image_is_written(tmp_path, index_of, classes):
    index = index_of([[0, 0, 50, 50], [20, 10, 190, 90]] * 5, classes)
    plot_labels(index, tmp_path / "labels.jpg")
    image = cv2.imread(str(tmp_path / "labels.jpg"))
    assert image.shape == (1500, 1500, 3)
    red, green, blue = color(0)  # the bar of the first class
    near = np.abs(image[:750, :750].astype(int) - (blue, green, red)).max(2) < 30
    assert near.sum() > 500


@pytest.mark.parametrize(("count", "columns", "rows"), [(1, 1, 1), (3, 2, 2), (20, 4, 4)])
def test_batch_image_is_a_grid_with_boxes_and_file_names(tmp_path, images_of, count, columns, rows):
    plot_batch(batch_of(count), images_of(count), tmp_path / "train_batch0.png")
    image = cv2.imread(str(tmp_path / "train_batch0.png"))[..., ::-1]
    strip, gap = drawing._title("image_0.jpg", 400).shape[0], 4
    height = strip + 400
    assert image.shape == (rows * (height + gap) - gap, columns * (400 + gap) - gap, 3)
    for number in range(min(count, 16)):
        top, left = number // columns * (height + gap), number % columns * (400 + gap)
        title = drawing._title(f"image_{number}.jpg", 400)
        assert np.array_equal(image[top : top + strip, left : left + 400], title)
        assert tuple(image[top + strip + 300, left + 50]) == color(number % 3)
        assert tuple(image[top + strip + 380, left + 380]) == (10, 10, 10)


def test_a_set_without_boxes_is_plotted_and_a_missing_folder_is_a_user_error(
    tmp_path, index_of, images_of
):
    plot_labels(index_of([]), tmp_path / "labels.jpg")
    assert (tmp_path / "labels.jpg").stat().st_size > 1000
    with pytest.raises(UserError, match="cannot write"):
        plot_labels(index_of([]), tmp_path / "missing" / "labels.jpg")
    with pytest.raises(UserError, match="cannot write"):
        plot_batch(batch_of(1), images_of(1), tmp_path / "missing" / "batch.jpg")
