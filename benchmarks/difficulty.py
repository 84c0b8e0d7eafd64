"""How hard the embedded set is, by size: `python -m benchmarks.difficulty predictions.json`.

Reads what `val.py --save-json` wrote for the validation images of datasets/shapes.  Prints AP50, by
pycocotools, of the ground-truth boxes under 16 px (visible area under 16 x 16), of 16 to 64 px, and
of larger ones.
"""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from data.shapes.files import ensure_shapes
from utils.errors import UserError, run_script

BANDS = {
    "all": (0, 1e10),
    "under 16 px": (0, 16**2),
    "16 to 64 px": (16**2, 64**2),
    "over 64 px": (64**2, 1e10),
}
IOU = 0.5


def by_size(annotations: Path, predictions: Path) -> dict[str, tuple[int, float]]:
    """Number of ground-truth boxes and AP50 of each band of sizes."""
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(annotations))
        evaluation = COCOeval(coco, coco.loadRes(str(predictions)), "bbox")
        evaluation.params.areaRng = [list(band) for band in BANDS.values()]
        evaluation.params.areaRngLbl = list(BANDS)
        evaluation.params.iouThrs = np.array([IOU])
        evaluation.evaluate()
        evaluation.accumulate()
    precision = evaluation.eval["precision"]  # (IoU, recall, class, area, detections)
    areas = [note["area"] for note in coco.anns.values() if not note["iscrowd"]]
    found = {}
    for number, (name, (low, high)) in enumerate(BANDS.items()):
        values = precision[0, :, :, number, -1]
        count = sum(low <= area < high for area in areas)
        found[name] = (count, float(values[values > -1].mean()))
    return found


def main(argv: list[str] | None = None) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.difficulty", description=__doc__)
    parser.add_argument("predictions", type=Path, help="predictions.json of val.py --save-json")
    predictions = parser.parse_args(argv).predictions
    annotations = ensure_shapes() / "annotations" / "instances_val.json"
    try:
        bands = by_size(annotations, predictions)
    except Exception as error:
        raise UserError(f"{predictions}: not predictions for {annotations}: {error}") from error
    for name, (count, value) in bands.items():
        print(f"{name:12} {count:4} boxes   AP50 {value:.3f}")


if __name__ == "__main__":
    run_script(main)
