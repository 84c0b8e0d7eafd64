"""What `python -m models.profile` prints and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from models.profile.counting import ModelProfile, profile_spec
from models.profile.fit import fit, read_budget
from models.profile.plot import plot_shares
from models.profile.tables import GIGA, matrix, row_table, summary
from models.spec import SECTIONS, GraphSpec, ModelSpec
from models.yaml.parser import load_classifier, load_draft
from utils.errors import UserError
from utils.terminal import say, warn


@dataclass(frozen=True)
class _Result:
    name: str
    spec: GraphSpec
    profile: ModelProfile


def report(options: Any) -> None:
    """Print the profiles that the parsed `options` name; UserError for a model that cannot be."""
    results = list(_results(options))
    if options.plot:
        parts = {
            section: [2 * result.profile.part(section).macs / GIGA for result in results]
            for section in SECTIONS
        }
        plot_shares([result.name for result in results], parts, unit="GFLOPs", path=options.plot)
    _print(results, options)
    for result in results:
        for note in result.profile.notes():
            show = warn if options.json or options.yaml else say
            show(f"{result.name}: {note}")


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
            warn(f"{name}: {fitted.text(budget)}")
        yield _Result(name, spec, profile_spec(spec, image_size=size, classes=classes))


def _print(results: Sequence[_Result], options: Any) -> None:
    if options.json:
        plain = [
            {**result.profile.to_dict(result.name), "notes": list(result.spec.notes)}
            for result in results
        ]
        say(json.dumps(plain, indent=2))
    elif options.yaml:
        for result in results:
            _print_yaml(result)
    elif len(results) == 1 or not (options.backbone or options.neck or options.classify):
        for result in results:
            say(row_table(result.profile))
            say("; ".join((summary(result.profile, result.name), *result.spec.notes)))
    else:
        say(f"at {options.img} px, {options.classes} classes; GFLOPs = 2 GMACs")
        say(matrix([(item.name, "; ".join(item.spec.notes), item.profile) for item in results]))


def _print_yaml(result: _Result) -> None:
    if not isinstance(result.spec, ModelSpec):
        raise UserError("--yaml prints detectors; a classifier has no model file")
    comments = "".join(f"# {line}\n" for line in (result.name, *result.spec.notes))
    content = result.spec.to_yaml_dict()
    say(comments + yaml.safe_dump(content, sort_keys=False, default_flow_style=None))
