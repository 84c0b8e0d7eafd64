"""The command lines: train.py, featherdet-train and `python -m featherdet train` are the same.

Settings are parsed before torch is imported, so that --help and a typing mistake answer at once.
"""

from __future__ import annotations

import sys
from functools import partial
from typing import NoReturn

from engine.compare.config import CompareConfig
from engine.evaluate.config import ValConfig
from engine.export.config import ExportConfig
from engine.predict.config import DetectConfig
from engine.train.config import TrainConfig
from utils.config import parse, parse_given
from utils.errors import UserError, run_script


def train(argv: list[str] | None = None) -> int:
    """Train a detector: --cfg yolov5n-ghost --data coco --img 640 --batch 16."""
    config, given = parse_given(TrainConfig, argv, description=train.__doc__)
    from engine.train.loop import fit

    fit(config, given)
    return 0


def val(argv: list[str] | None = None) -> int:
    """Validate a detector: --weights best.pt --data coco --img 640."""
    config = parse(ValConfig, argv, description=val.__doc__)
    from engine.evaluate.run import run

    run(config)
    return 0


def detect(argv: list[str] | None = None) -> int:
    """Find objects in images, videos and streams: --weights best.pt --source images/."""
    config = parse(DetectConfig, argv, description=detect.__doc__)
    from engine.predict.run import run

    run(config)
    return 0


def compare(argv: list[str] | None = None) -> int:
    """Compare detectors: --cfg yolov5n yolov5n-ghost --data bccd --seeds 0 1 2."""
    config = parse(CompareConfig, argv, description=compare.__doc__)
    from engine.compare.comparison import compare as run

    run(config)
    return 0


def export(argv: list[str] | None = None) -> int:
    """Export a detector: --weights best.pt --include onnx openvino."""
    config = parse(ExportConfig, argv, description=export.__doc__)
    from engine.export.run import run

    run(config)
    return 0


COMMANDS = {"train": train, "val": val, "detect": detect, "compare": compare, "export": export}
# The commands that pip installs.
featherdet_train = partial(run_script, train)
featherdet_val = partial(run_script, val)
featherdet_detect = partial(run_script, detect)
featherdet_compare = partial(run_script, compare)
featherdet_export = partial(run_script, export)


def unknown(argv: list[str] | None = None) -> NoReturn:
    """What `python -m featherdet` says without one of the COMMANDS."""
    raise UserError(f"expected a command: python -m featherdet {'|'.join(COMMANDS)} ...")


def main() -> NoReturn:
    """`python -m featherdet COMMAND ...`."""
    name = sys.argv[1] if len(sys.argv) > 1 else ""
    sys.argv[:2] = [f"featherdet-{name}"]
    run_script(COMMANDS.get(name, unknown))


if __name__ == "__main__":
    main()
