"""What a `--source` text means: files, folders, patterns, lists, cameras, URLs."""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.sources.urls import check_url, public
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, MACOS, cause_of

STILL_SUFFIXES = IMAGE_SUFFIXES | {".gif"}  # the first image of a GIF
VIDEO_SUFFIXES = frozenset({".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"})
VIDEO_SUFFIXES |= {".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
LIST_SUFFIXES = (".txt", ".streams")  # one path or URL per line; .streams is YOLOv5's name
KNOWN = " ".join(sorted(STILL_SUFFIXES | VIDEO_SUFFIXES))
NAMED = 5  # unknown files named in one line


@dataclass(frozen=True)
class SourceItem:
    """One thing to read: its kind is 'image', 'video', 'url' or 'webcam'."""

    kind: str
    text: str

    @property
    def label(self) -> str:
        """For messages and file names: always printable, never with credentials."""
        if self.kind == "webcam":
            return f"webcam {self.text}"
        text = public(self.text) if self.kind == "url" else self.text
        return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def resolve(
    values: Sequence[str], report: Callable[[str], None]
) -> tuple[tuple[SourceItem, ...], tuple[tuple[str, str], ...]]:
    """Source texts -> (items, bad ones as (label, cause)).

    A single bad value raises UserError; among several, or within a list file, it is only one of the
    bad ones.  `report` gets one line about files of unknown kind in a folder.
    """
    items: list[SourceItem] = []
    bad: list[tuple[str, str]] = []
    for value in values:
        try:
            listed = value.lower().endswith(LIST_SUFFIXES) and "://" not in value
            if listed and os.path.isfile(value):  # noqa: PTH113  Path.is_file raises without permission
                _add_list(Path(value), items, bad, report)
            else:
                items += _expand(value, report)
        except UserError as error:
            if len(values) == 1:
                raise
            label = public(value)
            bad.append((label, str(error).removeprefix(f"{label}: ")))
    return tuple(items), tuple(bad)


def _add_list(
    path: Path, items: list[SourceItem], bad: list[tuple[str, str]], report: Callable[[str], None]
) -> None:
    """Each line of a list file; relative paths start at its folder, or else at the current one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if not any(map(str.strip, lines)):
        raise UserError(f"{path}: the list is empty; it holds one path or URL per line")
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line:
            continue
        try:
            nearby = path.parent / line
            text = str(nearby) if "://" not in line and os.path.lexists(nearby) else line
            items += _expand(text, report)  # a list within a list is unknown file type
        except UserError as error:
            bad.append((f"{path}:{number}", str(error)))


def _expand(value: str, report: Callable[[str], None]) -> list[SourceItem]:
    if "://" in value:
        check_url(value)
        return [SourceItem("url", value)]
    if value.isdecimal():
        return [SourceItem("webcam", value)]
    path = Path(value)
    try:
        if path.is_dir():
            found = list(path.iterdir())
        elif path.exists() or path.is_symlink():
            if _kind(path) is None:
                raise UserError(f"{path}: unknown file type ({KNOWN})")
            return [SourceItem(str(_kind(path)), str(path))]
        elif any(char in value for char in "*?["):
            found = [Path(name) for name in glob.glob(value, recursive=True)]  # noqa: PTH207  Path.glob takes no absolute pattern
        else:
            screen = value.partition(" ")[0] == "screen"  # YOLOv5's word
            cause = "not in FeatherDet: no picture is taken of the screen"
            raise UserError(f"{path}: {cause if screen else 'no such file or folder'}")
        found = sorted((item for item in found if not item.name.startswith(MACOS)), key=str)
        files = [item for item in found if not item.is_dir()]
    except OSError as error:
        raise UserError(f"{path}: {cause_of(path, error)}") from error
    items = [SourceItem(kind, str(file)) for file in files if (kind := _kind(file))]
    if not items:
        where = "in this folder" if path.is_dir() else "match this pattern"
        folders = len(found) - len(files)
        hint = f"; {folders} folders are not searched: use '{path}/**'" if folders else ""
        raise UserError(f"{path}: no images or videos {where} ({KNOWN}){hint}")
    unknown = [file.name for file in files if not _kind(file)]
    if unknown:
        names = ", ".join(unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
        report(f"{path}: {len(unknown)} files of other kinds are left out ({names})")
    return items


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in STILL_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None
