"""What a `--source` text means: files, folders, patterns, lists, cameras, URLs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.sources.urls import check_url, public
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES, MACOS, cause_of

STILL_SUFFIXES = IMAGE_SUFFIXES | {".gif"}  # the first image of a GIF
VIDEO_SUFFIXES = frozenset({".asf", ".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4"})
VIDEO_SUFFIXES |= {".mpeg", ".mpg", ".ts", ".webm", ".wmv"}
LIST_SUFFIX = ".txt"
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
            if value.lower().endswith(LIST_SUFFIX) and "://" not in value and _is_file(Path(value)):
                _add_list(Path(value), items, bad, report)
            else:
                items += _expand(value, report)
        except UserError as error:
            if len(values) == 1:
                raise
            label = public(value)
            bad.append((label, str(error).removeprefix(f"{label}: ")))
    return tuple(items), tuple(bad)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError as error:
        raise UserError(f"{path}: {cause_of(path, error)}") from error


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
            text = str(nearby) if "://" not in line and _exists(nearby) else line
            items += _expand(text, report)  # a list within a list is of no known kind
        except UserError as error:
            bad.append((f"{path}:{number}", str(error)))


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # a name too long, a loop of links, a folder that may not be read
        return False


def _expand(value: str, report: Callable[[str], None]) -> list[SourceItem]:
    if "://" in value:
        check_url(value)
        return [SourceItem("url", value)]
    if value.isdecimal():
        return [SourceItem("webcam", value)]
    try:
        return _expand_path(Path(value), report)
    except OSError as error:
        raise UserError(f"{value}: {cause_of(Path(value), error)}") from error


def _expand_path(path: Path, report: Callable[[str], None]) -> list[SourceItem]:
    if path.is_dir():
        entries = sorted(item for item in path.iterdir() if not item.name.startswith(MACOS))
        folders = {entry for entry in entries if entry.is_dir()}
        files = [entry for entry in entries if entry not in folders and not _metadata(entry)]
        if any(map(_kind, files)):
            return _files(files, str(path), report)
        hint = f"; {len(folders)} folders in it are not searched" if folders else ""
        raise UserError(f"{path}: no images or videos in this folder ({_known()}){hint}")
    if path.exists() or path.is_symlink():
        kind = _kind(path)
        if kind is None:
            raise UserError(f"{path}: of no known kind ({_known()})")
        return [SourceItem(kind, str(path))]
    if any(char in str(path) for char in "*?["):
        found = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  Path.glob takes no absolute pattern
        files = [item for item in found if not item.is_dir() and not _metadata(item)]
        if not files:
            raise UserError(f"{path}: no file matches this pattern")
        return _files(files, str(path), report)
    raise UserError(f"{path}: no such file or folder")


def _files(files: Sequence[Path], where: str, report: Callable[[str], None]) -> list[SourceItem]:
    kinds = [(path, _kind(path)) for path in files]
    unknown = [path.name for path, kind in kinds if kind is None]
    if unknown:
        names = ", ".join(unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
        report(f"{where}: {len(unknown)} files of other kinds are left out ({names})")
    return [SourceItem(kind, str(path)) for path, kind in kinds if kind is not None]


def _metadata(path: Path) -> bool:
    """macOS keeps what other file systems cannot store of a.jpg in ._a.jpg."""
    return path.name.startswith("._")


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in STILL_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def _known() -> str:
    return " ".join(sorted(STILL_SUFFIXES | VIDEO_SUFFIXES))
