"""Files: found by name, written atomically, also against a kill; one process per folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

import yaml

from utils.errors import UserError, nearest
from utils.terminal import warn_once

ROOT = Path(__file__).resolve().parent.parent
LOCK = ".lock"
TEMPORARY = ".*.tmp"  # what a killed process leaves of a file it was writing


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """`write_file` of this content."""
    write_file(path, lambda file: file.write(content))


def write_file(path: Path, fill: Callable[[IO[bytes]], object]) -> None:
    """Write a file by `fill`, atomically: no reader, kill or power cut ever leaves half of it.

    UserError names the file when writing fails; the previous one then stays as it was.
    """
    # a name of its own: two processes that write the same file do not mix
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("x+b") as file:
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        with contextlib.suppress(OSError):  # the renaming itself, where the system can
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError):
            raise
        kept = "; the previous file is intact" if path.exists() else ""
        cause = error.strerror or error
        raise UserError(f"{path}: could not be written ({cause}){kept}") from error


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path}: cannot write: {error.strerror}") from error


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_yaml(path: Path, values: dict[str, Any]) -> None:
    """Write plain values as YAML, in their own order."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=True, default_flow_style=None)
    write_text(path, text)


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Keep other processes that lock `folder` out; the lock ends with this process at the latest.

    Its child processes do not inherit it.  Raises UserError when another process has it.
    """
    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            _lock(descriptor)
        except (BlockingIOError, PermissionError):
            raise UserError(
                f"{folder}: another process is using this folder; wait for it, or choose another"
                " --name"
            ) from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int) -> None:
    """Lock an open file, or raise BlockingIOError or PermissionError; both modules exclude."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
    else:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def home() -> Path:
    """Where cfg/data's sets lie in datasets/: the checkout, or the current folder if installed."""
    return ROOT if (ROOT / "pyproject.toml").is_file() else Path.cwd()


def find_config(name: str, folder: str) -> Path:
    """The YAML file that a user means by `name`.

    The first that exists of: the path itself; `cfg/<folder>/<path>`; the path with .yaml, which is
    added wherever it is missing; and, since YOLOv5 users type `data/coco.yaml`,
    `cfg/<folder>/<last part>`, with a line on stderr.  An absolute path or one that begins with a
    dot is not searched for in cfg.  A data set may also be a folder with its YAML file in it.
    `folder` is '' for detectors, 'data', 'train', 'backbones' or 'necks'.
    Raises UserError with the nearest known name.
    """
    path = Path(name)
    file = path if path.suffix in {".yaml", ".yml"} else Path(f"{name}.yaml")
    shipped = ROOT / "cfg" / folder
    anywhere = not (path.is_absolute() or name.startswith((".", "~")))
    try:
        if path.is_file():
            return path
        if anywhere and (shipped / file).is_file():
            return shown(shipped / file)
        if file.is_file():
            return file
        if folder == "data" and path.is_dir():
            return _yaml_in(path)
        if anywhere and (shipped / file.name).is_file():
            warn_once(f"{name} does not exist; {shown(shipped / file.name)} is used instead")
            return shown(shipped / file.name)
    except OSError as error:  # a name too long, a folder without permission
        raise UserError(f"{name[:80]}: {error.strerror}") from error
    known = sorted(item.stem for item in shipped.glob("*.yaml"))
    raise UserError(
        f"{name}: no such file, and not the name of a file in cfg/{folder}"
        f"{nearest(file.stem, known)}"
    )


def _yaml_in(folder: Path) -> Path:
    """data.yaml of a folder, or else its only YAML file. Raises UserError."""
    files = sorted(item for item in folder.iterdir() if item.suffix in {".yaml", ".yml"})
    chosen = [item for item in files if item.stem == "data"] or files
    if len(chosen) == 1:
        return chosen[0]
    found = ", ".join(item.name for item in files) or "none"
    raise UserError(
        f"{folder}: a folder needs a data.yaml or a single YAML file, found: {found} "
        "(docs/data-formats.md; python -m data.convert makes one)"
    )


def shown(path: Path) -> Path:
    """`path` for messages: relative to the current folder where it lies inside."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def run_folder(project: str, name: str) -> Path:
    """project/name; UserError where that is not inside the project."""
    if not Path(name).name or ".." in Path(name).parts or Path(name).is_absolute():
        raise UserError(f"--name {name!r} must be a folder inside --project")
    return Path(project) / name


def check_run_dir(project: str, name: str) -> None:
    """Raise UserError where `new_run_dir` could not make the folder; nothing is made."""
    base = run_folder(project, name)
    above = next((item for item in base.absolute().parents if item.exists()), Path("/"))
    if not above.is_dir():
        raise UserError(f"{base}: cannot create the run folder: {shown(above)} is a file")
    if not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"{base}: cannot create the run folder: no permission in {shown(above)}")


def new_run_dir(project: str, name: str, *, exist_ok: bool = False) -> Path:
    """Make and return project/name, or name2, name3, ... when it exists.

    Creation is the test, so that two runs started at once never share a folder.
    """
    base = run_folder(project, name)
    try:
        base.parent.mkdir(parents=True, exist_ok=True)
        path, number = base, 1
        while not exist_ok:
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
            number += 1
            path = base.with_name(f"{base.name}{number}")
        base.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{base}: cannot create the run folder: {error.strerror}") from error
    return base
