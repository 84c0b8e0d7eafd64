"""Anchors that fit the data: the recall of those present, and new ones by k-means and mutation."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from data.index.columns import ImageRecord, Records
from utils.errors import UserError
from utils.seeding import generator

ENOUGH = 0.98  # recall under which new anchors are searched for (YOLOv5's limit)
GENERATIONS = 1000
SAMPLE = 20_000  # boxes that the search uses; recall is always measured on all
ROUNDS = 30  # of k-means; it converges long before
MUTATION_CHANCE = 0.9
MUTATION_SPREAD = 0.1
MIN_SIDE = 2.0  # pixels; the augmentation drops smaller boxes anyway


def box_sizes(records: Sequence[ImageRecord], image_size: int) -> np.ndarray:
    """(M, 2) sizes of the boxes in pixels of the network; no crowds, no sides under 2 px."""
    columns = Records.of(records)
    scales = (image_size / columns.sides().max(1, keepdims=True)).astype(np.float32)
    sizes = (columns.boxes[:, 2:] - columns.boxes[:, :2]) * scales
    sizes = sizes[~columns.crowd].astype(np.float64)
    return sizes[(sizes >= MIN_SIDE).all(1)]


def best_ratios(sizes: np.ndarray, anchors: np.ndarray) -> np.ndarray:
    """(N, 2) sizes, (A, 2) anchors -> (N,) the best anchor's min(w/aw, aw/w, h/ah, ah/h)."""
    ratio = sizes[:, None] / anchors[None]
    return np.minimum(ratio, 1 / ratio).min(2).max(1)


def best_possible_recall(sizes: np.ndarray, anchors: np.ndarray, threshold: float) -> float:
    """Share of boxes with an anchor whose min ratio exceeds 1 / `threshold`; 1 without boxes."""
    return float((best_ratios(sizes, anchors) > 1 / threshold).mean()) if len(sizes) else 1.0


def search_anchors(sizes: np.ndarray, count: int, *, threshold: float, seed: int) -> np.ndarray:
    """(N, 2) sizes in pixels -> (count, 2) anchors, ascending area; the same for the same seed.

    k-means on sizes scaled by their deviation, then mutation that keeps the fitter: the mean best
    ratio of the boxes that have an anchor within the threshold.
    """
    rng = generator(seed, count)
    if len(sizes) > SAMPLE:
        sizes = sizes[rng.choice(len(sizes), SAMPLE, replace=False)]
    anchors = k_means(sizes, count, rng)
    fitness = _fitness(sizes, anchors, threshold)
    for _ in range(GENERATIONS):
        factor = np.ones(anchors.shape)
        while (factor == 1).all():
            chosen = rng.random(anchors.shape) < MUTATION_CHANCE
            step = rng.random() * MUTATION_SPREAD * rng.standard_normal(anchors.shape)
            factor = np.clip(1 + chosen * step, 0.3, 3.0)
        mutant = np.maximum(anchors * factor, MIN_SIDE)
        score = _fitness(sizes, mutant, threshold)
        if score > fitness:
            anchors, fitness = mutant, score
    return _by_area(anchors)


def k_means(sizes: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """(N, 2) -> (count, 2) centres (OpenCV's k-means++) of the sizes over their deviation.

    With fewer different sizes than centres, the missing ones are drawn around the present ones.
    """
    spread = sizes.std(0)
    spread[spread == 0] = 1.0
    points = sizes / spread
    unique = np.unique(points, axis=0)
    if len(unique) < count:
        extra = unique[rng.integers(len(unique), size=count - len(unique))]
        extra = extra * np.exp(rng.normal(0.0, 0.5, size=extra.shape))
        return _by_area(np.concatenate([unique, extra]) * spread)
    cv2.setRNGSeed(int(rng.integers(2**31)))
    criteria = (cv2.TERM_CRITERIA_MAX_ITER | cv2.TERM_CRITERIA_EPS, ROUNDS, 1e-4)
    labels = np.zeros((len(points), 1), np.int32)  # only written
    _, _, centres = cv2.kmeans(
        points.astype(np.float32), count, labels, criteria, 1, cv2.KMEANS_PP_CENTERS
    )
    return _by_area(centres * spread)


def _fitness(sizes: np.ndarray, anchors: np.ndarray, threshold: float) -> float:
    best = best_ratios(sizes, anchors)
    return float((best * (best > 1 / threshold)).mean())


def _by_area(anchors: np.ndarray) -> np.ndarray:
    return anchors[np.argsort(anchors.prod(1), kind="stable")]


def fit_anchors(
    sizes: np.ndarray, present: np.ndarray | None, count: int, *, threshold: float, seed: int
) -> tuple[np.ndarray, str]:
    """(A, 2) anchors in pixels, ascending area, and a line for the console.

    The `present` ones when they suffice, else the better of them and new ones.  None means that
    the model has none yet: then `count` new ones are taken.  UserError where no box can give any.
    """
    title = "AutoAnchor: best possible recall"
    before = -1.0 if present is None else best_possible_recall(sizes, present, threshold)
    if present is not None and before >= ENOUGH:
        return present, f"{title} {before:.4f}, anchors kept"
    if not len(sizes):
        raise UserError("AutoAnchor: at this --imgsz no training box has sides of 2 px or more")
    found = search_anchors(sizes, count, threshold=threshold, seed=seed)
    after = best_possible_recall(sizes, found, threshold)
    if present is not None and after <= before:
        return present, f"{title} {before:.4f}, none better, anchors kept"
    pairs = " ".join(f"({w:.0f},{h:.0f})" for w, h in found)
    change = "" if present is None else f"{before:.4f} -> "
    return found, f"{title} {change}{after:.4f} with new anchors {pairs}"
