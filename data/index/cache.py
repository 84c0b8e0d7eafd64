"""The results of a scan, kept for the next start: arrays and JSON in one file, never code.

Everything is keyed by content: labels by a hash of the label files' bytes, an image by its size,
time and the hash of its two ends. A file that is not complete, for whatever reason, is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, field, fields
from io import BytesIO
from pathlib import Path

import numpy as np

from data.index.labels import Entry, ImageCheck, Labels, Parsed
from data.index.records import Problem
from utils.files import write_bytes
from utils.ranks import warn_main

FORMAT = "featherdet-scan-2"  # a file of another format is replaced
SUFFIX = ".scan"  # a digest of the rest, then an .npz
_DIGEST = 32  # bytes


@dataclass(frozen=True)
class Cached:
    """The content of a cache file; empty when there was none."""

    parsed: Parsed | None = None
    checks: Mapping[str, ImageCheck] = field(default_factory=dict)


def cache_file(name: str, key: str) -> Path:
    """The cache file of a split: in the user's cache folder, never in the data set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    folder = Path(base) if Path(base).is_absolute() else _home() / ".cache"
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / "featherdet" / f"{name}-{digest}{SUFFIX}"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # a user without an entry and without HOME, as in some containers
        return Path(tempfile.gettempdir())


def load_cache(file: Path) -> Cached:
    """Read a cache file. A missing one is empty; so is a bad one, with a warning. Runs nothing."""
    if not os.path.isfile(file):  # noqa: PTH113  Path.is_file raises without permission
        return Cached()
    try:
        return _unpack(file.read_bytes())
    except Exception as error:
        warn_main(f"warning: {file}: not a usable scan cache ({_brief(error)}); it is replaced")
        return Cached()


def save_cache(file: Path, parsed: Parsed, checks: Sequence[ImageCheck]) -> None:
    """Write a cache file; one warning where that is not possible."""
    try:
        stream = BytesIO()
        np.savez(stream, allow_pickle=False, **_pack(parsed, checks))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, _digest(stream.getvalue()) + stream.getvalue())
    except OSError as error:
        cause = _brief(error)
        warn_main(f"warning: no scan cache, every start scans again: {file.parent}: {cause}")


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(FORMAT.encode() + content, digest_size=_DIGEST).digest()


def _brief(error: BaseException) -> str:
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return text.splitlines()[0][:120]


def _pack(parsed: Parsed, checks: Sequence[ImageCheck]) -> dict[str, np.ndarray]:
    # an image that could not even be read has no identity to be recognised by
    known = [(e, c) for e, c in zip(parsed.entries, checks, strict=True) if c.edges]
    texts = {
        "digest": parsed.digest,
        "names": parsed.names,
        "category_ids": parsed.category_ids,
        "annotations": parsed.annotations and str(parsed.annotations),
        "problems": [astuple(problem) for problem in parsed.problems],
        "entries": [
            (str(e.path), e.image_id, e.size, e.label_file and str(e.label_file))
            for e in parsed.entries
        ],
        "checks": {str(e.path): astuple(c) for e, c in known},
    }
    arrays = {item.name: getattr(parsed.labels, item.name) for item in fields(Labels)}
    arrays |= {"rejected": parsed.rejected, "unreadable": parsed.unreadable}
    return arrays | {"texts": np.frombuffer(json.dumps(texts).encode(), np.uint8)}


def _unpack(content: bytes) -> Cached:
    if content[:_DIGEST] != _digest(content[_DIGEST:]):
        raise ValueError("damaged, or of another version")
    with np.load(BytesIO(content[_DIGEST:]), allow_pickle=False) as columns:
        arrays = dict(columns)
    texts = json.loads(arrays.pop("texts").tobytes())
    checks = {path: ImageCheck(*item) for path, item in texts.pop("checks").items()}
    entries = tuple(
        Entry(Path(path), image_id, size and tuple(size), label_file and Path(label_file))
        for path, image_id, size, label_file in texts["entries"]
    )
    parsed = Parsed(
        entries=entries,
        names=tuple(texts["names"]),
        category_ids=tuple(texts["category_ids"]),
        problems=tuple(Problem(*item) for item in texts["problems"]),
        annotations=texts["annotations"] and Path(texts["annotations"]),
        digest=texts["digest"],
        rejected=arrays.pop("rejected"),
        unreadable=arrays.pop("unreadable"),
        labels=Labels(**arrays),
    )
    return Cached(parsed, checks)
