"""The results of a scan, kept for the next start: arrays and JSON in one file, never code.

A file whose size and times (of writing and of any change) are as before is not opened. Else labels
are keyed by a hash of their bytes, an image by its size, time and a hash of its two ends. A cache
that is not complete, for whatever reason, is replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from data.index.columns import Entries, ImageChecks, Texts
from data.index.records import Labels, Parsed, Problem
from utils.errors import UserError
from utils.files import write_file
from utils.images import cause_of
from utils.terminal import warn_main

FORMAT = "featherdet-scan-4"  # a file of another format is replaced
SUFFIX = ".scan"  # a digest of the rest, then an .npz
_DIGEST = 32  # bytes
_TEXTS = ("paths", "ids", "label_files")  # of Entries


def cache_file(name: str, key: str) -> Path:
    """The cache file of a split: in the user's cache folder, never in the data set."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(base) if Path(base).is_absolute() else Path.home() / ".cache"
    except RuntimeError:  # a user without an entry and without HOME, as in some containers
        folder = Path(tempfile.gettempdir(), ".cache")
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).hexdigest()
    return folder / "featherdet" / f"{name}-{digest}{SUFFIX}"


def load_cache(file: Path) -> tuple[Parsed | None, ImageChecks]:
    """Labels and checks. A missing file has none; nor has a bad one, with a warning."""
    if not os.path.isfile(file):  # noqa: PTH113  Path.is_file raises without permission
        return None, ImageChecks.of(np.zeros((0, 3), np.int64))
    try:
        with file.open("rb") as stream:
            return _unpack(stream)
    except Exception as error:
        cause = cause_of(file, error)
        warn_main(f"warning: {file}: not a usable scan cache ({cause}); it is replaced")
        return None, ImageChecks.of(np.zeros((0, 3), np.int64))


def _unpack(stream: IO[bytes]) -> tuple[Parsed, ImageChecks]:
    if stream.read(_DIGEST) != _digest_of_rest(stream):
        raise ValueError("damaged, or of another version")
    stream.seek(_DIGEST)
    with np.load(stream, allow_pickle=False) as columns:
        arrays = dict(columns)
    texts = json.loads(arrays.pop("texts").tobytes())

    def part(name: str) -> dict[str, Any]:
        return {key.removeprefix(name): arrays[key] for key in arrays if key.startswith(name)}

    texts_of: dict[str, Any] = {name: Texts(**part(f"{name}.")) for name in _TEXTS}
    parsed = Parsed(
        entries=Entries(**texts_of, **part("entries.")),
        labels=Labels(**part("labels.")),
        names=tuple(texts["names"]),
        category_ids=tuple(texts["category_ids"]),
        problems=tuple(Problem(*item) for item in texts["problems"]),
        annotations=texts["annotations"] and Path(texts["annotations"]),
        stamp=texts["stamp"],
    )
    return parsed, ImageChecks(**part("checks."), causes=dict(texts["causes"]))


def save_cache(file: Path, parsed: Parsed, checks: ImageChecks) -> None:
    """Write a cache file; one warning where that is not possible."""
    entries = vars(parsed.entries)
    objects = {name: vars(entries[name]) for name in _TEXTS}
    objects["entries"] = {name: entries[name] for name in entries.keys() - {*_TEXTS}}
    objects["labels"], objects["checks"] = vars(parsed.labels), {**vars(checks)}
    causes = [*objects["checks"].pop("causes").items()]
    texts = {**vars(parsed), "entries": None, "labels": None, "causes": causes}
    arrays = {f"{name}.{key}": v for name, part in objects.items() for key, v in part.items()}
    arrays["texts"] = np.frombuffer(json.dumps(texts, default=_plain).encode(), np.uint8)

    def fill(stream: IO[bytes]) -> None:
        stream.write(bytes(_DIGEST))
        np.savez(stream, allow_pickle=False, **arrays)
        stream.seek(_DIGEST)
        digest = _digest_of_rest(stream)
        stream.seek(0)
        stream.write(digest)

    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_file(file, fill)
    except (OSError, UserError) as error:
        cause = cause_of(file, error)
        warn_main(f"warning: no scan cache, so every start scans again: {file.parent}: {cause}")


def _plain(value: Any) -> str | list[Any]:
    return str(value) if isinstance(value, Path) else list(vars(value).values())


def _digest_of_rest(stream: IO[bytes]) -> bytes:
    digest = hashlib.blake2b(FORMAT.encode(), digest_size=_DIGEST)
    for chunk in iter(lambda: stream.read(1 << 20), b""):
        digest.update(chunk)
    return digest.digest()
