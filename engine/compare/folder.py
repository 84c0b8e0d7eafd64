"""The folder of a comparison: found again for the same one, locked while somebody works in it."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from engine.compare.protocol import Lock, conflict, listed, read_lock, write_lock
from utils.errors import UserError
from utils.terminal import warn

BUSY = ".busy"


@contextmanager
def held_folder(
    project: str, name: str, lock: Lock, *, exist_ok: bool = False
) -> Iterator[tuple[Path, int]]:
    """`comparison_folder`, made, locked to `lock` and held: what `alone` yields comes with it.

    It is looked at once more when it is held: somebody may have been quicker.
    """
    while True:
        folder = comparison_folder(project, name, lock, exist_ok=exist_ok)
        folder.mkdir(parents=True, exist_ok=True)
        with alone(folder) as held:
            present = read_lock(folder)
            if present is None or not conflict(present, lock):
                write_lock(folder, lock if present is None else lock.after(present))
                yield folder, held
                return


def comparison_folder(project: str, name: str, lock: Lock, *, exist_ok: bool = False) -> Path:
    """The folder to work in: project/name, or the first of name2, name3, ... that will do.

    One will do that is not there yet, or holds the same protocol and no other rows; there finished
    runs are kept.  With `exist_ok` it is project/name or UserError with the fields that differ.
    Nothing is written.
    """
    number = 1
    while True:
        folder = Path(project) / (name if number == 1 else f"{name}{number}")
        present = read_lock(folder)
        reasons = [] if present is None else conflict(present, lock)
        free = present is not None or exist_ok or not folder.exists()
        if free and not reasons:
            return folder
        if exist_ok:
            raise UserError(
                f"{folder}: holds a comparison of another protocol, whose rows cannot share a"
                f" table with these: {listed(reasons)}; choose another --name"
            )
        if reasons:
            warn(f"{folder} has another protocol: {listed(reasons)}")
        number += 1


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Hold the folder; a descriptor that keeps it held in every process that inherits it.

    So a training run that outlived its comparison is waited for, not doubled.  UserError when held.
    """
    with (folder / BUSY).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"{folder}: another compare.py, or a training run of one, is still at work there;"
                " wait for it, or choose another --name"
            ) from error
        yield file.fileno()
