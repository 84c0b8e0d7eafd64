"""A few validation pictures with what each model sees in them, for the report."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from engine.compare.protocol import Splits
from engine.compare.record import load_detections
from engine.compare.report.tables import Evidence
from engine.compare.schema import Boxes, Example
from engine.evaluate.box_table import BoxTable
from engine.evaluate.metrics import by_id
from utils.images import ImageError, read_image

PICTURES = 6


def examples(splits: Splits | None, evidence: Sequence[Evidence]) -> list[Example]:
    """Evenly over the validation images that have boxes; the detections of each row's first seed.

    None without data or evaluated models.  A picture that has become unreadable is left out.
    """
    found = {
        item.contender.name: load_detections(item.finished[0].path)
        for item in evidence
        if item.finished
    }
    if splits is None or not found:
        return []
    records = by_id(splits.val)
    numbers = [number for number, record in enumerate(records) if not record.crowd.all()]
    places = np.linspace(0, len(numbers) - 1, min(PICTURES, len(numbers))).round().astype(int)
    result = []
    for number in (numbers[place] for place in places):
        record = records[number]
        try:
            image = read_image(record.path)
        except ImageError:
            continue
        plain = ~record.crowd
        truth = Boxes(record.boxes[plain], record.labels[plain], None)
        seen = {name: _on(detections, number) for name, detections in found.items()}
        result.append(Example(record.path.name, image, truth, seen))
    return result


def _on(found: BoxTable, number: int) -> Boxes:
    mine = found.take(found.image == number)
    return Boxes(mine.boxes, mine.labels, mine.scores)
