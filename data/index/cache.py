"""What a scan found out, kept for the next start: arrays and JSON in one .npz, never code.

Everything is keyed by content: labels by a hash of the label files' bytes, an image by its size,
time and the hash of its two ends. A file that does not fit, for whatever reason, is made anew.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
import tempfile
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from data.index.labels import Entry, ImageCheck, Labels, Parsed
from data.index.records import Problem
from utils.ranks import warn_main

FORMAT = "featherdet-scan-1"  # another one is made anew
_COLUMNS = {  # of Labels: type and number of axes
    "image": ("i8", 1),
    "classes": ("i8", 1),
    "boxes": ("f8", 2),
    "crowd": ("?", 1),
    "areas": ("f8", 1),
    "sources": ("i8", 1),
    "points": ("f4", 2),
    "starts": ("i8", 1),
}
_PER_IMAGE = {"rejected": ("i8", 1), "unreadable": ("?", 1)}
_BROKEN = (
    OSError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    MemoryError,
    RecursionError,
    OverflowError,
    SyntaxError,
    zipfile.BadZipFile,
    zlib.error,
    NotImplementedError,
)


@dataclass(frozen=True)
class Cached:
    """The content of a cache file; empty when there was none."""

    parsed: Parsed | None = None
    checks: Mapping[str, ImageCheck] = field(default_factory=dict)


def cache_file(name: str, key: str) -> Path:
    """Where the cache of a split lies: in the user's cache folder, never in the data set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else _home() / ".cache"
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / "featherdet" / f"{name}-{digest}.npz"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry and without HOME, as in some containers
        return Path(tempfile.gettempdir())


def load_cache(file: Path) -> Cached:
    """Read a cache file. A missing one is empty, a bad one is said and empty; runs nothing."""
    if not os.path.isfile(file):  # noqa: PTH113  Path.is_file raises where it may not look
        return Cached()
    try:
        with file.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            return _unpack(arrays)
    except _BROKEN as error:
        warn_main(f"warning: {file}: not a usable scan cache ({_brief(error)}); it is made anew")
        return Cached()


def save_cache(file: Path, parsed: Parsed, checks: Sequence[ImageCheck]) -> bool:
    """Write a cache file as a whole; False, with one warning, where that is not possible."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as stream:
            np.savez(stream, allow_pickle=False, **_pack(parsed, checks))
        temporary.replace(file)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        warn_main(f"warning: no scan cache, every start scans anew: {file.parent}: {_brief(error)}")
        return False
    return True


def _brief(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:120]


def _pack(parsed: Parsed, checks: Sequence[ImageCheck]) -> dict[str, np.ndarray]:
    # an image that could not even be read has no identity to be known again by
    known = [(e, c) for e, c in zip(parsed.entries, checks, strict=True) if c.edges]
    texts = {
        "format": FORMAT,
        "digest": parsed.digest,
        "names": parsed.names,
        "category_ids": parsed.category_ids,
        "annotations": None if parsed.annotations is None else str(parsed.annotations),
        "problems": [(item.where, item.cause, item.kind) for item in parsed.problems],
        "entries": [
            (str(e.path), e.image_id, e.size, None if e.label_file is None else str(e.label_file))
            for e in parsed.entries
        ],
        "checks": {
            str(e.path): (c.size, c.mtime_ns, c.edges, c.height, c.width, c.cause) for e, c in known
        },
    }
    arrays = {item.name: getattr(parsed.labels, item.name) for item in fields(Labels)}
    arrays |= {name: getattr(parsed, name) for name in _PER_IMAGE}
    arrays["texts"] = np.frombuffer(json.dumps(texts).encode(), np.uint8)
    return arrays


def _unpack(arrays: Mapping[str, np.ndarray]) -> Cached:
    texts = json.loads(_array(arrays, "texts", ("u1", 1)).tobytes())
    if texts["format"] != FORMAT:
        raise ValueError(f"format {texts['format']!r}")
    columns = {name: _array(arrays, name, kind) for name, kind in _COLUMNS.items()}
    parsed = Parsed(
        entries=tuple(_entry(*item) for item in texts["entries"]),
        labels=Labels(**columns),
        names=tuple(map(str, texts["names"])),
        category_ids=tuple(map(int, texts["category_ids"])),
        problems=tuple(Problem(*map(str, item)) for item in texts["problems"]),
        rejected=_array(arrays, "rejected", _PER_IMAGE["rejected"]),
        unreadable=_array(arrays, "unreadable", _PER_IMAGE["unreadable"]),
        annotations=None if texts["annotations"] is None else Path(texts["annotations"]),
        digest=str(texts["digest"]),
    )
    return Cached(parsed, {path: _check(*item) for path, item in texts["checks"].items()})


def _array(arrays: Mapping[str, np.ndarray], name: str, kind: tuple[str, int]) -> np.ndarray:
    array = arrays[name]
    if array.dtype != np.dtype(kind[0]) or array.ndim != kind[1]:
        raise ValueError(f"{name} is {array.dtype} with {array.ndim} axes")
    return array


def _entry(path: str, image_id: Any, size: list[int] | None, label_file: str | None) -> Entry:
    if not isinstance(image_id, int | str):
        raise TypeError(f"image id {image_id!r}")
    return Entry(
        Path(path),
        image_id,
        None if size is None else (int(size[0]), int(size[1])),
        None if label_file is None else Path(label_file),
    )


def _check(size: Any, time: Any, edges: Any, height: Any, width: Any, cause: Any) -> ImageCheck:
    numbers = [int(item) for item in (size, time, height, width)]
    if cause is None and min(numbers[2:]) <= 0:
        raise ValueError("an image without a size")
    text = None if cause is None else str(cause)
    return ImageCheck(numbers[0], numbers[1], str(edges), numbers[2], numbers[3], text)
