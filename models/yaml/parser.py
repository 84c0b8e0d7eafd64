"""Model YAML to ModelSpec: rows, names, includes, `extends` + `swap` + `keep`. Runs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import blocks  # noqa: F401  importing blocks fills the registry
from models.blocks.conv import activation
from models.spec import DETECT, SECTIONS, GraphSpec, ModelSpec, read_normalisation
from models.yaml.detect_rows import anchors_of, merge_detection_rows, read_anchors
from models.yaml.resolve import resolve_rows
from models.yaml.rows import read_rows
from models.yaml.scales import multiple
from models.yaml.sections import Section, named_section, read_section
from models.yaml.swap import Swap, apply_swaps, read_swaps
from utils.errors import UserError, nearest
from utils.paths import find_config
from utils.yamlio import Document, load_yaml

KEYS = (
    "nc", "ch", "depth_multiple", "width_multiple", "activation", "anchors", "normalisation",
    "notes", "backbone", "neck", "head", "extends", "swap", "keep",
)  # fmt: skip
OUTPUT = re.compile(r"out[0-9]")  # rows of a neck that Detect reads


@dataclass(frozen=True)
class Draft:
    """A model file with all it includes and extends: values, and rows before scaling."""

    values: Mapping[str, Any]
    sections: Mapping[str, Section]
    source: str  # what errors and tables call it
    file: Path = Path()

    @property
    def multiples(self) -> tuple[float, float]:
        """(depth, width) of the rows whose own file has none."""
        depth = multiple(self.values, "depth_multiple", self.source) or 1.0
        width = multiple(self.values, "width_multiple", self.source) or 1.0
        return depth, width

    def resolve(self) -> ModelSpec:
        """Absolute rows and final widths.  UserError with the row."""
        depth, width = self.multiples
        rows = [row for part in SECTIONS if part in self.sections
                for row in self.sections[part].rows]  # fmt: skip
        layers, anchors = resolve_rows(rows, depth=depth, width=width)
        anchors = self.values.get("anchors") if anchors is None else anchors
        layers = merge_detection_rows(layers)
        if layers[-1].block != DETECT or sum(layer.block == DETECT for layer in layers) != 1:
            raise UserError(f"{self.source}: exactly one Detect row is needed, as the last row")
        return ModelSpec(
            tuple(layers),
            normalise_activation(self.values.get("activation", "SiLU"), self.source),
            self.source,
            _normalisation(self.values.get("normalisation"), self.source),
            (*_notes(self), *(part.note for part in self.sections.values() if part.note)),
            anchors=read_anchors(anchors, len(layers[-1].sources), self.source),
        )


def load_spec(name: str, *, backbone: str | None = None, neck: str | None = None) -> ModelSpec:
    """Read a model by path or by its name in cfg/. Raises UserError with file, line and row.

    `backbone` and `neck` (names as in a model file, or paths) take the place of the model's own.
    """
    return load_draft(name, backbone=backbone, neck=neck).resolve()


def load_draft(name: str, *, backbone: str | None = None, neck: str | None = None) -> Draft:
    """The same before scaling; see `load_spec`."""
    path = find_config(name, "")
    draft = _read(load_yaml(path), ())
    if neck:
        draft = _with_neck(draft, named_section(neck, "neck", where="--neck"))
    if backbone:
        draft = _with_backbone(draft, named_section(backbone, "backbone", where="--backbone"))
    parts = [str(path), *(f"{key} {value}" for key, value in
             (("backbone", backbone), ("neck", neck)) if value)]  # fmt: skip
    return replace(draft, source=", ".join(parts), file=path)


def load_classifier(name: str, *, classes: int = 1000, width: float | None = None) -> GraphSpec:
    """A backbone by name with the rows that make it a classifier of `classes`.

    `width` takes the place of the size's own.  UserError where the file has no `classifier`.
    """
    section = named_section(name, "backbone", width=width)
    if not section.classifier:
        raise UserError(f"{name}: the backbone file has no rows under 'classifier'")
    layers, _ = resolve_rows([*section.rows, *section.classifier], depth=1.0, width=1.0)
    last = layers[-1]
    layers[-1] = replace(last, args={**last.args, "c_out": classes})
    return GraphSpec(tuple(layers), source=name, notes=(section.note,) if section.note else ())


def parse_spec(data: Mapping[str, Any], where: str) -> ModelSpec:
    """The same from plain values, e.g. the `yaml` of a YOLOv5 checkpoint; `where` for errors."""
    return _read(Document(Path(where), dict(data), {}), ()).resolve()


def normalise_activation(text: Any, where: str) -> str:
    """'nn.LeakyReLU(0.1)' -> 'LeakyReLU(0.1)'. UserError unless Name, Name() or Name(number)."""
    try:
        activation(str(text))
    except ValueError as error:
        raise UserError(f"{where}: activation {text!r}: {error}") from error
    return str(text).strip().removeprefix("nn.").removesuffix("()")


def _read(document: Document, chain: tuple[Path, ...]) -> Draft:
    data = document.mapping()
    for key in data:
        if key not in KEYS:
            raise UserError(f"{document.at(key)}: unknown key {key!r}{nearest(str(key), KEYS)}")
    if document.path in chain:
        raise UserError(f"{document.path}: extends itself by way of {chain[-1]}")
    base = Draft({}, {}, "")
    if "extends" in data:
        base = _read(_base_document(document, data["extends"]), (*chain, document.path))
    elif "backbone" not in data:
        raise UserError(
            f"{document.path}: key 'backbone' is missing (rows, or the name of a backbone)"
        )
    values = {**base.values, **{key: data[key] for key in _plain_keys(data)}}
    sections = dict(base.sections)
    swaps: list[Swap] = read_swaps(document, ())
    for section in SECTIONS:
        content = data.get(section)
        if isinstance(content, Mapping) and not content.keys().isdisjoint({"swap", "keep"}):
            if section not in sections:
                raise UserError(f"{document.at(section)}: swap needs rows that `extends` brings")
            swaps += read_swaps(document, (section,))
        elif content is not None:
            sections[section] = _section(document, section, content)
    swapped = apply_swaps({key: part.rows for key, part in sections.items()}, swaps)
    parts = {key: replace(part, rows=swapped[key]) for key, part in sections.items()}
    return Draft(values, parts, str(document.path))


def _section(document: Document, section: str, content: Any) -> Section:
    if isinstance(content, (str, Mapping)):
        return read_section(document, section, content)
    return Section(read_rows(document, (section,), section))


def _with_backbone(draft: Draft, backbone: Section) -> Draft:
    """The model on another backbone, whose taps the other rows have to read by name."""
    others = [draft.sections[key].rows for key in SECTIONS[1:] if key in draft.sections]
    ends = [part.rows[-1].name for part in (draft.sections["backbone"], backbone)]
    for index, row in enumerate(row for rows in others for row in rows):
        numbers = [source for source in row.sources if isinstance(source, int)]
        if any(number >= 0 or index + number < -1 for number in numbers):
            raise UserError(
                f"--backbone: {row.where} reads rows by number, which another backbone would shift;"
                " name the rows there, or give a neck as well (--neck pan)"
            )
        if any(index + number == -1 for number in numbers) and ends[0] != ends[1]:
            raise UserError(
                f"--backbone: {row.where} reads the end of its backbone ({ends[0]}), the new one "
                f"ends in {ends[1]}; give a neck as well, e.g. --neck pan-p6, which makes P6 itself"
            )
    return replace(draft, sections={**draft.sections, "backbone": backbone})


def _with_neck(draft: Draft, neck: Section) -> Draft:
    """The model with all between backbone and Detect replaced; Detect reads the neck's outN."""
    head = draft.sections.get("head", Section(()))
    detect = [row for row in head.rows if row.block == DETECT]
    outputs = sorted(row.name for row in neck.rows if row.name and OUTPUT.fullmatch(row.name))
    if len(detect) != 1 or not outputs:
        missing = "a neck names its outputs out2, out3, ..." if detect else "no Detect row"
        raise UserError(f"--neck: {draft.source}: {missing}")
    anchors = anchors_of(detect[0], draft.values.get("anchors"))
    if isinstance(anchors, list) and len(anchors) != len(outputs):
        checked = read_anchors(anchors, len(anchors), draft.source)
        anchors = checked if isinstance(checked, int) else len(checked[0]) // 2
    row = replace(detect[0], sources=tuple(outputs), args=[])
    return replace(
        draft,
        values={**draft.values, "anchors": anchors},
        sections={**draft.sections, "neck": neck, "head": replace(head, rows=(row,))},
    )


def _plain_keys(data: Mapping[str, Any]) -> list[str]:
    keys = ("depth_multiple", "width_multiple", "activation", "anchors", "normalisation", "notes")
    return [key for key in keys if key in data]


def _base_document(document: Document, name: Any) -> Document:
    if not isinstance(name, str):
        raise UserError(f"{document.at('extends')}: extends must name a model file, got {name!r}")
    beside = document.path.parent / name
    try:
        return load_yaml(beside if beside.is_file() else find_config(name, ""))
    except UserError as error:
        raise UserError(f"{document.at('extends')}: extends {name!r}: {error}") from error


def _notes(draft: Draft) -> tuple[str, ...]:
    notes = draft.values.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise UserError(f"{draft.source}: notes must be a list of texts, got {notes!r}")
    return tuple(notes)


def _normalisation(value: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if isinstance(value, Mapping) and set(value) == {"mean", "std"}:
        value = (value["mean"], value["std"])
    try:
        return read_normalisation(value)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
