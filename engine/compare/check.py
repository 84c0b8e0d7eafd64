"""Whether a record's JSON, which may come from elsewhere, has the shape that tables rely on."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from engine.compare.schema import ACCURACY, Model
from utils.config import MAX_PIXELS
from utils.errors import UserError
from utils.terminal import is_printable

FINGERPRINT = re.compile(r"[0-9a-f]{8,64}")
LEVELS = 16  # of mappings and lists in each other; a record has 6
SMALLEST, LARGEST = 1e-99, 1e99  # of numbers: so far from the ends that no sum or quotient is inf
MOST_IMAGES = 1_000_000  # for validation: the resamples count each of them a thousand times
GONE = object()
Test = Callable[[Any], bool]


def _text(value: Any) -> bool:
    return isinstance(value, str) and is_printable(value)


def _number(value: Any) -> bool:
    plain = isinstance(value, int | float) and not isinstance(value, bool)
    return plain and (value == 0 or SMALLEST < abs(value) < LARGEST)


def _whole(value: Any) -> bool:
    return isinstance(value, int) and _number(value) and value >= 0


def _from_1_to(most: int) -> Test:
    return lambda value: _whole(value) and 1 <= value <= most


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


def _sound(value: Any, levels: int = LEVELS) -> bool:
    """Whether values of any shape can be compared, shown and written again."""
    if isinstance(value, dict | list):
        inner = [*value, *value.values()] if isinstance(value, dict) else value
        return levels > 0 and all(_sound(item, levels - 1) for item in inner)
    return value is None or isinstance(value, bool) or _text(value) or _number(value)


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
    "protocol.image_size": _from_1_to(MAX_PIXELS),
    "protocol.data": _map,
    "protocol.data.name": _text,
    "protocol.data.classes": lambda value: _all(_text)(value) and len(value) > 0,
    "protocol.data.val": _hex,
    "protocol.data.val_images": _from_1_to(MOST_IMAGES),
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
_TRAINED: dict[str, Test] = {
    "curves.epoch": _all(_number),
    "protocol.data.train_images": _whole,
}
_OPTIONAL: dict[str, Test] = {
    "protocol.device": _map,
    "environment": _values(_or_none(lambda value: _text(value) or _number(value))),
    "environment.commit": _or_none(_text),
    "training": _map,
}


def check_record(path: Path, content: Mapping[str, Any]) -> None:
    """Raise UserError naming the file, and the first key that is missing or has another type."""
    for problem in _problems(content):
        raise UserError(f"{path}: not a record: {problem}")


def _problems(content: Mapping[str, Any]) -> Iterator[str]:
    """Lazily: each one relies on there being none of those before it."""
    shape = {**_SHAPE, **(_TRAINED if content.get("curves") else {}), **_OPTIONAL}
    for key, test in shape.items():
        value = _find(content, key)
        if value is GONE:
            if key not in _OPTIONAL:
                yield f"{key!r} is missing"
        elif not test(value):
            expected = _EXPECTED.get(test)
            wanted = f", expected {expected}" if expected else ""
            shown = repr(value)
            yield f"{key!r} is {shown if len(shown) <= 60 else shown[:57] + '...'}{wanted}"
    names = [one["name"] for one in content["metrics"]["per_class"]]
    if names != content["protocol"]["data"]["classes"]:
        yield "'metrics.per_class' is not of the classes in 'protocol.data.classes'"
    if len({len(values) for values in content["curves"].values()}) > 1:
        yield "'curves' have different numbers of epochs"
    for key, value in content.items():
        if not _sound(value):
            yield f"{key!r} nests too deeply, or has a text or a number that is not to be shown"


def _find(content: Mapping[str, Any], key: str) -> Any:
    """What a dotted key names; GONE without it."""
    value: Any = content
    for part in key.split("."):
        if part not in value:
            return GONE
        value = value[part]
    return value
