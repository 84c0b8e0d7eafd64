"""Profiles as text and as a bar chart: what `python -m models.profile` prints and plots."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from models.profile.counting import ModelProfile, Part, RowProfile, profile_spec
from models.profile.fit import fit, read_budget
from models.spec import SECTIONS, GraphSpec, ModelSpec
from models.yaml.parser import load_classifier, load_draft
from utils.errors import UserError, cause_of
from utils.terminal import say, warn

MEGA, GIGA = 1e6, 1e9
HEADING = (
    "row", "name", "from", "n", "params", "MMACs", "Mops", "stride", "channels", "H x W",
    "block", "arguments",
)  # fmt: skip
MATRIX_HEADING = (
    "model", "params", "backbone", "neck", "head", "GFLOPs", "backbone", "neck", "head", "note",
)  # fmt: skip
LEFT = frozenset({"name", "from", "block", "arguments", "model", "note"})
Named = tuple[str, ModelProfile]


def report(options: Any) -> None:
    """Print the profiles that the parsed `options` ask for, and plot them."""
    results = list(_results(options))
    if options.json:
        plain = [{**item.to_dict(name), "notes": list(item.spec.notes)} for name, item in results]
        say(json.dumps(plain, indent=2))
    elif options.yaml:
        for name, profile in results:
            say(_yaml(name, profile.spec))
    elif len(results) == 1 or not (
        options.backbone or options.neck or options.head or options.classify
    ):
        for name, profile in results:
            say(row_table(profile))
            say(summary(profile, name))
    else:
        say(f"at {options.img} px, {options.classes} classes; GFLOPs = 2 GMACs")
        say(_matrix(results))
    for name, profile in results:
        for note in profile.notes():
            (warn if options.json or options.yaml else say)(f"{name}: {note}")
    if options.plot:
        _plot(results, options.plot)


def _results(options: Any) -> Iterator[Named]:
    """A name for the tables, and the profile; UserError for a model that cannot be built."""
    size, classes = options.img, options.classes
    for name in options.classify:
        spec: GraphSpec = load_classifier(name, classes=classes)
        yield name, profile_spec(spec, image_size=size, classes=classes)
    budget = read_budget(options.fit, image_size=size) if options.fit else None
    several = (names or [None] for names in (options.backbone, options.neck, options.head))
    for file, backbone, neck, head in product(options.files, *several):
        draft = load_draft(file, backbone=backbone, neck=neck, head=head)
        name = " + ".join(part for part in (file, backbone, neck, head) if part)
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


def row_table(profile: ModelProfile) -> str:
    """The rows as text, one line each, with a heading."""
    return _aligned(HEADING, [_cells(row, profile.image_size) for row in profile.rows])


def summary(profile: ModelProfile, model: str) -> str:
    """One line: totals, the split into backbone, neck and head, and the spec's notes."""
    parts = ", ".join(
        f"{section} {part.params:,} / {part.macs / GIGA:.3f} GMACs"
        for section in SECTIONS
        for part in [profile.part(section)]
    )
    text = (
        f"{model}: {len(profile.rows)} rows, {profile.params:,} parameters; at "
        f"{profile.image_size} px {profile.macs / GIGA:.3f} GMACs = {profile.flops / GIGA:.3f} "
        f"GFLOPs, {profile.cost.operations / GIGA:.3f} G other operations; {parts}"
    )
    return "; ".join((text, *profile.spec.notes))


def _matrix(results: Sequence[Named]) -> str:
    """One line each: parameters and GFLOPs, whole and by part."""
    lines = []
    for name, profile in results:
        parts: list[ModelProfile | Part] = [profile, *map(profile.part, SECTIONS)]
        params = [f"{part.params:,}" for part in parts]
        flops = [f"{2 * part.macs / GIGA:.3f}" for part in parts]
        lines.append((name, *params, *flops, "; ".join(profile.spec.notes)))
    return _aligned(MATRIX_HEADING, lines)


def _aligned(heading: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*lines, heading, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if title in LEFT else cell.rjust(width)
            for cell, width, title in zip(line, widths, heading, strict=True)
        ).rstrip()
        for line in (heading, *lines)
    )


def _cells(row: RowProfile, image_size: int) -> tuple[str, ...]:
    spec = row.spec
    sources = [source - row.index if source == row.index - 1 else source for source in spec.sources]
    stride = channels = size = "-"
    if row.shape is not None:
        channels, size = str(row.shape[0]), f"{row.shape[1]}x{row.shape[2]}"
        stride = f"{image_size / row.shape[1]:g}"
    return (
        str(row.index), spec.name or "", ",".join(map(str, sources)), str(spec.repeats),
        f"{row.params:,}", f"{row.cost.macs / MEGA:.2f}", f"{row.cost.operations / MEGA:.2f}",
        stride, channels, size, spec.block,
        " ".join(f"{key}={_compact(value)}" for key, value in spec.args.items()),
    )  # fmt: skip


def _compact(value: Any) -> str:
    """A value of a row as short text: [3,5,7], 0.5."""
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(_compact, value)) + "]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _plot(results: Sequence[Named], path: str) -> None:
    """One horizontal bar per model: the share of each part, and the total in GFLOPs.

    Shares, since the totals of light and heavy models differ a hundredfold.
    """
    macs = [[profile.part(section).macs for _, profile in results] for section in SECTIONS]
    values = 2 * np.asarray(macs) / GIGA  # (parts, models)
    shares = 100 * values / np.maximum(values.sum(axis=0), 1e-12)
    figure = Figure(figsize=(9.0, 1.2 + 0.24 * len(results)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    positions = np.arange(len(results))
    for section, share, left in zip(SECTIONS, shares, shares.cumsum(axis=0) - shares, strict=True):
        axes.barh(positions, share, left=left, label=section)
    for position, value in zip(positions, values.sum(axis=0), strict=True):
        axes.annotate(f" {value:.3g} GFLOPs", (100.0, float(position)), va="center", fontsize=7)
    axes.set_yticks(positions, [name.replace("$", r"\$") for name, _ in results], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlim(0, 116)
    axes.set_xticks(range(0, 101, 20))
    axes.margins(y=0.01)
    axes.set_xlabel("share of GFLOPs in %")
    figure.legend(loc="outside upper center", ncols=len(SECTIONS), frameon=False)
    try:
        figure.savefig(path, dpi=200)
    except Exception as error:  # of the file, or of a format that is not known
        raise UserError(f"--plot {path}: cannot be written: {cause_of(error)}") from error
