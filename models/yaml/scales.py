"""The sizes of a section file: their values, and `$name` in rows replaced by them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from utils.errors import UserError, nearest
from utils.yamlio import Document

VARIABLE = re.compile(r"\$([A-Za-z_][A-Za-z0-9_]*)")


def scales_of(document: Document) -> dict[str, Mapping[str, Any]]:
    """The scales of a section file by name; one without a name where it has none."""
    scales = document.data.get("scales")
    if scales is None:
        return {"": {}}
    if (
        not isinstance(scales, Mapping)
        or not scales
        or not all(isinstance(v, Mapping) for v in scales.values())
    ):
        raise UserError(f"{document.at('scales')}: scales must map names to mappings")
    return {str(key): value for key, value in scales.items()}


def chosen_scale(document: Document, scale: str | None) -> Mapping[str, Any]:
    """The values of the scale asked for; none where the file has no scales."""
    known = scales_of(document)
    if (scale or "") in known:
        return known[scale or ""]
    if "" in known:
        raise UserError(f"{document.path.name} has no scales, but scale {scale!r} is asked for")
    asked = (
        "none is named" if scale is None else f"{scale!r} is not one of them{nearest(scale, known)}"
    )
    raise UserError(f"{document.path.name} has the scales {', '.join(known)}; {asked}")


def substitute(
    value: Any, variables: Mapping[str, Any], document: Document, key: tuple[str | int, ...]
) -> Any:
    """`value` with every text '$name' replaced by the scale's value of that name."""
    if isinstance(value, str) and (match := VARIABLE.fullmatch(value)):
        if match[1] not in variables:
            raise UserError(
                f"{document.at(*key)}: {value} is no key of the scale{nearest(match[1], variables)}"
            )
        return variables[match[1]]
    if isinstance(value, list):
        return [substitute(item, variables, document, (*key, i)) for i, item in enumerate(value)]
    if isinstance(value, Mapping):
        return {k: substitute(v, variables, document, (*key, k)) for k, v in value.items()}
    return value


def multiple(values: Mapping[str, Any], key: str, where: str) -> float | None:
    """A number over 0 and up to 100 of a mapping, or None where it is absent."""
    if key not in values:
        return None
    value = values[key]
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 100:
        raise UserError(f"{where}: {key} must be a number over 0 and up to 100, got {value!r}")
    return float(value)
