"""Image folders and lists with YOLO label files -> columns."""

from __future__ import annotations

import functools
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data.index.columns import Entries, Texts
from data.index.files import stamp_of
from data.index.records import NOTE, Labels, Parsed, Problem
from data.index.rows import read_rows, text_lines
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, MACOS, ImageError, read_bytes

_MAX_LIST_BYTES = 1 << 30
_AT_ONCE = 1024  # label files that are parsed together
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

    `known` is returned when none of the files has changed since. Rows that cannot
    be used are listed in `problems`; a file that cannot be read spoils its image. Raises UserError
    for a path that does not exist and for a label path that is a directory.
    """
    images, problems = list_images(source)
    paths = Texts.of(images)
    del images  # 118,287 texts
    label_folder = functools.cache(_label_folder)
    parts = map(_parts, paths)
    label_files = Texts.of(f"{label_folder(folder)}{os.sep}{stem}.txt" for folder, stem, _ in parts)
    stamp = stamp_of((names, problems, hashlib.blake2b(paths.data.tobytes()).digest()), label_files)
    if known is not None and stamp and known.stamp == stamp:
        return known
    entries = Entries(
        paths, *_ids(paths, source.root), np.zeros((len(paths), 2), np.int64), label_files
    )
    return Parsed(
        entries=entries,
        labels=Labels.concatenate(
            read_rows(range(len(paths))[start : start + _AT_ONCE], entries, names, problems)
            for start in range(0, len(paths), _AT_ONCE)
        ),
        names=names,
        category_ids=tuple(range(len(names))),
        problems=tuple(problems),
        annotations=None,
        stamp=stamp,
    )


def _ids(images: Texts, root: Path) -> tuple[Texts, np.ndarray]:
    """Ids, and which are numbers: of the file names, or of paths where these are not unique."""
    ids = [_parts(image)[1] for image in images]
    numeric = np.array([s.isascii() and s.isdecimal() and len(s) < 19 for s in ids], bool)
    for i in np.flatnonzero(numeric).tolist():
        ids[i] = str(int(ids[i]))
    for i, uses in enumerate(map(Counter(ids).__getitem__, ids)):
        if uses > 1:
            path, numeric[i] = Path(images[i]), False
            ids[i] = (path.relative_to(root) if path.is_relative_to(root) else path).as_posix()
    return Texts.of(ids), numeric


def list_images(source: YoloSource) -> tuple[list[str], list[Problem]]:
    """All images of a split in a fixed order, each once, and what was passed over."""
    problems: list[Problem] = []
    found: dict[str, None] = {}
    for start, where in zip(source.paths, source.where, strict=True):
        for path, origin in _listed(start, where, problems):
            suffix = _parts(path)[2].lower()
            if suffix not in IMAGE_SUFFIXES:
                if suffix in _OTHER_SUFFIXES or origin != path:
                    kind = suffix[1:].upper() or "a file without suffix"
                    problems.append(Problem(origin, f"{kind}; not a supported image format"))
            elif path in found:
                problems.append(Problem(origin, f"{path} is listed twice; used once", NOTE))
            else:
                found[path] = None
    return list(found), problems


def _parts(path: str) -> tuple[str, str, str]:
    """Folder, stem and suffix, as pathlib has them but in a tenth of the time."""
    folder, _, name = path.rpartition(os.sep)
    dot = name.rfind(".")
    return (folder, name[:dot], name[dot:]) if 0 < dot < len(name) - 1 else (folder, name, "")


def _listed(path: Path, where: str, problems: list[Problem]) -> Iterator[tuple[str, str]]:
    """Paths in a folder or a list file, each with where it was found."""
    try:
        if path.is_dir():
            return ((file, file) for file in _walk(path, problems))
        if path.is_file() and path.suffix == ".txt":
            return _read_list(path)
        known = path.exists()
        cause = "no such folder or list file (nothing is downloaded; 'path' says where to look)"
        if known:
            cause = "neither a folder nor a list file (.txt)"
        if path.suffix == ".json":
            cause = "a COCO JSON needs the folder of its images: {images: DIR, annotations: FILE}"
    except OSError as error:
        cause = str(error.strerror)
    raise UserError(f"{where}: {path}: {cause}")


def _walk(folder: Path, problems: list[Problem]) -> Iterator[str]:
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
        start = str(Path(here, "x"))[:-1]
        for name in sorted(files):
            if not name.startswith(MACOS):
                yield start + name


def _read_list(file: Path) -> Iterator[tuple[str, str]]:
    """Paths in a list file, one a line, relative to the file's folder; with 'file:line'."""
    try:
        text = read_bytes(file, limit=_MAX_LIST_BYTES).decode("utf-8-sig")
    except (ImageError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: not a list of image paths: {error}") from error
    if "\0" in text:
        raise UserError(f"{file}: not a list of image paths: it holds zero bytes")
    for number, line in text_lines(text):
        path = os.path.normpath(file.parent / line)
        inner = os.path.normpath(file.parent / line.removeprefix("data/"))  # CVAT's own root
        if inner != path and not os.path.lexists(path) and os.path.lexists(inner):
            path = inner
        yield path, f"{file}:{number}"


def _label_folder(folder: str) -> str:
    """With its last part 'images' as 'labels', if there is such a folder; else the same folder."""
    parts = Path(folder).parts
    if "images" not in parts:
        return folder
    last = len(parts) - 1 - parts[::-1].index("images")
    labels = str(Path(*parts[:last], "labels", *parts[last + 1 :]))
    return labels if os.path.isdir(labels) else folder  # noqa: PTH112  is_dir may raise
