from __future__ import annotations

import time

import numpy as np
import pytest

from engine.compare.bootstrap import IOUS, RECALLS, difference, draw, interpolated_ap, weighted_ap
from engine.evaluate.coco import coco_metrics
from engine.evaluate.matching import BoxTable
from tests.engine.evaluate.test_coco import CASES, random_case


def whole_pixels(seed, **case):
    """Boxes of whole pixels, so that many IoU are equal or just at a threshold."""
    tables = random_case(np.random.default_rng(seed), **case)
    for table in tables:
        table.boxes[:] = table.boxes.round()
    return tables


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", CASES)
def test_all_images_once_equal_pycocotools_and_cocoeval(name, seed, by_pycocotools):
    case = CASES[name]
    images, classes = case["images"], case["classes"]
    truth, found = whole_pixels(seed, **case)
    ours = weighted_ap(found, truth, np.ones((1, images), dtype=np.int32))[0]
    reference = by_pycocotools(truth, found, images, classes)
    np.testing.assert_array_equal(reference.params.iouThrs, IOUS)
    np.testing.assert_array_equal(reference.params.recThrs, RECALLS)
    theirs = reference.eval["precision"][:, :, :, 0, 2].mean(1)  # -1: no ground-truth box
    theirs = np.where(theirs < 0, np.nan, theirs)
    twelve = coco_metrics(found, truth, images=images, classes=classes).twelve
    defined = ~np.isnan(theirs[0])
    if not defined.any():
        assert np.isnan(ours).all()
        assert twelve["AP"] == -1
        return
    np.testing.assert_allclose(ours, theirs[:, defined].mean(1), rtol=0, atol=1e-12)
    assert ours.mean() == pytest.approx(twelve["AP"], abs=1e-9)
    assert ours[0] == pytest.approx(twelve["AP50"], abs=1e-9)
    assert ours[5] == pytest.approx(twelve["AP75"], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_a_resample_equals_cocoeval_on_copied_images(seed):
    images, classes = 12, 4
    truth, found = whole_pixels(
        seed, images=images, classes=classes, boxes=70, detections=400, crowd=0.2
    )
    times = draw(images, resamples=6, seed=seed)[1:]
    ours = weighted_ap(found, truth, times)
    for row, counts in enumerate(times):
        copies = np.repeat(np.arange(images), counts)

        def copied(table, copies=copies):
            rows = [np.flatnonzero(table.image == image) for image in copies]
            numbers = np.repeat(np.arange(images), [len(part) for part in rows])
            chosen = table.take(np.concatenate(rows))
            chosen.image[:] = numbers
            return chosen

        twelve = coco_metrics(copied(found), copied(truth), images=images, classes=classes).twelve
        assert ours[row].mean() == pytest.approx(twelve["AP"], abs=1e-9)
        assert ours[row, 0] == pytest.approx(twelve["AP50"], abs=1e-9)


def test_portions_do_not_change_the_result(monkeypatch):
    truth, found = whole_pixels(0, images=8, classes=3, boxes=40, detections=200)
    times = draw(8, resamples=9)
    whole = weighted_ap(found, truth, times)
    monkeypatch.setattr("engine.compare.bootstrap.ELEMENTS_AT_ONCE", 300)
    np.testing.assert_array_equal(weighted_ap(found, truth, times), whole)


def test_interpolation_by_hand():
    """Of 2 boxes one is found, after a false positive: 1/2 up to recall 1/2, 51 points of 101."""
    once = interpolated_ap(np.array([[1], [1]]), np.array([[2], [1]]), np.array([2, 0]))
    assert once.tolist() == pytest.approx([0.5 * 51 / 101, 0.0])
    # the second right one lifts the first: precision 2/3 all the way
    twice = interpolated_ap(np.array([[1, 2]]), np.array([[2, 3]]), np.array([2]))
    assert twice.tolist() == pytest.approx([2 / 3])
    assert interpolated_ap(np.zeros((1, 0)), np.zeros((1, 0)), np.array([3])).tolist() == [0]


# Detectors of known quality: each object is found, exactly, with a known chance, and nothing else
# is.  Precision is 1, so AP is the share of COCO's 101 recalls that are reached: 100/101 of the
# recall and a constant, at every IoU.  Hence the true difference in AP.


def known(rng, chances, *, images=60, alike=True):
    """The truth and one BoxTable for each chance; `alike`: what is hard is hard for all."""
    counts = rng.integers(1, 6, images)
    image = np.repeat(np.arange(images), counts)
    index = np.arange(len(image)) - np.repeat(np.cumsum(counts) - counts, counts)
    boxes = np.stack((50 * index, 0 * index, 50 * index + 40, 0 * index + 40), 1).astype(np.float32)
    labels = np.zeros(len(image), dtype=int)
    areas = np.full(len(image), 1600.0)
    truth = BoxTable.ground_truth(image, labels, boxes, labels.astype(bool), areas)
    luck = rng.random(len(image))
    founds = []
    for chance in chances:
        luck = luck if alike else rng.random(len(image))
        rows = np.flatnonzero(luck < chance)
        scores = rng.random(len(rows))
        founds.append(BoxTable.detections(image[rows], labels[rows], boxes[rows], scores))
    return truth, founds


def compared(truth, first, second, times, **options):
    samples = (weighted_ap(found, truth, times) for found in (first, second))
    return difference(*samples, **options)


def test_a_known_difference_is_in_the_interval_and_significant():
    truth, (good, bad) = known(np.random.default_rng(0), (0.8, 0.6), images=100)
    for metric in ("AP", "AP50", "AP75"):
        result = compared(truth, good, bad, draw(100), metric=metric)
        assert result.low < 0.2 * 100 / 101 < result.high
        assert result.low < result.delta < result.high
        assert result.high - result.low < 0.15
        assert result.significant
        assert (result.level, result.resamples) == (0.95, 1000)
    worse = compared(truth, bad, good, draw(100))
    assert worse.significant
    assert worse.delta < 0


@pytest.mark.parametrize(
    ("chances", "alike", "covered", "significant"),
    [((0.7, 0.6), True, (0.88, 1), (0, 1)), ((0.7, 0.7), False, (0.8, 1), (0, 0.12))],
    ids=["95 % of the intervals cover the true difference", "equally good ones rarely differ"],
)
def test_many_comparisons_of_known_detectors(chances, alike, covered, significant):
    rng, results = np.random.default_rng(1), []
    truth = (chances[0] - chances[1]) * 100 / 101
    for _ in range(60):
        case, (first, second) = known(rng, chances, alike=alike)
        found = compared(case, first, second, draw(60, resamples=200), metric="AP50")
        results.append((found.low <= truth <= found.high, found.significant))
    for share, (low, high) in zip(np.mean(results, 0), (covered, significant), strict=True):
        assert low <= share <= high


def test_the_draw_is_a_function_of_its_seed():
    times = draw(7, resamples=40, seed=3)
    assert times.shape == (41, 7)
    assert (times.sum(1) == 7).all()
    assert (times[0] == 1).all()
    np.testing.assert_array_equal(times, draw(7, resamples=40, seed=3))
    assert (times != draw(7, resamples=40, seed=4)).any()


def test_resamples_without_a_ground_truth_box_are_left_out():
    truth, (good, bad) = known(np.random.default_rng(7), (1.0, 0.0), images=1)
    times = draw(3, resamples=400)  # two more images, empty
    share = (times[1:, 0] > 0).sum()
    assert 0 < share < 400
    result = compared(truth, good, bad, times)
    assert (result.resamples, result.delta, result.low, result.high) == (share, 1.0, 1.0, 1.0)


def test_a_thousand_resamples_of_100_images_take_seconds():
    truth, found = whole_pixels(9, images=100, classes=4, boxes=800, detections=10_000)
    start = time.process_time()
    weighted_ap(found, truth, draw(100))
    assert time.process_time() - start < 5
