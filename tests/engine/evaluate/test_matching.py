from __future__ import annotations

import numpy as np
import pytest

from engine.evaluate import matching
from engine.evaluate.matching import BoxTable, confidence_curves, confusion_matrix, match, overlaps

AT_HALF = np.array([0.5])


def truth(*rows: tuple, crowd: tuple[int, ...] = ()) -> BoxTable:
    """Rows of (image, label, x1, y1, x2, y2)."""
    table = np.array(rows, dtype=float).reshape(-1, 6)
    image, labels = table[:, :2].astype(int).T
    boxes = table[:, 2:]
    is_crowd = np.isin(np.arange(len(table)), crowd)
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(1)
    return BoxTable.ground_truth(image, labels, boxes, is_crowd, areas)


def found(*rows: tuple) -> BoxTable:
    """Rows of (image, label, x1, y1, x2, y2, score)."""
    table = np.array(rows, dtype=float).reshape(-1, 7)
    image, labels = table[:, :2].astype(int).T
    return BoxTable.detections(image, labels, table[:, 2:6], table[:, 6])


def random_case(seed: int, *, boxes: int, detections: int) -> tuple[BoxTable, BoxTable]:
    """Whole pixels on three images, two classes, crowds; many ties of score."""
    rng = np.random.default_rng(seed)

    def rows(count: int, *columns: np.ndarray) -> np.ndarray:
        low = rng.integers(0, 12, (count, 2))
        places = (rng.integers(0, 3, count), rng.integers(0, 2, count))
        return np.column_stack((*places, low, low + rng.integers(1, 12, (count, 2)), *columns))

    crowd = np.flatnonzero(rng.random(boxes) < 0.2)
    some = truth(*rows(boxes), crowd=tuple(crowd))
    return some, found(*rows(detections, rng.integers(0, 6, detections) / 5))


class TestOverlaps:
    def test_iou_by_hand_and_only_within_image_and_class(self):
        boxes = truth((0, 0, 0, 0, 10, 10), (1, 0, 0, 0, 10, 10), (0, 1, 0, 0, 10, 10))
        one = found((0, 0, 5, 0, 15, 10, 0.9))
        pairs = overlaps(one, boxes, min_overlap=0.1)
        assert (pairs.rows.tolist(), pairs.columns.tolist()) == ([0], [0])
        assert pairs.overlap[0] == pytest.approx(50 / 150)
        pairs = overlaps(one, boxes, min_overlap=0.1, same_class=False)
        assert pairs.columns.tolist() == [0, 2]

    def test_share_of_the_detection_for_crowds_and_boxes_without_area(self):
        crowd = truth((0, 0, 0, 0, 100, 100), (0, 0, 5, 5, 5, 5), crowd=(0,))
        pairs = overlaps(found((0, 0, 90, 0, 110, 10, 0.9)), crowd, min_overlap=0.1)
        assert (pairs.columns.tolist(), pairs.overlap.tolist()) == ([0], [0.5])
        flat = found((0, 0, 5, 5, 5, 5, 0.9))
        assert not len(overlaps(flat, crowd, min_overlap=0.5).rows)

    def test_portions_change_nothing(self, monkeypatch):
        some, detections = random_case(0, boxes=40, detections=90)
        whole = overlaps(detections, some, min_overlap=0.1)
        monkeypatch.setattr(matching, "PAIRS_AT_ONCE", 7)
        np.testing.assert_equal(vars(overlaps(detections, some, min_overlap=0.1)), vars(whole))


HALVES = ((0, 0, 0, 0, 10, 10), (0, 0, 10, 0, 20, 10))


class TestMatch:
    @pytest.mark.parametrize(
        ("boxes", "detections", "ious", "target"),
        [
            pytest.param(
                ((0, 0, 0, 0, 10, 10), (0, 0, 2, 0, 12, 10)),
                ((0, 0, 0, 0, 10, 10, 0.6), (0, 0, 0, 0, 10, 10, 0.8), (0, 0, 0, 0, 10, 10, 0.5)),
                (0.5,),
                [[1, 0, -1]],
                id="the higher score chooses first, the other takes the next best",
            ),
            pytest.param(
                HALVES,
                ((0, 0, 0, 0, 20, 10, 0.9), (0, 0, 0, 0, 10, 10, 0.8)),
                (0.5, 0.55),
                [[1, 0], [-1, 0]],
                id="of equal overlaps the later box, at each threshold",
            ),
            pytest.param((), (), (0.5,), [[]], id="nothing at all"),
            pytest.param((), ((0, 0, 0, 0, 1, 1, 0.5),), (0.5,), [[-1]], id="no box"),
        ],
    )
    def test_targets(self, boxes, detections, ious, target):
        assert match(found(*detections), truth(*boxes), np.array(ious)).target.tolist() == target

    def test_crowd_is_ignored_any_number_of_times_but_a_free_box_comes_first(self):
        detections = found(
            (0, 0, 0, 0, 10, 10, 0.9),
            (0, 0, 20, 20, 30, 30, 0.8),
            (0, 0, 21, 21, 30, 30, 0.7),
            (0, 1, 20, 20, 30, 30, 0.6),  # another class than the crowd's
            (0, 0, 46, 0, 56, 10, 0.5),  # less than half on the crowd
        )
        boxes = truth((0, 0, 0, 0, 10, 10), (0, 0, 0, 0, 50, 50), crowd=(1,))
        result = match(detections, boxes, AT_HALF)
        assert result.target.tolist() == [[0, -1, -1, -1, -1]]
        assert result.ignored.tolist() == [[False, True, True, False, False]]

    @pytest.mark.parametrize("seed", range(12))
    def test_the_same_as_pycocotools(self, seed, by_pycocotools):
        some, detections = random_case(seed, boxes=25, detections=70)
        result = match(detections, some, AT_HALF)
        theirs = by_pycocotools(some, detections, 3, 2, areaRng=[[0, 1e10]], maxDets=[1000])
        correct, ignored = np.zeros((2, len(detections)), dtype=bool)
        for item in filter(None, theirs.evalImgs):
            rows = np.array(item["dtIds"], dtype=int) - 1
            ignored[rows] = item["dtIgnore"][0]
            correct[rows] = (item["dtMatches"][0] > 0) & ~ignored[rows]
        np.testing.assert_array_equal(result.target[0] >= 0, correct)
        np.testing.assert_array_equal(result.ignored[0], ignored)


