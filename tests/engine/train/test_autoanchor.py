import numpy as np
import pytest

from data.index.columns import ImageRecord
from engine.train.autoanchor import (
    best_possible_recall,
    best_ratios,
    box_sizes,
    fit_anchors,
    k_means,
    search_anchors,
)
from models.yaml.parser import load_spec
from utils.errors import UserError
from utils.seeding import generator

COCO = np.array(load_spec("yolov5n").anchors, dtype=np.float64).reshape(-1, 2)


def clusters(seed=0, count=300):
    rng = generator(seed, 99)
    centres = np.array([(12, 40), (60, 15), (100, 300)], dtype=np.float64)
    return np.concatenate([c * np.exp(rng.normal(0, 0.08, (count, 2))) for c in centres])


def test_ratio_and_recall_by_hand():
    sizes = np.array([(10, 10), (40, 10), (41, 10), (2.4, 10)])
    anchors = np.array([(10.0, 10.0)])
    np.testing.assert_allclose(best_ratios(sizes, anchors), [1, 0.25, 10 / 41, 0.24])
    assert best_possible_recall(sizes, anchors, 4.0) == 0.25  # a ratio of exactly 1/4 is no match
    assert best_possible_recall(np.zeros((0, 2)), anchors, 4.0) == 1.0


def test_sizes_are_at_network_size_without_the_tiny_and_the_crowds():
    boxes = np.array([[0, 0, 100, 50], [0, 0, 3, 100], [0, 0, 80, 80]], dtype=np.float32)
    crowd = np.array([False, False, True])
    areas, classes = np.ones(3, np.float32), np.zeros(3, np.int64)
    record = ImageRecord("a.jpg", 200, 400, "a", boxes, classes, crowd, areas, (None,) * 3)
    np.testing.assert_allclose(box_sizes([record], 200), [[50, 25]])
    assert box_sizes([], 320).shape == (0, 2)


def test_k_means_finds_separate_clusters():
    centres = k_means(clusters(), 3, generator(0))
    np.testing.assert_allclose(centres, [(12, 40), (60, 15), (100, 300)], rtol=0.05)


def test_search_is_seeded_sorted_and_mutation_helps():
    sizes = clusters()
    first = search_anchors(sizes, 9, threshold=4.0, seed=3)
    again = search_anchors(sizes, 9, threshold=4.0, seed=3)
    np.testing.assert_array_equal(first, again)
    assert (np.diff(first.prod(1)) >= 0).all()
    plain = k_means(sizes, 9, generator(3, 9))
    assert best_ratios(sizes, first).mean() > best_ratios(sizes, plain).mean()


def test_good_anchors_are_kept():
    anchors, text = fit_anchors(COCO * 1.5, COCO, 9, threshold=4.0, seed=0)
    assert anchors is COCO
    assert text == "AutoAnchor: best possible recall 1.0000, anchors kept"


def test_poor_anchors_are_replaced_by_better_ones():
    sizes, poor = clusters() / 20 + 2, COCO * 10  # boxes far smaller than any anchor
    anchors, text = fit_anchors(sizes, poor, 9, threshold=4.0, seed=0)
    before, after = (best_possible_recall(sizes, item, 4.0) for item in (poor, anchors))
    assert before < 0.5
    assert after > 0.99
    assert f"recall {before:.4f} -> {after:.4f} with new anchors (" in text


@pytest.mark.parametrize("count", [1, 50])  # equal boxes: fewer sizes than anchors
def test_a_model_without_anchors_gets_some_even_from_one_size(count):
    sizes = np.tile([[20.0, 40.0]], (count, 1))
    anchors, _ = fit_anchors(sizes, None, 12, threshold=4.0, seed=0)
    assert anchors.shape == (12, 2)
    assert best_possible_recall(sizes, anchors, 4.0) == 1.0
    assert (anchors >= 2).all()


def test_no_boxes():
    assert fit_anchors(np.zeros((0, 2)), COCO, 9, threshold=4.0, seed=0)[0] is COCO
    with pytest.raises(UserError, match="no training box"):
        fit_anchors(np.zeros((0, 2)), None, 9, threshold=4.0, seed=0)
