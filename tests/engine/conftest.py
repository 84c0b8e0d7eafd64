"""The reference of all COCO metrics: pycocotools on the same tables."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from typing import Any

import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from engine.evaluate.matching import BoxTable, to_xywh


def evaluated(
    truth: BoxTable, found: BoxTable, images: int, classes: int, **params: Any
) -> COCOeval:
    """pycocotools' evaluation, silent; ids of rows, images and classes count from 1."""
    head = {
        "images": [{"id": number + 1} for number in range(images)],
        "categories": [{"id": number + 1} for number in range(classes)],
    }
    tables = []
    for table, areas in ((truth, truth.areas), (found, to_xywh(found.boxes)[:, 2:].prod(1))):
        rows = [
            {
                "id": number + 1,
                "image_id": int(table.image[number]) + 1,
                "category_id": int(table.labels[number]) + 1,
                "bbox": box.tolist(),
                "area": float(areas[number]),
                "iscrowd": int(table.crowd[number]),
                "score": float(table.scores[number]),
            }
            for number, box in enumerate(to_xywh(table.boxes))
        ]
        tables.append(COCO())
        tables[-1].dataset = {**head, "annotations": rows}
    with contextlib.redirect_stdout(io.StringIO()):
        for one in tables:
            one.createIndex()
        evaluation = COCOeval(*tables, "bbox")
        vars(evaluation.params).update(params)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@pytest.fixture(scope="session")
def by_pycocotools() -> Callable[..., COCOeval]:
    """(truth, found, images, classes, **params) -> pycocotools' evaluation."""
    return evaluated
