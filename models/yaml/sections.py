"""Sections of a model: rows of the model file itself, or a backbone or neck file at one size."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from models.registry import Positive, Range
from models.spec import CLASSIFIER
from models.yaml.rows import Row, Setting, base_chain, check_keys, checked, read_rows, swap_rows
from utils.errors import UserError, nearest
from utils.files import ROOT, find_config
from utils.yamlio import Document, load_yaml

FOLDERS = {"backbone": "backbones", "neck": "necks", "head": "necks"}
REFERENCE_KEYS = ("file", "scale", "width", "depth")
FILE_KEYS = ("activation", "norm", "divisor", "scales", "rows", "classifier")
EXTENDING_KEYS = ("extends", "swap", "keep")  # sizes and settings are those of the file extended
INLINE_KEYS = ("activation", "norm", "divisor", "rows")
VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


@dataclass(frozen=True)
class Section:
    """Rows of a backbone or neck; `classifier`: those that make it an ImageNet classifier."""

    rows: tuple[Row, ...]
    classifier: tuple[Row, ...] = ()
    title: str = ""  # which size of a published backbone it is; '' for other rows
    width: float = 1.0
    published: tuple[float, ...] = ()  # widths of this depth that the paper has

    @property
    def note(self) -> str:
        """What tables add: 'backbone ghostnet-1.0 at width 0.7, not published', or ''."""
        if not self.title or self.width in self.published:
            return ""
        return f"backbone {self.title} at width {self.width:g}, not published"

    def resized(self, *, width: float, depth: float | None = None) -> Section:
        """The same rows at another width, and another depth where one is given."""
        rows = []
        for row in self.rows:
            setting = replace(row.setting, width=width, depth=depth or row.setting.depth)
            rows.append(replace(row, setting=setting))
        return replace(self, rows=tuple(rows), width=width)


def read_section(document: Document, section: str, content: Any) -> Section:
    """The value of `backbone:`, `neck:` or `head:` in a model file.

    Rows, a name (`ghostnet-1.0`), {file, scale, width, depth}, or {rows, activation, norm,
    divisor}.
    """
    where = document.at(section)
    if isinstance(content, str):
        return named_section(content, section, where=where)
    if not isinstance(content, Mapping):
        return Section(read_rows(document, (section,), section))
    check_keys(document, REFERENCE_KEYS if "file" in content else INLINE_KEYS, section)
    if "file" not in content:
        setting = _setting(content, section, where, width=1.0, depth=1.0)
        return Section(read_rows(document, (section, "rows"), section, setting))
    name = checked(where, f"{section}.file", content["file"], str)
    local = document.path.parent / name
    return named_section(str(local) if local.is_file() else name, section, content, where=where)


def named_section(
    name: str, section: str, size: Mapping[str, Any] | None = None, *, where: str = ""
) -> Section:
    """A section file by path or name; `vovnet-27-slim` is vovnet.yaml at the scale 27-slim.

    `size` may give the scale, and a width and depth instead of the scale's.  UserError with the
    nearest known name.
    """
    size = size or {}
    scale = size.get("scale")
    try:
        if scale is None:
            path, scale = _find(name, section)
        else:
            path = find_config(name, FOLDERS[section])
        *variants, base = base_chain(load_yaml(path), FOLDERS[section])
        for variant in variants:
            check_keys(variant, EXTENDING_KEYS)
        part = _read_file(base, section, "" if scale is None else str(scale), size)
        for variant in reversed(variants):
            part = replace(part, rows=swap_rows(variant, {section: part.rows})[section])
    except UserError as error:
        raise UserError(f"{where}: {error}" if where else str(error)) from error
    return part


def section_names(section: str) -> list[str]:
    """Every name that `named_section` knows: each file of cfg/, at each of its scales."""
    names = []
    for path in sorted((ROOT / "cfg" / FOLDERS[section]).glob("*.yaml")):
        base = base_chain(load_yaml(path), FOLDERS[section])[-1]
        names += [f"{path.stem}-{scale}".rstrip("-") for scale in _scales(base)]
    return names


def _find(name: str, section: str) -> tuple[Path, str | None]:
    """The file and the scale that a name means: the file first, then every split at a hyphen."""
    folder = FOLDERS[section]
    splits = [(name, None), *((name[: m.start()], name[m.end() :]) for m in re.finditer("-", name))]
    for stem, scale in splits:
        try:
            path = find_config(stem, folder)
        except UserError:
            continue
        if scale is None or "scales" in base_chain(load_yaml(path), folder)[-1].data:
            return path, scale
    raise UserError(
        f"{name}: no such {section}, neither a file nor a name of cfg/{folder}"
        f"{nearest(name, section_names(section))}"
    )


def _read_file(document: Document, section: str, scale: str, size: Mapping[str, Any]) -> Section:
    """The rows of a section file at one of its scales ('' where it has none)."""
    check_keys(document, FILE_KEYS)
    scales, data, where = _scales(document), document.data, document.at("scales")
    if scale not in scales:
        has = f"has the scales {', '.join(scales)}" if "" not in scales else "has no scales"
        asked = f"{scale!r} is not one of them{nearest(scale, scales)}" if scale else "name one"
        raise UserError(f"{document.path.name} {has}; {asked}")
    values = scales[scale]
    width, depth = (
        multiple(size, key, str(document.path))
        or multiple(values, key, where)
        # a backbone is as published, whatever multiples the model has
        or (1.0 if section == "backbone" else None)
        for key in ("width", "depth")
    )
    setting = _setting(data, section, str(document.path), width=width, depth=depth)
    filled = replace(document, data=_substitute(data, values, document, ()))
    rows = read_rows(filled, ("rows",), section, setting)
    if section != "backbone":
        return Section(rows)
    end = read_rows(filled, (CLASSIFIER,), CLASSIFIER, setting) if CLASSIFIER in data else ()
    published = tuple(
        other.get("width", 1.0)
        for other in scales.values()
        if {**other, "width": 0} == {**values, "width": 0}  # sizes of other depth do not count
    )
    title = f"{document.path.stem}-{scale}".removesuffix("-")
    return Section(rows, end, title, width or 1.0, published)


def multiple(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """A multiple of a mapping, 0.001 to 100, or None where it is absent."""
    value = checked(where, key, values.get(key), Annotated[float, Range(0.001, 100)] | None)
    return value and float(value)


def _setting(
    data: Mapping[str, Any], section: str, where: str, *, width: float | None, depth: float | None
) -> Setting:
    """The keys of a file that concern all its rows."""
    activation, norm, divisor = (data.get(key) for key in ("activation", "norm", "divisor"))
    if section != "backbone" and (activation is not None or norm is not None):
        raise UserError(f"{where}: activation and norm of a {section} are the model's; remove them")
    checked(where, "activation", activation, str | None)
    checked(where, "divisor", divisor, Positive | None)
    if norm is not None:
        if not isinstance(norm, Mapping) or set(norm) != {"eps", "momentum"}:
            raise UserError(f"{where}: norm must be {{eps: ..., momentum: ...}}, got {norm!r}")
        for key, value in norm.items():
            checked(where, f"norm.{key}", value, Annotated[float, Range(1e-12, 1)])
        norm = (float(norm["eps"]), float(norm["momentum"]))
    return Setting(depth, width, divisor, activation, norm)


def _scales(document: Document) -> dict[str, Mapping[str, Any]]:
    """The scales of a section file by name; one without a name where it has none."""
    scales = document.mapping().get("scales", {"": {}})
    maps = [scales, *scales.values()] if isinstance(scales, Mapping) else []
    if len(maps) < 2 or not all(isinstance(values, Mapping) for values in maps):
        raise UserError(f"{document.at('scales')}: scales must map names to mappings")
    return {str(key): values for key, values in scales.items()}


def _substitute(
    value: Any, variables: Mapping[str, Any], document: Document, key: tuple[str | int, ...]
) -> Any:
    """`value` with every text '$name' replaced by the scale's value of that name."""
    if isinstance(value, str) and (match := VARIABLE.fullmatch(value)):
        if match[1] not in variables:
            raise UserError(
                f"{document.at(*key)}: {value} is not a key of the scale"
                f"{nearest(match[1], variables)}"
            )
        return variables[match[1]]
    if isinstance(value, list):
        return [_substitute(item, variables, document, (*key, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {k: _substitute(v, variables, document, (*key, k)) for k, v in value.items()}
    return value
