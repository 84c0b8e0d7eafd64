"""Export a detector: python export.py --weights best.pt --include onnx openvino."""

from __future__ import annotations

from engine.export.config import ExportConfig
from utils.config import parse
from utils.errors import run_script


def main(argv: list[str] | None = None) -> int:
    """Parse `argv` (sys.argv by default), write the files, return 0."""
    config = parse(ExportConfig, argv, prog="export.py", description=__doc__ or "")
    from engine.export.run import run  # imports torch: --help need not wait for it

    run(config)
    return 0


if __name__ == "__main__":
    run_script(main)
