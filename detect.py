"""Find objects in images, videos and streams."""

from __future__ import annotations

from engine.predict.config import DetectConfig
from utils.config import parse
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (sys.argv by default), detect, return 0."""
    config = parse(DetectConfig, argv, prog="detect.py", description=__doc__ or "")
    from engine.predict.run import run  # imports torch: --help need not wait for it

    run(config)
    return 0


if __name__ == "__main__":
    run_script(main)
