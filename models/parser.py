"""Model YAML to ModelSpec: rows, names, includes, `extends` + `swap` + `keep`. Runs nothing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import blocks  # noqa: F401  importing blocks fills the registry
from models.blocks.conv import activation
from models.detect_rows import anchors_of, merge_detection_rows, read_anchors
from models.resolve import resolve_rows
from models.rows import Row, read_rows
from models.sections import Section, multiple, named_section, read_section
from models.spec import DETECT, GraphSpec, ModelSpec, read_normalisation
from models.swap import Swap, apply_swaps, read_swaps
from utils.errors import UserError, nearest
from utils.paths import find_config
from utils.yamlio import Document, load_yaml

KEYS = (
    "nc", "ch", "depth_multiple", "width_multiple", "activation", "anchors", "normalisation",
    "backbone", "neck", "head", "extends", "swap", "keep",
)  # fmt: skip
OUTPUT = re.compile(r"out[0-9]")  # rows of a neck that Detect reads


@dataclass(frozen=True)
class _Model:
    """A model file with `extends` followed: values, and rows before scaling."""

    values: Mapping[str, Any]
    sections: Mapping[str, tuple[Row, ...]]
    notes: Mapping[str, str]  # by section


def load_spec(name: str, *, backbone: str | None = None, neck: str | None = None) -> ModelSpec:
    """Read a model by path or by its name in cfg/. Raises UserError with file, line and row.

    `backbone` and `neck` (names as in a model file, or paths) take the place of the model's own.
    """
    path = find_config(name, "")
    return compose(
        name,
        backbone=named_section(backbone, "backbone", where="--backbone") if backbone else None,
        neck=named_section(neck, "neck", where="--neck") if neck else None,
        source=str(path),
    )


def compose(
    name: str, *, backbone: Section | None, neck: Section | None, source: str = ""
) -> ModelSpec:
    """A model file with its backbone or its neck replaced by a read section."""
    path = find_config(name, "")
    model = _read(load_yaml(path), ())
    if neck is not None:
        model = _with_neck(model, neck, str(path))
    if backbone is not None:
        model = _with_backbone(model, backbone, str(path))
    return _resolve(model, source or str(path))


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
    return _resolve(_read(Document(Path(where), dict(data), {}), ()), where)


def normalise_activation(text: Any, where: str) -> str:
    """'nn.LeakyReLU(0.1)' -> 'LeakyReLU(0.1)'. UserError unless Name, Name() or Name(number)."""
    try:
        activation(str(text))
    except ValueError as error:
        raise UserError(f"{where}: activation {text!r}: {error}") from error
    return str(text).strip().removeprefix("nn.").removesuffix("()")


def _read(document: Document, chain: tuple[Path, ...]) -> _Model:
    data = document.mapping()
    for key in data:
        if key not in KEYS:
            raise UserError(f"{document.at(key)}: unknown key {key!r}{nearest(str(key), KEYS)}")
    if document.path in chain:
        raise UserError(f"{document.path}: extends itself by way of {chain[-1]}")
    base = _Model({}, {}, {})
    if "extends" in data:
        base = _read(_base_document(document, data["extends"]), (*chain, document.path))
    elif "backbone" not in data:
        raise UserError(
            f"{document.path}: key 'backbone' is missing (rows, or the name of a backbone)"
        )
    values = {**base.values, **{key: data[key] for key in _plain_keys(data)}}
    sections = dict(base.sections)
    notes = dict(base.notes)
    swaps: list[Swap] = read_swaps(document, ())
    for section in ("backbone", "neck", "head"):
        content = data.get(section)
        if isinstance(content, Mapping) and not content.keys().isdisjoint({"swap", "keep"}):
            if section not in sections:
                raise UserError(f"{document.at(section)}: swap needs rows that `extends` brings")
            swaps += read_swaps(document, (section,))
        elif content is not None:
            read = _section(document, section, content)
            sections[section], notes[section] = read.rows, read.note
    return _Model(values, apply_swaps(sections, swaps), notes)


def _section(document: Document, section: str, content: Any) -> Section:
    if isinstance(content, (str, Mapping)):
        return read_section(document, section, content)
    return Section(read_rows(document, (section,), section))


def _with_backbone(model: _Model, backbone: Section, where: str) -> _Model:
    """`model` on another backbone, whose taps the other rows have to read by name."""
    for row in (*model.sections.get("neck", ()), *model.sections.get("head", ())):
        if any(isinstance(source, int) and source >= 0 for source in row.sources):
            raise UserError(
                f"--backbone: {row.where} reads rows by number, which another backbone would shift;"
                f" name the rows in {where}, or give a neck as well (--neck pan)"
            )
    return _Model(
        model.values,
        {**model.sections, "backbone": backbone.rows},
        {**model.notes, "backbone": backbone.note},
    )


def _with_neck(model: _Model, neck: Section, where: str) -> _Model:
    """`model` with all rows between backbone and Detect replaced; Detect reads the neck's outN."""
    old = [row for row in model.sections.get("head", ()) if row.block == DETECT]
    outputs = sorted(row.name for row in neck.rows if row.name and OUTPUT.fullmatch(row.name))
    if len(old) != 1 or not outputs:
        missing = "a neck names its outputs out2, out3, ..." if old else "no Detect row"
        raise UserError(f"--neck: {where}: {missing}")
    detect = replace(old[0], sources=tuple(outputs), args=[])
    anchors = anchors_of(old[0], model.values.get("anchors"))
    if isinstance(anchors, list) and len(anchors) != len(outputs):
        anchors = len(read_anchors(anchors, len(anchors), where)[0]) // 2  # type: ignore[index]
    return _Model(
        {**model.values, "anchors": anchors},
        {**model.sections, "neck": neck.rows, "head": (detect,)},
        model.notes,
    )


def _plain_keys(data: Mapping[str, Any]) -> list[str]:
    keys = ("depth_multiple", "width_multiple", "activation", "anchors", "normalisation")
    return [key for key in keys if key in data]


def _base_document(document: Document, name: Any) -> Document:
    if not isinstance(name, str):
        raise UserError(f"{document.at('extends')}: extends must name a model file, got {name!r}")
    beside = document.path.parent / name
    try:
        return load_yaml(beside if beside.is_file() else find_config(name, ""))
    except UserError as error:
        raise UserError(f"{document.at('extends')}: extends {name!r}: {error}") from error


def _resolve(model: _Model, source: str) -> ModelSpec:
    depth = multiple(model.values, "depth_multiple", source) or 1.0
    width = multiple(model.values, "width_multiple", source) or 1.0
    rows = [
        row for section in ("backbone", "neck", "head") for row in model.sections.get(section, ())
    ]
    layers, anchors = resolve_rows(rows, depth=depth, width=width)
    anchors = model.values.get("anchors") if anchors is None else anchors
    layers = merge_detection_rows(layers)
    if layers[-1].block != DETECT or sum(layer.block == DETECT for layer in layers) != 1:
        raise UserError(f"{source}: exactly one Detect row is needed, as the last row")
    return ModelSpec(
        tuple(layers),
        normalise_activation(model.values.get("activation", "SiLU"), source),
        source,
        _normalisation(model.values.get("normalisation"), source),
        tuple(note for note in model.notes.values() if note),
        anchors=read_anchors(anchors, len(layers[-1].sources), source),
    )


def _normalisation(value: Any, where: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    if isinstance(value, Mapping) and set(value) == {"mean", "std"}:
        value = (value["mean"], value["std"])
    try:
        return read_normalisation(value)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
