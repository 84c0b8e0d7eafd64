"""Included sections: a backbone or neck file of rows, at one of its sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from models.yaml.rows import CLASSIFIER, Row, Setting, read_rows
from models.yaml.scales import chosen_scale, multiple, scales_of, substitute
from models.yaml.swap import apply_swaps, read_swaps
from utils.errors import UserError, nearest
from utils.paths import ROOT, find_config
from utils.yamlio import Document, load_yaml

FOLDERS = {"backbone": "backbones", "neck": "necks", "head": "necks"}
REFERENCE_KEYS = ("file", "scale", "width", "depth")
FILE_KEYS = (
    "activation", "norm", "divisor", "scales", "rows", "classifier", "extends", "swap", "keep",
)  # fmt: skip
EXTENDING_KEYS = ("extends", "swap", "keep")  # sizes and settings are those of the file extended
INLINE_KEYS = ("activation", "norm", "divisor", "rows")


@dataclass(frozen=True)
class Size:
    """Which size of a published backbone the rows have."""

    name: str
    width: float
    published: tuple[float, ...]  # widths of this depth that the paper has


@dataclass(frozen=True)
class Section:
    """Rows of a backbone or neck; `classifier`: those that make it an ImageNet classifier."""

    rows: tuple[Row, ...]
    classifier: tuple[Row, ...] = ()
    size: Size | None = None

    @property
    def note(self) -> str:
        """What tables say of it: 'backbone ghostnet-1.0 at width 0.7, not published', or ''."""
        size = self.size
        if size is None or size.width in size.published:
            return ""
        return f"backbone {size.name} at width {size.width:g}, not published"

    def resized(self, *, width: float, depth: float | None = None) -> Section:
        """The same rows at another width, and another depth where one is given."""
        rows = tuple(
            replace(
                row,
                setting=replace(
                    row.setting, width=width, depth=row.setting.depth if depth is None else depth
                ),
            )
            for row in self.rows
        )
        return replace(self, rows=rows, size=self.size and replace(self.size, width=width))


def read_section(document: Document, section: str, content: Any) -> Section:
    """What stands under `backbone:` or `neck:` of a model file, when it is no list of rows.

    A name (`ghostnet-1.0`), {file, scale, width, depth}, or {rows, activation, norm, divisor}.
    """
    where = document.at(section)
    if isinstance(content, str):
        return named_section(content, section, where=where)
    _known(content, REFERENCE_KEYS if "file" in content else INLINE_KEYS, document, section)
    if "rows" in content:
        setting = replace(_setting(content, section, where), width=1.0, depth=1.0)
        rows = read_rows(document, (section, "rows"), section)
        return Section(tuple(replace(row, setting=setting) for row in rows))
    if not isinstance(content.get("file"), str):
        raise UserError(f"{where}: {section}.file must name a YAML file of rows")
    beside = document.path.parent / content["file"]
    name = str(beside) if beside.is_file() else content["file"]
    scale = None if content.get("scale") is None else str(content["scale"])
    return named_section(
        name,
        section,
        where=where,
        scale=scale,
        width=multiple(content, "width", where),
        depth=multiple(content, "depth", where),
    )


def named_section(
    name: str,
    section: str,
    *,
    where: str = "",
    scale: str | None = None,
    width: float | None = None,
    depth: float | None = None,
) -> Section:
    """A section file by path or name; `vovnet-27-slim` is vovnet.yaml at the scale 27-slim.

    `width` and `depth` take the place of the scale's.  UserError with the nearest known name.
    """
    prefix = f"{where}: " if where else ""
    try:
        path, scale = (
            (find_config(name, FOLDERS[section]), scale) if scale else _split(name, section)
        )
        return _read(load_yaml(path), section, scale=scale, width=width, depth=depth)
    except UserError as error:
        raise UserError(f"{prefix}{error}") from error


def section_names(section: str) -> list[str]:
    """Every name that `named_section` knows: each file of cfg/, at each of its scales."""
    home = ROOT / "cfg" / FOLDERS[section]
    names = []
    for path in sorted(home.glob("*.yaml")):
        document = base_document(load_yaml(path), FOLDERS[section])
        names += [f"{path.stem}-{scale}".rstrip("-") for scale in scales_of(document)]
    return names


def _split(name: str, section: str) -> tuple[Path, str | None]:
    """The file and the scale that a name means: the file first, then every split at a hyphen."""
    folder = FOLDERS[section]
    try:
        return find_config(name, folder), None
    except UserError:
        for match in re.finditer("-", name):
            try:
                path = find_config(name[: match.start()], folder)
            except UserError:
                continue
            if "scales" in base_document(load_yaml(path), folder).data:
                return path, name[match.end() :]
    raise UserError(
        f"{name}: no such {section}, neither a file nor a name of cfg/{folder}"
        f"{nearest(name, section_names(section))}"
    )


def _read(
    document: Document,
    section: str,
    *,
    scale: str | None,
    width: float | None,
    depth: float | None,
) -> Section:
    data = document.mapping()
    _known(data, FILE_KEYS, document)
    if "extends" in data:
        return _extended(document, section, scale=scale, width=width, depth=depth)
    variables = chosen_scale(document, scale)
    own = multiple(variables, "width", document.at("scales"))
    setting = _setting(data, section, str(document.path))
    if section == "backbone":  # exactly as published, whatever multiples the model has
        setting = replace(setting, width=own or 1.0, depth=1.0)
    elif own is not None:
        setting = replace(setting, width=own)
    if (own_depth := multiple(variables, "depth", document.at("scales"))) is not None:
        setting = replace(setting, depth=own_depth)
    setting = replace(setting, width=width or setting.width, depth=depth or setting.depth)
    filled = replace(document, data=substitute(data, variables, document, ()))
    rows = tuple(replace(row, setting=setting) for row in read_rows(filled, ("rows",), section))
    classifier: tuple[Row, ...] = ()
    if section == "backbone" and CLASSIFIER in data:
        classifier = tuple(
            replace(row, setting=setting) for row in read_rows(filled, (CLASSIFIER,), CLASSIFIER)
        )
    return Section(rows, classifier, _size(document, section, scale, width))


def base_document(document: Document, folder: str) -> Document:
    """The section file with rows at the end of a chain of `extends`; UserError for a ring."""
    chain = [document.path]
    while "extends" in document.mapping():
        _known(document.data, EXTENDING_KEYS, document)
        document = _base(document, folder)
        if document.path in chain:
            raise UserError(f"{chain[0]}: extends itself by way of {chain[-1]}")
        chain.append(document.path)
    return document


def _base(document: Document, folder: str) -> Document:
    name = document.data["extends"]
    if not isinstance(name, str):
        raise UserError(
            f"{document.at('extends')}: extends must name another section file, got {name!r}"
        )
    beside = document.path.parent / name
    return load_yaml(beside if beside.is_file() else find_config(name, folder))


def _extended(
    document: Document,
    section: str,
    *,
    scale: str | None,
    width: float | None,
    depth: float | None,
) -> Section:
    """A section file by what it changes of another one: `extends`, `swap`, `keep`."""
    base_document(document, FOLDERS[section])  # no ring
    base = _read(_base(document, FOLDERS[section]), section, scale=scale, width=width, depth=depth)
    rows = apply_swaps({section: base.rows}, read_swaps(document, ()))[section]
    return replace(base, rows=rows)


def _known(data: Mapping[str, Any], keys: Sequence[str], document: Document, *parents: str) -> None:
    for key in data:
        if key not in keys:
            raise UserError(
                f"{document.at(*parents, key)}: unknown key {key!r}{nearest(str(key), keys)}"
            )


def _setting(data: Mapping[str, Any], section: str, where: str) -> Setting:
    """What a file says of all its rows."""
    activation, norm, divisor = (data.get(key) for key in ("activation", "norm", "divisor"))
    if section != "backbone" and (activation is not None or norm is not None):
        raise UserError(f"{where}: activation and norm of a {section} are the model's; remove them")
    if activation is not None and not isinstance(activation, str):
        raise UserError(f"{where}: activation must be a name, got {activation!r}")
    if divisor is not None and (not isinstance(divisor, int) or divisor < 1):
        raise UserError(f"{where}: divisor must be a whole number from 1, got {divisor!r}")
    return Setting(
        width=1.0 if section == "backbone" else None,
        depth=1.0 if section == "backbone" else None,
        divisor=divisor,
        activation=activation,
        norm=_norm(norm, where),
    )


def _norm(norm: Any, where: str) -> tuple[float, float] | None:
    if norm is None:
        return None
    if not isinstance(norm, Mapping) or set(norm) != {"eps", "momentum"}:
        raise UserError(f"{where}: norm must be {{eps: ..., momentum: ...}}, got {norm!r}")
    for key, value in norm.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
            raise UserError(f"{where}: norm.{key} must be a number in (0, 1], got {value!r}")
    return float(norm["eps"]), float(norm["momentum"])


def _size(document: Document, section: str, scale: str | None, width: float | None) -> Size | None:
    """The size that a backbone's scale and width mean; sizes of other depth do not count."""
    if section != "backbone":
        return None
    chosen = chosen_scale(document, scale)
    name = document.path.stem if scale is None else f"{document.path.stem}-{scale}"
    published = tuple(
        values.get("width", 1.0)
        for values in scales_of(document).values()
        if _other(values) == _other(chosen)
    )
    return Size(name, width or chosen.get("width", 1.0), published)


def _other(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != "width"}
