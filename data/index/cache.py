"""The results of a scan, kept for the next start: arrays and JSON in one file, never code.

Everything is keyed by content: labels by a hash of the label files' bytes, an image by its size,
time and the hash of its two ends. A file that is not complete, for whatever reason, is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from data.index.records import Entry, ImageCheck, Labels, Parsed, Problem
from utils.errors import UserError
from utils.files import write_bytes
from utils.images import cause_of
from utils.terminal import warn_main

FORMAT = "featherdet-scan-3"  # a file of another format is replaced
SUFFIX = ".scan"  # a digest of the rest, then an .npz
_DIGEST = 32  # bytes


def cache_file(name: str, key: str) -> Path:
    """The cache file of a split: in the user's cache folder, never in the data set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without an entry and without HOME, as in some containers
        folder = Path(tempfile.gettempdir(), ".cache")
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / "featherdet" / f"{name}-{digest}{SUFFIX}"


def load_cache(file: Path) -> tuple[Parsed | None, dict[str, ImageCheck]]:
    """Labels, and checks by path. A missing file is empty; so is a bad one, with a warning."""
    if not os.path.isfile(file):  # noqa: PTH113  Path.is_file raises without permission
        return None, {}
    try:
        return _unpack(file.read_bytes())
    except Exception as error:
        cause = cause_of(file, error)
        warn_main(f"warning: {file}: not a usable scan cache ({cause}); it is replaced")
        return None, {}


def _unpack(content: bytes) -> tuple[Parsed, dict[str, ImageCheck]]:
    if content[:_DIGEST] != _digest(content[_DIGEST:]):
        raise ValueError("damaged, or of another version")
    with np.load(BytesIO(content[_DIGEST:]), allow_pickle=False) as columns:
        arrays = dict(columns)
    texts = json.loads(arrays.pop("texts").tobytes())
    parsed = Parsed(
        entries=tuple(
            Entry(Path(path), image_id, size and tuple(size), label_file and Path(label_file))
            for path, image_id, size, label_file in texts["entries"]
        ),
        labels=Labels(**arrays),
        names=tuple(texts["names"]),
        category_ids=tuple(texts["category_ids"]),
        problems=tuple(Problem(*item) for item in texts["problems"]),
        annotations=texts["annotations"] and Path(texts["annotations"]),
        digest=texts["digest"],
    )
    return parsed, {path: ImageCheck(*item) for path, item in texts["checks"].items()}


def save_cache(file: Path, parsed: Parsed, checks: Mapping[str, ImageCheck]) -> None:
    """Write a cache file; one warning where that is not possible."""
    texts = {**vars(parsed), "labels": None, "checks": checks}
    text = np.frombuffer(json.dumps(texts, default=_plain).encode(), np.uint8)
    try:
        stream = BytesIO()
        np.savez(stream, allow_pickle=False, texts=text, **vars(parsed.labels))
        file.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(file, _digest(stream.getvalue()) + stream.getvalue())
    except (OSError, UserError) as error:
        cause = cause_of(file, error)
        warn_main(f"warning: no scan cache, every start scans again: {file.parent}: {cause}")


def _plain(value: Any) -> str | list[Any]:
    return str(value) if isinstance(value, Path) else list(vars(value).values())


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(FORMAT.encode() + content, digest_size=_DIGEST).digest()
