"""Whether a record's JSON, which may come from elsewhere, has the shape that tables rely on."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from engine.compare_schema import ACCURACY, Model
from utils.errors import UserError

FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable()


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _map(value: Any) -> bool:
    return isinstance(value, dict)


def _hex(value: Any) -> bool:
    return isinstance(value, str) and FINGERPRINT.fullmatch(value) is not None


def _or_none(test: Test) -> Test:
    return lambda value: value is None or test(value)


def _all(test: Test) -> Test:
    return lambda value: isinstance(value, list) and all(map(test, value))


def _values(test: Test) -> Test:
    return lambda value: isinstance(value, dict) and all(map(test, value.values()))


_EXPECTED: dict[Test, str] = {
    _text: "printable text",
    _whole: "a whole number",
    _map: "a mapping",
    _hex: "a fingerprint of hexadecimal digits",
}
_CLASS = {"name": _text, "instances": _whole, "ap": _or_none(_number), "ap50": _or_none(_number)}
_SHAPE: dict[str, Test] = {
    "name": _text,
    "model_id": _text,
    "model": _map,
    **{f"model.{key}": _text for key in Model.__annotations__ if key != "notes"},
    "model.notes": _all(_text),
    "spec": _map,
    "seed": _or_none(_whole),
    "protocol": _map,
    "protocol.image_size": lambda value: _whole(value) and value > 0,
    "protocol.data": _map,
    "protocol.data.name": _text,
    "protocol.data.classes": lambda value: _all(_text)(value) and len(value) > 0,
    "protocol.data.val": _hex,
    "protocol.data.val_images": _whole,
    "command": _text,
    "metrics": _map,
    **{f"metrics.{key}": _or_none(_number) for key in ACCURACY[-2:]},
    "metrics.coco": _map,
    **{f"metrics.coco.{key}": _number for key in ACCURACY[:-2]},
    "metrics.per_class": _all(
        lambda one: _map(one) and all(key in one and test(one[key]) for key, test in _CLASS.items())
    ),
    "best_epoch": _or_none(_whole),
    "curves": _values(_all(_or_none(_number))),
    "cost": _map,
}
_OPTIONAL: dict[str, Test] = {"environment": _values(_or_none(lambda v: _text(v) or _number(v)))}
_TRAINED: dict[str, Test] = {
    "curves.epoch": _all(_number),
    "protocol.data.train_images": _whole,
}


def check_record(path: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError naming the file, and the first key that is missing or has another type."""
    shape = {**_SHAPE, **(_TRAINED if content.get("curves") else {})}
    shape |= {key: test for key, test in _OPTIONAL.items() if key in content}
    for key, test in shape.items():
        value: Any = content
        for part in key.split("."):
            if part not in value:
                raise UserError(f"{path}: not a record: {key!r} is missing")
            value = value[part]
        if not test(value):
            expected = _EXPECTED.get(test)
            wanted = f", expected {expected}" if expected else ""
            shown = ascii(value)  # what comes from elsewhere is not sent to the terminal as it is
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise UserError(f"{path}: not a record: {key!r} is {shown}{wanted}")
    training = content.get("training", {})
    if not isinstance(training, dict):
        raise UserError(f"{path}: not a record: 'training' is no mapping")
