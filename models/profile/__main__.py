"""The command line of `python -m models.profile`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from models.profile.counting import ModelProfile, profile_spec
from models.profile.fit import fit, read_budget
from models.profile.plot import stacked_shares
from models.profile.tables import matrix, row_table, summary
from models.spec import SECTIONS, GraphSpec, ModelSpec
from models.yaml.parser import load_classifier, load_draft
from utils.config import ArgumentParser
from utils.errors import UserError, run_script

DESCRIPTION = """Cost of detectors by row: parameters, MACs, FLOPs, strides, channels. Also checks a
model file and names the rows nobody uses. Several models give one line each, split into backbone,
neck and head."""


@dataclass(frozen=True)
class _Result:
    name: str
    spec: GraphSpec
    profile: ModelProfile

    @property
    def note(self) -> str:
        return "; ".join(self.spec.notes)


def main(argv: Sequence[str] | None = None) -> None:
    """Print profiles as the options say."""
    options = _options(argv)
    results = list(_results(options))
    if options.plot:
        _plot(results, options.plot)
    _print(results, options)
    for result in results:
        for note in result.profile.notes():
            machine = options.json or options.yaml
            print(f"{result.name}: {note}", file=sys.stderr if machine else sys.stdout)


def _print(results: Sequence[_Result], options: Any) -> None:
    if options.json:
        print(json.dumps([_plain(result) for result in results], indent=2))
    elif options.yaml:
        for result in results:
            _print_yaml(result)
    elif len(results) == 1 or not (options.backbone or options.neck or options.classify):
        for result in results:
            print(row_table(result.profile))
            print(summary(result.profile, result.name), *result.spec.notes, sep="; ")
    else:
        print(f"at {options.img} px, {options.classes} classes; GFLOPs = 2 GMACs")
        print(matrix([(result.name, result.note, result.profile) for result in results]))


def _options(argv: Sequence[str] | None) -> Any:
    parser = ArgumentParser(
        prog="python -m models.profile", description=DESCRIPTION, allow_abbrev=False
    )
    parser.add_argument(
        "files", nargs="*", metavar="FILE", help="model YAML: a path or a name in cfg/"
    )
    parser.add_argument("--cfg", nargs="+", default=[], metavar="FILE", help="the same as a flag")
    parser.add_argument(
        "--backbone", nargs="+", default=[], help="in place of the model's own, e.g. ghostnet-1.0"
    )
    parser.add_argument(
        "--neck", nargs="+", default=[], help="in place of the model's own, e.g. pan-ghost"
    )
    parser.add_argument(
        "--fit", metavar="KIND=NUMBER", help="scale to a budget, e.g. gflops=4.5 or params=1.9e6"
    )
    parser.add_argument(
        "--classify", nargs="+", default=[], metavar="NAME", help="backbones as classifiers"
    )
    parser.add_argument(
        "--img", "--imgsz", type=int, default=640, help="side of the image in pixels"
    )
    parser.add_argument("--classes", type=int, help="number of classes (80; of --classify 1000)")
    parser.add_argument("--json", action="store_true", help="print a JSON list and nothing else")
    parser.add_argument("--yaml", action="store_true", help="print the resolved model as YAML")
    parser.add_argument(
        "--plot", metavar="FILE", help="a picture: share of GFLOPs by part of each model"
    )
    parser.known = tuple(parser._option_string_actions)
    options = parser.parse_args(argv)
    options.files += options.cfg
    if not options.files and not options.classify:
        raise UserError("FILE is missing: a model file, or --classify and a backbone (see --help)")
    if options.classify and (options.files or options.backbone or options.neck or options.fit):
        raise UserError("--classify takes backbones alone, without model files, --neck or --fit")
    if options.json and options.yaml:
        raise UserError("--json and --yaml exclude each other")
    if options.classes is None:
        options.classes = 1000 if options.classify else 80
    if options.classes < 1:
        raise UserError(f"--classes must be at least 1, got {options.classes}")
    return options


def _results(options: Any) -> Iterator[_Result]:
    size, classes = options.img, options.classes
    for name in options.classify:
        spec: GraphSpec = load_classifier(name, classes=classes)
        yield _Result(name, spec, profile_spec(spec, image_size=size, classes=classes))
    budget = read_budget(options.fit, image_size=size) if options.fit else None
    several = options.backbone or [None], options.neck or [None]
    for file, backbone, neck in product(options.files, *several):
        draft = load_draft(file, backbone=backbone, neck=neck)
        name = " + ".join(part for part in (file, backbone, neck) if part)
        if budget is None:
            spec = draft.resolve()
        else:
            fitted = fit(draft, budget, classes=classes)
            spec = fitted.spec
            print(f"{name}: {fitted.text(budget)}", file=sys.stderr)
        yield _Result(name, spec, profile_spec(spec, image_size=size, classes=classes))


def _plain(result: _Result) -> dict[str, Any]:
    return {**result.profile.to_dict(result.name), "notes": list(result.spec.notes)}


def _print_yaml(result: _Result) -> None:
    if not isinstance(result.spec, ModelSpec):
        raise UserError("--yaml prints detectors; a classifier has no model file")
    for line in (result.name, *result.spec.notes):
        print(f"# {line}")
    print(yaml.safe_dump(result.spec.to_yaml_dict(), sort_keys=False, default_flow_style=None))


def _plot(results: Sequence[_Result], file: str) -> None:
    parts = {
        section: [2e-9 * result.profile.part(section).macs for result in results]
        for section in SECTIONS
    }
    stacked_shares([result.name for result in results], parts, unit="GFLOPs", path=file)


if __name__ == "__main__":
    run_script(main)
