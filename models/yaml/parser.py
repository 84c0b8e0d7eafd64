"""Model YAML to ModelSpec.  The way of a file:

1. `load_yaml`: text to plain data that knows its lines.
2. `_read`: the file and all it extends, base first; sections included (`sections`) and their rows
   read, then blocks swapped (`rows`).  The result is a Draft.
3. `Draft.resolve`: rows with absolute numbers, scaled repeats and widths (`resolve`).

Nothing in a file is ever run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import blocks, heads  # noqa: F401  importing these fills the registry
from models.blocks.conv import activation
from models.registry import HEADS
from models.spec import DETECT, HEAD_ROWS, SECTIONS, GraphSpec, ModelSpec, read_normalisation
from models.yaml.resolve import anchors_of, merge_detection_rows, read_anchors, resolve_rows
from models.yaml.rows import Row, base_chain, bind_arguments, check_keys, checked, swap_rows
from models.yaml.sections import Section, multiple, named_section, read_section
from utils.errors import UserError
from utils.files import find_config
from utils.yamlio import Document, load_yaml

VALUES = (
    "depth_multiple", "width_multiple", "activation", "anchors", "normalisation", "notes",
)  # fmt: skip
KEYS = ("nc", "ch", *VALUES, *SECTIONS, "extends", "swap", "keep")
OUTPUT = re.compile(r"out[0-9]")  # rows of a neck that the head reads
ANCHORS_TO_FIND = 3  # per level, for --head anchor where a file has none


@dataclass(frozen=True)
class Draft:
    """A model file with all it includes and extends: values, and rows before scaling."""

    values: Mapping[str, Any]
    sections: Mapping[str, Section]
    source: str  # the file for errors and tables
    file: Path = Path()

    @property
    def multiples(self) -> tuple[float, float]:
        """(depth, width) of the rows whose own file has none."""
        depth = multiple(self.values, "depth_multiple", self.source) or 1.0
        width = multiple(self.values, "width_multiple", self.source) or 1.0
        return depth, width

    def rows(self, section: str) -> tuple[Row, ...]:
        """The rows of a section, which the model may lack."""
        return self.sections[section].rows if section in self.sections else ()

    def resolve(self) -> ModelSpec:
        """Absolute rows and final widths.  UserError with the row."""
        depth, width = self.multiples
        rows = [row for key in SECTIONS for row in self.rows(key)]
        layers, anchors = resolve_rows(rows, depth=depth, width=width)
        layers = merge_detection_rows(layers)
        *others, last = layers
        if last.block not in HEADS or not last.sources or any(x.block in HEADS for x in others):
            raise UserError(
                f"{self.source}: exactly one Detect row (or FreeDetect) is needed, as the last "
                "row, and it must read other rows"
            )
        anchors = self.values.get("anchors") if anchors is None else anchors
        notes = self.values.get("notes") or ()
        if notes:
            checked(self.source, "notes", notes, Sequence[str])
        act = str(self.values.get("activation", "SiLU"))
        try:
            activation(act)
            normalisation = read_normalisation(self.values.get("normalisation"))
        except ValueError as error:
            raise UserError(f"{self.source}: {error}") from error
        return ModelSpec(
            tuple(layers),
            act.strip().removeprefix("nn.").removesuffix("()"),
            self.source,
            normalisation,
            (*notes, *(part.note for part in self.sections.values() if part.note)),
            anchors=read_anchors(anchors, len(last.sources), self.source)
            if last.block == DETECT
            else (),
        )


def load_spec(
    name: str, *, backbone: str | None = None, neck: str | None = None, head: str | None = None
) -> ModelSpec:
    """Read a model by path or by its name in cfg/. Raises UserError with file, line and row.

    `backbone` and `neck` (names as in a model file, or paths) and `head` (a key of HEAD_ROWS)
    replace the model's own.
    """
    return load_draft(name, backbone=backbone, neck=neck, head=head).resolve()


def load_draft(
    name: str, *, backbone: str | None = None, neck: str | None = None, head: str | None = None
) -> Draft:
    """The same before scaling; see `load_spec`."""
    path = find_config(name, "")
    draft = replace(_read(load_yaml(path)), file=path)
    if neck:
        draft = _with_neck(draft, named_section(neck, "neck", where="--neck"))
    if backbone:
        draft = _with_backbone(draft, named_section(backbone, "backbone", where="--backbone"))
    if head:
        draft = _with_head(draft, head)
    named = (("backbone", backbone), ("neck", neck), ("head", head))
    parts = (str(path), *(f"{key} {value}" for key, value in named if value))
    return replace(draft, source=", ".join(parts))


def load_classifier(name: str, *, classes: int = 1000, width: float | None = None) -> GraphSpec:
    """A backbone by name with the rows that make it a classifier of `classes`.

    `width` replaces the size's own.  UserError where the file has no `classifier`.
    """
    section = named_section(name, "backbone", {"width": width})
    if not section.classifier:
        raise UserError(f"{name}: the backbone file has no rows under 'classifier'")
    layers, _ = resolve_rows([*section.rows, *section.classifier], depth=1.0, width=1.0)
    layers[-1] = replace(layers[-1], args={**layers[-1].args, "c_out": classes})
    return GraphSpec(tuple(layers), source=name, notes=(section.note,) if section.note else ())


def parse_spec(data: Mapping[str, Any], where: str) -> ModelSpec:
    """The same from plain values, e.g. the `yaml` of a YOLOv5 checkpoint; `where` for errors."""
    return _read(Document(Path(where), dict(data), {})).resolve()


def _read(model: Document) -> Draft:
    values: dict[str, Any] = {}
    sections: dict[str, Section] = {}
    for document in reversed(base_chain(model, "")):
        check_keys(document, KEYS)
        data = document.data
        if not sections and "backbone" not in data:
            raise UserError(
                f"{document.path}: key 'backbone' is missing (rows, or the name of a backbone)"
            )
        values |= {key: data[key] for key in VALUES if key in data}
        swapping = []  # sections with a swap of their own
        for key in SECTIONS:
            content = data.get(key)
            if isinstance(content, Mapping) and not content.keys().isdisjoint({"swap", "keep"}):
                swapping.append(key)
            elif content is not None:
                sections[key] = read_section(document, key, content)
        rows = {key: part.rows for key, part in sections.items()}
        rows = swap_rows(document, rows, swapping)
        sections = {key: replace(part, rows=rows[key]) for key, part in sections.items()}
    return Draft(values, sections, str(model.path))


def _with_backbone(draft: Draft, backbone: Section) -> Draft:
    """The model on another backbone, whose taps the other rows must read by name."""
    others = [row for key in SECTIONS[1:] for row in draft.rows(key)]
    ends = [part.rows[-1].name for part in (draft.sections["backbone"], backbone)]
    for index, row in enumerate(others):
        for source in (item for item in row.sources if isinstance(item, int)):
            if source >= 0 or index + source < -1:
                raise UserError(
                    f"--backbone: {row.where} reads rows by number, which another backbone would "
                    "shift; name the rows there, or give a neck as well (--neck pan)"
                )
            if index + source == -1 and ends[0] != ends[1]:
                raise UserError(
                    f"--backbone: {row.where} reads the end of its backbone ({ends[0]}), the new "
                    f"one ends in {ends[1]}; give a neck as well (--neck pan-p6 makes P6 itself)"
                )
    return replace(draft, sections={**draft.sections, "backbone": backbone})


def _with_neck(draft: Draft, neck: Section) -> Draft:
    """The model with all between backbone and head replaced; the head reads the neck's outN."""
    detect = [row for row in draft.rows("head") if row.block in HEADS]
    outputs = sorted(row.name for row in neck.rows if row.name and OUTPUT.fullmatch(row.name))
    if len(detect) != 1 or not outputs:
        missing = "a neck names its outputs out2, out3, ..." if detect else "no Detect row"
        raise UserError(f"--neck: {draft.source}: {missing}")
    plain, anchors = detect[0].block == DETECT, draft.values.get("anchors")
    anchors = anchors_of(detect[0], anchors) if plain else anchors
    if isinstance(anchors, list) and len(anchors) != len(outputs):
        read = read_anchors(anchors, len(anchors), draft.source)
        anchors = read if isinstance(read, int) else len(read[0]) // 2
    row = replace(detect[0], sources=tuple(outputs), args=[] if plain else detect[0].args)
    sections = {**draft.sections, "neck": neck, "head": Section((row,))}
    return replace(draft, values={**draft.values, "anchors": anchors}, sections=sections)


def _with_head(draft: Draft, kind: str) -> Draft:
    """The model with another head in its last row; one of the same kind keeps its options."""
    *others, row = (None, *draft.rows("head"))
    if row is None or row.block not in HEADS:
        raise UserError(f"--head: {draft.source}: `head:` does not end in a Detect row")
    block, args = HEAD_ROWS[kind]
    if row.block == block == DETECT:
        return draft
    args = {**(bind_arguments(row) if row.block == block else {}), **args}
    known = HEADS[block].arguments
    args = {key: value for key, value in args.items() if value != known[key].default}
    row = replace(row, block=block, args=args)
    sections = {**draft.sections, "head": Section((*filter(None, others), row))}
    return replace(draft, values={"anchors": ANCHORS_TO_FIND, **draft.values}, sections=sections)
