"""Train a detector: python train.py --cfg yolov5n-ghost --data coco --img 640 --batch 16."""

from __future__ import annotations

from engine.train.config import TrainConfig
from utils.config import parse_given
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (sys.argv by default), train, return 0."""
    config, given = parse_given(TrainConfig, argv, prog="train.py", description=__doc__ or "")
    from engine.train.loop import fit  # imports torch, which --help need not wait for

    fit(config, given)
    return 0


if __name__ == "__main__":
    run_script(main)
