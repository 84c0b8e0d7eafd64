"""Writing files atomically, also against a kill or a power cut; one process per folder."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from utils.errors import UserError

LOCK = ".lock"
TEMPORARY = ".*.tmp"  # what a killed process leaves of a file it was writing


def write_bytes(path: Path, content: bytes | memoryview) -> None:
    """Write a file atomically: no reader, kill or power cut ever leaves half of it.

    UserError names the file when writing fails; the previous one then stays as it was.
    """
    # a name of its own: two processes that write the same file do not mix
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
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
    import fcntl  # not on every system, and needed here only

    descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
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