class TestCurves:
    def test_by_hand(self):
        boxes = truth((0, 3, 0, 0, 10, 10), (0, 3, 50, 50, 60, 60), (1, 3, 0, 0, 10, 10))
        wrong = (0, 3, 20, 0, 30, 10, 0.7)
        detections = found((0, 3, 0, 0, 10, 10, 0.9), wrong, (1, 3, 0, 0, 10, 10, 0.4))
        curves = confidence_curves(detections, boxes)
        assert curves.classes.tolist() == [3]
        assert curves.confidence.shape == (1000,)
        # threshold: precision, recall, F1; at 0.95 nothing is left and nothing wrong
        expected = {0: (2 / 3, 2 / 3, 2 / 3), 0.5: (1 / 2, 1 / 3, 0.4), 0.8: (1, 1 / 3, 0.5)}
        for threshold, values in {**expected, 0.95: (1, 0, 0)}.items():
            at = int(np.searchsorted(curves.confidence, threshold))
            rows = (curves.precision, curves.recall, curves.f1)
            assert [row[0, at] for row in rows] == pytest.approx(values)
        assert curves.best == 0  # 2/3 up to 0.4 is the highest F1

    def test_crowds_cost_no_precision_and_have_no_curve(self):
        boxes = truth((0, 0, 0, 0, 10, 10), (0, 2, 20, 20, 90, 90), (0, 1, 0, 0, 9, 9), crowd=(1,))
        detections = found((0, 0, 0, 0, 10, 10, 1.0), (0, 2, 30, 30, 40, 40, 0.95))
        curves = confidence_curves(detections, boxes)
        assert curves.classes.tolist() == [0, 1]
        assert curves.precision[0, 0] == 1
        assert curves.recall[0, -1] == 1  # a score equal to the threshold counts
        assert not curves.precision[1].any()  # never detected
        none = confidence_curves(found((0, 0, 0, 0, 9, 9, 0.9)), truth())
        assert (none.precision.shape, none.best) == ((0, 1000), 0)


class TestConfusion:
    def test_by_hand(self):
        boxes = truth(
            *((0, 0, 0, 0, 10, 10), (0, 1, 20, 0, 30, 10), (0, 1, 40, 0, 50, 10)),
            *((0, 0, 60, 60, 90, 90), (1, 0, 0, 0, 10, 10)),
            crowd=(3,),
        )
        detections = found(
            (0, 0, 0, 0, 10, 10, 0.9),  # right
            (0, 0, 20, 0, 30, 9, 0.8),  # predicted 0, true 1
            (0, 1, 0, 0, 10, 9, 0.7),  # box 0 is taken by a better overlap: background
            (0, 0, 61, 61, 70, 70, 0.6),  # on a crowd of its class: ignored
            (0, 1, 61, 61, 70, 70, 0.6),  # on a crowd of another class: background
            (0, 1, 40, 0, 50, 10, 0.2),  # under the confidence
            (1, 1, 0, 0, 10, 10, 0.4),  # of equal overlaps the higher score is taken
            (1, 0, 0, 0, 10, 10, 0.6),
        )
        matrix = confusion_matrix(detections, boxes, 2)
        assert matrix.tolist() == [[2, 1, 0], [0, 0, 3], [0, 1, 0]]
        assert not confusion_matrix(found(), truth(), 3).any()

    @pytest.mark.parametrize("seed", range(6))
    def test_the_same_as_taking_pairs_one_by_one(self, seed):
        some, detections = random_case(seed, boxes=30, detections=50)
        sure, plain = detections.take(detections.scores >= 0.25), some.take(~some.crowd)
        pairs = overlaps(sure, plain, min_overlap=0.45, same_class=False)
        order = np.lexsort((pairs.rows, -sure.scores[pairs.rows], -pairs.overlap))
        left, missed = set(range(len(sure))), set(range(len(plain)))
        expected = np.zeros((3, 3), dtype=int)
        for row, column in zip(pairs.rows[order], pairs.columns[order], strict=True):
            if row in left and column in missed:
                left.remove(row)
                missed.remove(column)
                expected[sure.labels[row], plain.labels[column]] += 1
        crowded = overlaps(sure, some.take(some.crowd), min_overlap=0.45).rows
        for row in left - set(crowded):
            expected[sure.labels[row], 2] += 1
        for column in missed:
            expected[2, plain.labels[column]] += 1
        np.testing.assert_array_equal(confusion_matrix(detections, some, 2), expected)
