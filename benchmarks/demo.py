"""The last step of `make demo`: prints the mAP and where the files are, and fails below a minimum.

`python -m benchmarks.demo RUNS` after train.py, val.py and detect.py have written into RUNS.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from utils.errors import FeatherDetError, UserError, run_script
from utils.terminal import say

MIN_MAP50 = 0.5  # below it the images would not show right boxes
# What the demo's commands write: its name, and a pattern in the demo's folder.
PARTS = (
    ("weights", "train/weights/best.pt"),
    ("curves", "train/results.png"),
    ("curves", "val/PR_curve.png"),
    ("images", "images/*.jpg"),
    ("video", "video/*.mp4"),
)


def report(folder: Path) -> str:
    """The demo's results as text. Raises UserError when a part is missing or the mAP is too low."""
    lines = []
    for word, pattern in PARTS:
        count = len(list(folder.glob(pattern)))
        if not count:
            raise UserError(
                f"{folder / pattern}: the demo did not write this; see its output above"
            )
        lines.append(f"{word:9} {folder / pattern}" + (f" ({count})" if "*" in pattern else ""))
    path = folder / "val" / "metrics.json"
    try:
        metrics = json.loads(path.read_text(encoding="utf-8"))
        map50, mean = float(metrics["map50"]), float(metrics["map"])
    except Exception as error:
        raise UserError(f"{path}: not the metrics of val.py: {error}") from error
    lines.append(f"{'mAP50':9} {map50:.3f}   mAP50-95 {mean:.3f}   ({path})")
    text = "\n".join(lines)
    if not map50 >= MIN_MAP50:
        raise FeatherDetError(f"the demo failed: mAP50 {map50:.3f} is under {MIN_MAP50}\n{text}")
    return text


def main(argv: list[str] | None = None) -> None:
    """Print the report of the folder in `argv`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo", description=__doc__)
    parser.add_argument("runs", type=Path, help="the folder that `make demo` writes into")
    say(report(parser.parse_args(argv).runs))


if __name__ == "__main__":
    run_script(main)
