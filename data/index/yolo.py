"""Image folders and lists with YOLO label files -> columns."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index.labels import Entry, Parsed, make_labels
from data.index.records import NOTE, SKIPPED_ROW, Problem
from data.index.yolo_rows import LabelRows, parse_label, split_lines
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, MACOS, ImageError, read_bytes

MAX_LABEL_BYTES = 32 << 20
_MAX_LIST_BYTES = 1 << 30
# Images by name, in formats that are not read: reported, rather than silently left out.
_OTHER_SUFFIXES = frozenset({".avif", ".gif", ".heic", ".heif", ".jp2", ".jxl", ".psd", ".svg"})


@dataclass(frozen=True)
class YoloSource:
    """A split in YOLO's form, as a data set YAML names it."""

    paths: tuple[Path, ...]  # folders and list files (.txt)
    where: tuple[str, ...]  # file:line of the YAML, one for each path
    root: Path  # image ids that need a path are relative to it


def read_yolo(source: YoloSource, names: tuple[str, ...], *, known: Parsed | None = None) -> Parsed:
    """Find the images of a split and read their labels.

    `known` is returned when it was read from the same bytes of the same files. Rows that cannot
    be used are listed in `problems`; a file that cannot be read spoils its image. Raises UserError
    for a path that does not exist and for a label path that is a directory.
    """
    paths, problems = list_images(source)
    entries = _entries(paths, source.root)
    contents: list[bytes | str | None] = [_content(entry.label_file) for entry in entries]
    digest = hashlib.blake2b(f"{names}\n{problems}".encode("utf-8", "replace"), digest_size=16)
    for entry, content in zip(entries, contents, strict=True):
        digest.update(f"\n{entry.path}\n{entry.label_file}\n".encode("utf-8", "surrogateescape"))
        digest.update(hashlib.blake2b(content).digest() if isinstance(content, bytes) else b"-")
        digest.update(repr(content).encode() if isinstance(content, str) else b"")
    if known is not None and known.digest == digest.hexdigest():
        return known
    rejected = np.zeros(len(entries), np.int64)
    unreadable = np.zeros(len(entries), bool)
    found: dict[int, LabelRows] = {}
    for i, (entry, content) in enumerate(zip(entries, contents, strict=True)):
        if content is None:
            continue
        parsed = parse_label(content, len(names)) if isinstance(content, bytes) else content
        if isinstance(parsed, str):
            problems.append(Problem(str(entry.label_file), parsed))
            unreadable[i] = True
            continue
        found[i] = parsed
        rejected[i] = len(found[i].problems)
        for line, cause in found[i].problems:
            problems.append(Problem(f"{entry.label_file}:{line}", cause, SKIPPED_ROW))
    return Parsed(
        entries=tuple(entries),
        labels=make_labels(
            image=np.array([i for i, item in found.items() for _ in item.lines], np.int64),
            classes=np.array([x for item in found.values() for x in item.classes], np.int64),
            boxes=np.array([x for item in found.values() for x in item.boxes]).reshape(-1, 4),
            sources=np.array([x for item in found.values() for x in item.lines], np.int64),
            polygons=[x for item in found.values() for x in item.polygons],
        ),
        names=names,
        category_ids=tuple(range(len(names))),
        problems=tuple(problems),
        rejected=rejected,
        unreadable=unreadable,
        annotations=None,
        digest=digest.hexdigest(),
    )


def list_images(source: YoloSource) -> tuple[list[Path], list[Problem]]:
    """All images of a split in a fixed order, each once, and what was passed over."""
    problems: list[Problem] = []
    found: dict[str, None] = {}
    for start, where in zip(source.paths, source.where, strict=True):
        for path, origin in _listed(start, where, problems):
            suffix = path.suffix.lower()
            if suffix not in IMAGE_SUFFIXES:
                if suffix in _OTHER_SUFFIXES or origin != str(path):
                    kind = suffix[1:].upper() or "a file without suffix"
                    problems.append(Problem(origin, f"{kind}; not an image format that is read"))
            elif str(path) in found:
                problems.append(Problem(origin, f"{path} is listed twice; used once", NOTE))
            else:
                found[str(path)] = None
    return [Path(path) for path in found], problems


def _listed(path: Path, where: str, problems: list[Problem]) -> Iterator[tuple[Path, str]]:
    """Paths in a folder or a list file, each with where it was found."""
    try:
        if path.is_dir():
            return ((file, str(file)) for file in _walk(path, problems))
        if path.is_file() and path.suffix == ".txt":
            return _read_list(path)
        found = path.exists()
    except OSError as error:
        raise UserError(f"{where}: {path}: {error.strerror}") from error
    if found:
        raise UserError(f"{where}: {path} is neither a folder nor a list file (.txt)")
    raise UserError(f"{where}: no such folder or list file: {path}")


def _walk(folder: Path, problems: list[Problem]) -> Iterator[Path]:
    """Files below a folder, sorted; linked folders are followed, each once."""
    seen: set[tuple[int, int]] = set()

    def unreadable(error: OSError) -> None:
        problems.append(Problem(str(error.filename), f"folder: {error.strerror}"))

    for here, folders, files in os.walk(folder, followlinks=True, onerror=unreadable):
        status = Path(here).stat()
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        folders.sort()
        for name in sorted(files):
            if not name.startswith(MACOS):
                yield Path(here, name)


def _read_list(file: Path) -> Iterator[tuple[Path, str]]:
    """Paths in a list file, one a line, relative to the file's folder; with 'file:line'."""
    try:
        text = read_bytes(file, limit=_MAX_LIST_BYTES).decode("utf-8-sig")
    except (ImageError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a list of image paths: {error}") from error
    if "\0" in text:
        raise UserError(f"{file}: not a list of image paths: it holds zero bytes")
    for number, line in enumerate(split_lines(text), start=1):
        if line.strip():
            path = Path(os.path.normpath(file.parent / line.strip()))
            yield path, f"{file}:{number}"


def _entries(paths: Sequence[Path], root: Path) -> list[Entry]:
    label_folders: dict[Path, Path] = {}
    ids = [_id_from_stem(path) for path in paths]
    uses = Counter(ids)
    entries = []
    for path, number in zip(paths, ids, strict=True):
        if path.parent not in label_folders:
            label_folders[path.parent] = _label_folder(path.parent)
        unique = uses[number] == 1
        image_id = (
            number
            if unique
            else (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
        )
        label_file = label_folders[path.parent] / f"{path.stem}.txt"
        entries.append(Entry(path, image_id, label_file=label_file))
    return entries


def _id_from_stem(path: Path) -> int | str:
    stem = path.stem
    return int(stem) if stem.isascii() and stem.isdecimal() and len(stem) < 19 else stem


def _label_folder(folder: Path) -> Path:
    """With its last part 'images' as 'labels', if there is such a folder; else the same folder."""
    parts = folder.parts
    if "images" not in parts:
        return folder
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = Path(*parts[:last], "labels", *parts[last + 1 :])
    return labels if os.path.isdir(labels) else folder  # noqa: PTH112  is_dir may raise


def _content(path: Path | None) -> bytes | str | None:
    """A label file's bytes; None where there is none; why it cannot be read, as text."""
    if path is None or not os.path.lexists(path):
        return None
    try:
        return read_bytes(path, limit=MAX_LABEL_BYTES)
    except ImageError as error:
        if path.is_dir():
            text = f"{path}: is a folder, but a label file is expected there; move it away"
            raise UserError(text) from error
        return error.cause
