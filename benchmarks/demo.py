"""The last step of `make demo`: says what was reached and where it lies, and fails below a floor.

`python -m benchmarks.demo RUNS` after train.py, val.py and detect.py have written into RUNS.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from utils.errors import FeatherDetError, UserError, run_script

FLOOR = 0.5  # mAP50 under which the pictures would not show right boxes
# What the demo's commands write: a word for it, and a pattern in the demo's folder.
PARTS = (
    ("weights", "train/weights/best.pt"),
    ("curves", "train/results.png"),
    ("curves", "val/PR_curve.png"),
    ("pictures", "pictures/*.jpg"),
    ("video", "video/*.mp4"),
)


def report(folder: Path) -> str:
    """The demo's results as text. Raises UserError when a part is missing or the mAP is too low."""
    lines = []
    for word, pattern in PARTS:
        count = len(list(folder.glob(pattern)))
        if not count:
            raise UserError(f"{folder / pattern}: the demo did not write this; its output says why")
        lines.append(f"{word:9} {folder / pattern}" + (f" ({count})" if "*" in pattern else ""))
    path = folder / "val" / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        map50, mean = float(metrics["map50"]), float(metrics["map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not the figures of val.py: {error}") from error
    lines.append(f"{'mAP50':9} {map50:.3f}   mAP50-95 {mean:.3f}   ({path})")
    text = "\n".join(lines)
    if not map50 >= FLOOR:
        raise FeatherDetError(f"mAP50 {map50:.3f} is under {FLOOR}: the demo failed\n{text}")
    return text


def main(argv: list[str] | None = None) -> int:
    """Print the report of the folder in `argv`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder that `make demo` writes into")
    sys.stdout.write(report(parser.parse_args(argv).runs) + "\n")
    return 0


if __name__ == "__main__":
    run_script(main)
