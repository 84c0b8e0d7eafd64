"""Model YAML to ModelSpec: rows, names, includes, `extends` + `swap` + `keep`. Runs nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models import blocks, registry  # noqa: F401  importing blocks fills the registry
from models.blocks.conv import activation
from models.detect_rows import anchors_of, merge_detection_rows, read_anchors, refuse_other_tasks
from models.rows import Row, bind_arguments, read_rows
from models.spec import IMAGE, LayerSpec, ModelSpec
from models.swap import Swap, apply_swaps, read_swaps
from utils.errors import UserError, nearest
from utils.paths import find_config
from utils.yamlio import Document, load_yaml

KEYS = (
    "nc", "ch", "depth_multiple", "width_multiple", "activation", "anchors",
    "backbone", "neck", "head", "extends", "swap", "keep",
)  # fmt: skip


@dataclass(frozen=True)
class _Model:
    """A model file with `extends` followed: values, and rows before scaling."""

    values: Mapping[str, Any]
    sections: Mapping[str, tuple[Row, ...]]


def load_spec(name: str) -> ModelSpec:
    """Read a model by path or by its name in cfg/. Raises UserError with file, line and row."""
    path = find_config(name, "")
    return _resolve(_read(load_yaml(path), ()), str(path))


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
    base = _Model({}, {})
    if "extends" in data:
        base = _read(_base_document(document, data["extends"]), (*chain, document.path))
    elif "backbone" not in data:
        raise UserError(
            f"{document.path}: key 'backbone' is missing (rows, or the name of a backbone)"
        )
    values = {**base.values, **{key: data[key] for key in _plain_keys(data)}}
    sections = dict(base.sections)
    swaps: list[Swap] = read_swaps(document, ())
    for section in ("backbone", "neck", "head"):
        content = data.get(section)
        if content is None:
            continue
        if isinstance(content, Mapping) and not content.keys().isdisjoint({"swap", "keep"}):
            if section not in sections:
                raise UserError(f"{document.at(section)}: swap needs rows that `extends` brings")
            swaps += read_swaps(document, (section,))
        else:
            sections[section] = _section(document, section, content)
    return _Model(values, apply_swaps(sections, swaps))


def _plain_keys(data: Mapping[str, Any]) -> list[str]:
    return [
        key for key in ("depth_multiple", "width_multiple", "activation", "anchors") if key in data
    ]


def _base_document(document: Document, name: Any) -> Document:
    if not isinstance(name, str):
        raise UserError(f"{document.at('extends')}: extends must name a model file, got {name!r}")
    beside = document.path.parent / name
    try:
        return load_yaml(beside if beside.is_file() else find_config(name, ""))
    except UserError as error:
        raise UserError(f"{document.at('extends')}: extends {name!r}: {error}") from error


def _section(document: Document, section: str, content: Any) -> tuple[Row, ...]:
    if isinstance(content, (str, Mapping)):
        return _included(document, section, content)
    return read_rows(document, (section,), section)


def _included(
    document: Document, section: str, content: str | Mapping[str, Any]
) -> tuple[Row, ...]:
    """Rows of a named file: `ghostnet-1.0`, or {file: backbones/ghostnet.yaml, scale: '1.0'}."""
    where = document.at(section)
    folder = "necks" if section != "backbone" else "backbones"
    if isinstance(content, str):
        path, scale = _named_section(content, folder)
    else:
        for key in content:
            if key not in {"file", "scale"}:
                raise UserError(
                    f"{where}: unknown key {key!r}{nearest(str(key), ('file', 'scale'))}"
                )
        if not isinstance(content.get("file"), str):
            raise UserError(f"{where}: {section}.file must name a YAML file of rows")
        beside = document.path.parent / content["file"]
        path = beside if beside.is_file() else find_config(content["file"], folder)
        scale = None if content.get("scale") is None else str(content["scale"])
    part = load_yaml(path)
    data = part.mapping()
    for key in data:
        if key not in {"scales", "rows"}:
            raise UserError(
                f"{part.at(key)}: unknown key {key!r}{nearest(str(key), ('scales', 'rows'))}"
            )
    rows = read_rows(part, ("rows",), section)
    scales = data.get("scales")
    if scales is None:
        if scale is not None:
            raise UserError(f"{where}: {path.name} has no scales, but scale {scale!r} is asked for")
        return rows
    known = {str(key): value for key, value in scales.items()}
    if scale not in known:
        asked = (
            "none is named"
            if scale is None
            else f"{scale!r} is not one of them{nearest(scale, known)}"
        )
        raise UserError(f"{where}: {path.name} has the scales {', '.join(known)}; {asked}")
    depth = _multiple(known[scale], "depth", part.at("scales"))
    width = _multiple(known[scale], "width", part.at("scales"))
    return tuple(replace(row, multiples=(depth, width)) for row in rows)


def _named_section(name: str, folder: str) -> tuple[Path, str | None]:
    stem, _, scale = name.rpartition("-")
    try:
        return find_config(name, folder), None
    except UserError:
        if not stem:
            raise
    return find_config(stem, folder), scale


def _multiple(values: Mapping[str, Any], key: str, where: str) -> float:
    value = values.get(key, 1.0)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise UserError(f"{where}: {key} must be a number over 0, got {value!r}")
    return float(value)


def _resolve(model: _Model, source: str) -> ModelSpec:
    depth = _multiple(model.values, "depth_multiple", source)
    width = _multiple(model.values, "width_multiple", source)
    rows = [
        row for section in ("backbone", "neck", "head") for row in model.sections.get(section, ())
    ]
    layers: list[LayerSpec] = []
    names: dict[str, int] = {}
    anchors = model.values.get("anchors")
    for index, row in enumerate(rows):
        refuse_other_tasks(row)
        sources = _sources(row, index, names)
        if row.name is not None:
            if row.name in names:
                raise UserError(f"{row.where}: row name {row.name!r} is used twice")
            names[row.name] = index
        if row.block == "Detect":
            anchors = anchors_of(row, anchors)
            args: Mapping[str, Any] = {}
        else:
            args = bind_arguments(row)
        layer = LayerSpec(
            _part(row),
            sources, row.repeats, row.block, args, row.name, row.where,
        )  # fmt: skip
        d, w = row.multiples or (depth, width)
        channel_args = registry.channel_args(row.block) if row.block != "Detect" else ()
        layers.append(layer.scaled(depth=d, width=w, channel_args=channel_args))
    layers = merge_detection_rows(layers)
    if layers[-1].block != "Detect" or sum(layer.block == "Detect" for layer in layers) != 1:
        raise UserError(f"{source}: exactly one Detect row is needed, as the last row")
    activation = normalise_activation(model.values.get("activation", "SiLU"), source)
    return ModelSpec(
        tuple(layers),
        read_anchors(anchors, len(layers[-1].sources), source),
        activation,
        source,
    )


def _part(row: Row) -> str:
    if row.block == "Detect":
        return "head"
    return "backbone" if row.section == "backbone" else "neck"


def _sources(row: Row, index: int, names: Mapping[str, int]) -> tuple[int, ...]:
    sources: list[int] = []
    for item in row.sources:
        if isinstance(item, str):
            if item not in names:
                raise UserError(
                    f"{row.where}: row {index} reads {item!r}, which names no earlier row"
                    f"{nearest(item, names)}"
                )
            sources.append(names[item])
        else:
            source = index + item if item < 0 else item
            if not (0 <= source < index or (index == 0 and source == IMAGE)):
                raise UserError(
                    f"{row.where}: row {index} reads {item}; expected a row from 0 to {index - 1}, "
                    f"or -1 to -{max(index, 1)}"
                )
            sources.append(source)
    return tuple(sources)
