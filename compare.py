"""Compare detectors: python compare.py --cfg yolov5n yolov5n-ghost --data bccd --seeds 0 1 2."""

from __future__ import annotations

from engine.compare.config import CompareConfig
from utils.config import parse
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (sys.argv by default), compare, return 0."""
    config = parse(CompareConfig, argv, prog="compare.py", description=__doc__ or "")
    # imports torch: --help and a typing mistake need not wait for it
    from engine.compare.comparison import compare

    compare(config)
    return 0


if __name__ == "__main__":
    run_script(main)
