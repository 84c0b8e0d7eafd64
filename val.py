"""Validate a detector: python val.py --weights best.pt --data coco --img 640."""

from __future__ import annotations

from engine.evaluate.config import ValConfig
from utils.config import parse
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (sys.argv by default), evaluate, return 0."""
    config = parse(ValConfig, argv, prog="val.py", description=__doc__ or "")
    from engine.evaluate.run import run  # imports torch: --help need not wait for it

    run(config)
    return 0


if __name__ == "__main__":
    run_script(main)
