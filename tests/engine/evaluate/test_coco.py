from __future__ import annotations

import contextlib
import io

import numpy as np
import pytest

from engine.evaluate import coco
from engine.evaluate.coco import METRICS, CocoMetrics, coco_metrics, twelve_lines
from engine.evaluate.matching import BoxTable, to_xywh


def random_case(
    rng: np.random.Generator,
    *,
    images: int,
    classes: int,
    boxes: int,
    detections: int,
    crowd: float = 0.1,
    tied: bool = False,
) -> tuple[BoxTable, BoxTable]:
    """Boxes of all sizes; half of the detections lie near one of them, some exactly on it."""

    def corners(count: int) -> np.ndarray:
        size = np.exp(rng.uniform(np.log(4), np.log(400), (count, 2)))
        low = rng.uniform(0, 640 - size)
        return np.round(np.concatenate((low, low + size), 1), 2)

    b = corners(boxes)
    labels = rng.integers(0, max(classes - 1, 1), boxes)  # the last class has no box
    owner = rng.integers(0, images, boxes)
    truth = BoxTable.ground_truth(
        owner,
        labels,
        b.astype(np.float32),
        rng.random(boxes) < crowd,
        ((b[:, 2:] - b[:, :2]).prod(1) * rng.uniform(0.4, 1, boxes)).astype(np.float32),
    )
    d, image = corners(detections), rng.integers(0, images, detections)
    label = rng.integers(0, classes, detections)
    if boxes:
        near = rng.random(detections) < 0.6
        source = rng.integers(0, boxes, detections)
        shift = rng.normal(0, 6, (detections, 4)) * (rng.random((detections, 1)) < 0.9)
        d[near] = (b[source] + shift)[near]
        d[:, 2:] = np.maximum(d[:, 2:], d[:, :2] + 1)
        image[near], label[near] = owner[source][near], labels[source][near]
    scores = rng.random(detections).astype(np.float32)
    if tied:
        scores = scores.round(1)
    order = np.lexsort((-scores, image))
    return truth, BoxTable.detections(image, label, d.astype(np.float32), scores).take(order)


def compare(
    by_pycocotools, truth: BoxTable, found: BoxTable, images: int, classes: int
) -> CocoMetrics:
    """Our metrics, checked to be those of pycocotools."""
    ours = coco_metrics(found, truth, images=images, classes=classes)
    theirs = by_pycocotools(truth, found, images, classes)
    with contextlib.redirect_stdout(io.StringIO()) as lines:
        theirs.summarize()
    np.testing.assert_allclose(list(ours.twelve.values()), theirs.stats, rtol=0, atol=1e-9)
    assert twelve_lines(ours.twelve) == lines.getvalue().rstrip("\n")
    assert list(ours.twelve) == list(METRICS)
    precision = theirs.eval["precision"][:, :, :, 0, 2]  # IoU, recall, class
    precision = np.where(precision == -1, np.nan, precision)
    for mine, expected in (
        (ours.ap, precision.mean((0, 1))),
        (ours.ap50, precision[0].mean(0)),
        (ours.precision50, precision[0].T),
    ):
        np.testing.assert_allclose(mine, expected, rtol=0, atol=1e-9)
    return ours


CASES = {
    "plain": {"images": 6, "classes": 4, "boxes": 40, "detections": 150},
    "ties": {"images": 6, "classes": 4, "boxes": 40, "detections": 150, "tied": True},
    "crowds": {"images": 4, "classes": 3, "boxes": 40, "detections": 150, "crowd": 0.5},
    "empty images": {"images": 40, "classes": 3, "boxes": 12, "detections": 20},
    "over 100 of a class": {
        **{"images": 2, "classes": 1, "boxes": 70, "detections": 360, "tied": True},
    },
    "no detections": {"images": 3, "classes": 3, "boxes": 10, "detections": 0},
    "no boxes": {"images": 3, "classes": 3, "boxes": 0, "detections": 10},
    "only crowds": {"images": 3, "classes": 2, "boxes": 10, "detections": 30, "crowd": 1.0},
    "nothing": {"images": 2, "classes": 2, "boxes": 0, "detections": 0},
}


@pytest.mark.parametrize("engine", ["hotcoco", "pycocotools"])  # the fallback without hotcoco
@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("name", CASES)
def test_equals_pycocotools(name, seed, engine, by_pycocotools, monkeypatch, capfd):
    if engine == "pycocotools":
        monkeypatch.setattr(coco, "hotcoco", None)
    case = CASES[name]
    truth, found = random_case(np.random.default_rng(seed), **case)
    compare(by_pycocotools, truth, found, case["images"], case["classes"])
    assert capfd.readouterr() == ("", "")


def test_by_hand(by_pycocotools):
    """Two boxes; the first found at IoU 1, the second not, one false positive above both."""
    none = np.zeros(2, dtype=int)
    boxes = np.array([[0, 0, 10, 10], [100, 0, 150, 50], [300, 300, 400, 400]], dtype=np.float32)
    truth = BoxTable.ground_truth(none, none, boxes[:2], none > 0, np.array([100.0, 2500.0]))
    found = BoxTable.detections(none, none, boxes[[2, 0]], np.array([0.9, 0.5]))
    ours = compare(by_pycocotools, truth, found, 1, 1).twelve
    # precision 1/2 up to recall 1/2: 51 of the 101 points; the false positive is large
    expected = {"AP": 0.5 * 51 / 101, "APs": 1, "APm": 0, "APl": -1, "AR1": 0, "AR10": 0.5}
    assert {key: ours[key] for key in expected} == pytest.approx(expected)


def test_corners_of_coco_files_come_back_exactly():
    boxes = np.array([[473.07, 395.93, 38.65, 28.67], [0.01, 639.99, 4000.37, 0.33]])
    corners = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1).astype(np.float32)
    np.testing.assert_array_equal(to_xywh(corners), boxes)
