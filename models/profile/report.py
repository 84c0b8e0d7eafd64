"""What `python -m models.profile` prints and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator
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


def report(options: Any) -> None:
    """Print the profiles that the parsed `options` ask for, and plot them."""
    results = list(_results(options))
    if options.plot:
        parts = {
            section: [2 * profile.part(section).macs / GIGA for _, profile in results]
            for section in SECTIONS
        }
        plot_shares([name for name, _ in results], parts, unit="GFLOPs", path=options.plot)
    if options.json:
        plain = [{**item.to_dict(name), "notes": list(item.spec.notes)} for name, item in results]
        say(json.dumps(plain, indent=2))
    elif options.yaml:
        for name, profile in results:
            say(_yaml(name, profile.spec))
    elif len(results) == 1 or not (options.backbone or options.neck or options.classify):
        for name, profile in results:
            say(row_table(profile))
            say("; ".join((summary(profile, name), *profile.spec.notes)))
    else:
        say(f"at {options.img} px, {options.classes} classes; GFLOPs = 2 GMACs")
        say(matrix(results))
    for name, profile in results:
        for note in profile.notes():
            (warn if options.json or options.yaml else say)(f"{name}: {note}")


def _results(options: Any) -> Iterator[tuple[str, ModelProfile]]:
    """A name for the tables, and the profile; UserError for a model that cannot be built."""
    size, classes = options.img, options.classes
    for name in options.classify:
        spec: GraphSpec = load_classifier(name, classes=classes)
        yield name, profile_spec(spec, image_size=size, classes=classes)
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
        yield name, profile_spec(spec, image_size=size, classes=classes)


def _yaml(name: str, spec: GraphSpec) -> str:
    if not isinstance(spec, ModelSpec):
        raise UserError("--yaml prints detectors; a classifier has no model file")
    comments = "".join(f"# {line}\n" for line in (name, *spec.notes))
    content = spec.to_yaml_dict()
    return comments + yaml.safe_dump(content, sort_keys=False, default_flow_style=None)
