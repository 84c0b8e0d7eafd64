"""What a `--source` text means: files, folders, patterns, lists, cameras, URLs."""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from data.sources.urls import check_url, public
from utils.errors import UserError
from utils.images import IMAGE_SUFFIXES

PICTURE_SUFFIXES = IMAGE_SUFFIXES | {".gif"}  # of a GIF the first picture
VIDEO_SUFFIXES = frozenset(
    {
        ".asf",
        ".avi",
        ".flv",
        ".m4v",
        ".mkv",
        ".mov",
        ".mp4",
        ".mpeg",
        ".mpg",
        ".ts",
        ".webm",
        ".wmv",
    }
)
LIST_SUFFIX = ".txt"
NAMED = 5  # unknown files named in one line


@dataclass(frozen=True)
class Place:
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
) -> tuple[tuple[Place, ...], tuple[tuple[str, str], ...]]:
    """Source texts -> (places, bad ones as (label, cause)).

    A single bad value raises UserError; among several, or within a list file, it is only one of the
    bad ones.  `report` gets one line about files of unknown kind in a folder.
    """
    places: list[Place] = []
    bad: list[tuple[str, str]] = []
    for value in values:
        try:
            if _is_list(value):
                _add_list(Path(value), places, bad, report)
            else:
                places += _expand(value, report)
        except UserError as error:
            if len(values) == 1:
                raise
            bad.append(_split(value, error))
    return tuple(places), tuple(bad)


def _split(value: str, error: UserError) -> tuple[str, str]:
    label = public(value)
    return label, str(error).removeprefix(f"{label}: ")


def _is_list(value: str) -> bool:
    return value.lower().endswith(LIST_SUFFIX) and "://" not in value and Path(value).is_file()


def _add_list(
    path: Path, places: list[Place], bad: list[tuple[str, str]], report: Callable[[str], None]
) -> None:
    """Each line of a list file; relative paths start at its folder, or else at the current one."""
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    lines = [line.strip() for line in lines]
    if not any(lines):
        raise UserError(f"{path}: the list is empty; it holds one path or URL per line")
    for number, line in enumerate(lines, 1):
        if not line:
            continue
        beside = path.parent / line
        text = str(beside) if "://" not in line and _exists(beside) else line
        try:
            places += _expand(text, report)  # a list within a list is of no known kind
        except UserError as error:
            bad.append((f"{path}:{number}", str(error)))


def _exists(path: Path) -> bool:
    try:
        return path.exists() or path.is_symlink()
    except OSError:  # a name too long, a loop of links
        return False


def _expand(value: str, report: Callable[[str], None]) -> list[Place]:
    if "://" in value:
        check_url(value)
        return [Place("url", value)]
    if value.isdecimal():
        return [Place("webcam", value)]
    path = Path(value)
    if path.is_dir():
        return _folder(path, report)
    if _exists(path):
        kind = _kind(path)
        if kind is None:
            raise UserError(f"{value}: of no known kind ({_known()})")
        return [Place(kind, value)]
    if any(char in value for char in "*?["):
        found = [Path(name) for name in sorted(glob.glob(value, recursive=True))]  # noqa: PTH207  Path.glob takes no absolute pattern
        files = [item for item in found if not item.is_dir()]
        if not files:
            raise UserError(f"{value}: no file matches this pattern")
        return _files(files, value, report)
    raise UserError(f"{value}: no such file or folder")


def _folder(path: Path, report: Callable[[str], None]) -> list[Place]:
    try:
        entries = sorted(path.iterdir())
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    folders = [entry for entry in entries if entry.is_dir()]
    files = [entry for entry in entries if entry not in set(folders)]
    if any(_kind(entry) for entry in files):
        return _files(files, str(path), report)
    hint = f"; {len(folders)} folders in it are not searched" if folders else ""
    raise UserError(f"{path}: no images or videos in this folder ({_known()}){hint}")


def _files(files: Sequence[Path], where: str, report: Callable[[str], None]) -> list[Place]:
    kinds = [(path, _kind(path)) for path in files]
    unknown = [path.name for path, kind in kinds if kind is None]
    if unknown:
        names = ", ".join(unknown[:NAMED]) + (", ..." if len(unknown) > NAMED else "")
        report(f"{where}: {len(unknown)} files of other kinds are left out ({names})")
    return [Place(kind, str(path)) for path, kind in kinds if kind is not None]


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in PICTURE_SUFFIXES:
        return "image"
    return "video" if suffix in VIDEO_SUFFIXES else None


def _known() -> str:
    return " ".join(sorted(PICTURE_SUFFIXES | VIDEO_SUFFIXES))
