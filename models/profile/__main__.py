"""The command line of `python -m models.profile`; torch is imported after it is parsed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from models.spec import HEAD_ROWS
from utils.config import MAX_PIXELS, ArgumentParser, check_range
from utils.errors import UserError, run_script

DESCRIPTION = """Cost of detectors by row: parameters, MACs, FLOPs, strides, channels. Also checks a
model file and lists unused rows. Several models give one line each, split into backbone,
neck and head."""
MAX_CLASSES = 10_000


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and print the profiles it asks for."""
    options = _options(argv)
    from models.profile.report import report

    report(options)


def _options(argv: Sequence[str] | None) -> Any:
    parser = ArgumentParser(
        prog="python -m models.profile", description=DESCRIPTION, allow_abbrev=False
    )
    add = parser.add_argument
    add("files", nargs="*", metavar="FILE", help="model YAML: a path or a name in cfg/")
    for flag, metavar, text in (
        ("--cfg", "FILE", "the same as FILE"),
        ("--backbone", "NAME", "backbone in place of the model's own, e.g. ghostnet-1.0"),
        ("--neck", "NAME", "neck in place of the model's own, e.g. pan-ghost"),
        ("--classify", "NAME", "profile these backbones as classifiers instead"),
    ):
        add(flag, nargs="+", default=[], metavar=metavar, help=text)
    add(
        "--head",
        nargs="+",
        default=[],
        choices=tuple(HEAD_ROWS),
        help="head in place of the model's own",
    )
    add("--fit", metavar="KIND=NUMBER", help="scale to a budget, e.g. gflops=4.5 or params=1.9e6")
    add("--img", "--imgsz", type=int, default=640, help="image size in pixels (default: 640)")
    add("--classes", type=int, help="number of classes (default: 80; with --classify 1000)")
    add("--json", action="store_true", help="print JSON only")
    add("--yaml", action="store_true", help="print the resolved model as YAML")
    add("--plot", metavar="FILE", help="plot the share of each part in the GFLOPs of each model")
    parser.known = tuple(parser._option_string_actions)
    options = parser.parse_args(argv)
    options.files += options.cfg
    if options.classes is None:
        options.classes = 1000 if options.classify else 80
    if not options.files and not options.classify:
        raise UserError("FILE is missing: a model file, or --classify and a backbone (see --help)")
    if options.classify and (
        options.files or options.backbone or options.neck or options.head or options.fit
    ):
        raise UserError(
            "--classify takes only backbones, without model files, --neck, --head or --fit"
        )
    if options.json and options.yaml:
        raise UserError("give either --json or --yaml")
    try:
        check_range("--img", options.img, 1, MAX_PIXELS)
        check_range("--classes", options.classes, 1, MAX_CLASSES)
    except ValueError as error:
        raise UserError(str(error)) from error
    return options


if __name__ == "__main__":
    run_script(main)
