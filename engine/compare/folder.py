"""The folder of a comparison: found again by the same one, locked while a process works in it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from engine.compare.protocol import SEEDS, Protocol, listed, protocol_differences
from utils.errors import UserError
from utils.files import locked, write_text
from utils.paths import run_folder
from utils.terminal import warn

FILE = "protocol.json"


@dataclass(frozen=True)
class Lock:
    """What a comparison's folder is locked to: the protocol, and its rows' models by name."""

    protocol: Protocol
    models: Mapping[str, str]  # `record.model_id` of each; '' of one that could not be built: any


def read_lock(folder: Path) -> Lock | None:
    """What a comparison's folder is locked to; None without a lock. UserError for another file."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        set(content["protocol"].get(SEEDS) or ())  # to be compared
        return Lock(dict(content["protocol"]), dict(content["models"]))
    except Exception as error:
        raise UserError(f"{path}: not a protocol: {error}") from error


def conflict(present: Lock, wanted: Lock) -> list[str]:
    """Why a folder cannot be continued: the differing fields, models and missing rows.

    More seeds and more rows are no conflict; fewer would leave finished runs out of the table.
    """
    differing = protocol_differences(present.protocol, wanted.protocol)
    before, after = (lock.protocol.get(SEEDS) or [] for lock in (present, wanted))
    if not set(before) <= set(after):
        differing.append(f"{SEEDS}: {before} and {after}")
    for name, model in present.models.items():
        if name not in wanted.models:
            differing.append(f"row {name}: only the folder has it")
        elif model and wanted.models[name] and wanted.models[name] != model:
            differing.append(f"row {name}: another model of that name")
    return differing


@contextmanager
def locked_folder(project: str, name: str, lock: Lock, *, exist_ok: bool = False) -> Iterator[Path]:
    """`comparison_folder`, made, locked to `lock`, and for this process alone until the end."""
    while True:
        folder = comparison_folder(project, name, lock, exist_ok=exist_ok)
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder):
            present = read_lock(folder)  # again: another process may have been quicker
            if present is None or not conflict(present, lock):
                known = {} if present is None else present.models  # some cannot be built now
                models = {name: own or known.get(name, "") for name, own in lock.models.items()}
                plain = {"protocol": lock.protocol, "models": models}
                write_text(folder / FILE, json.dumps(plain, indent=2) + "\n")
                yield folder
                return


def comparison_folder(project: str, name: str, lock: Lock, *, exist_ok: bool = False) -> Path:
    """The folder to work in: project/name, or the first of name2, name3, ... that can be used.

    One can be used that is not there yet, or is of the same protocol and has no other rows; there
    finished runs are kept.  With `exist_ok` it is project/name or UserError with the fields that
    differ.  Nothing is written.
    """
    number = 1
    while True:
        folder = run_folder(project, name if number == 1 else f"{name}{number}")
        present = read_lock(folder)
        reasons = [] if present is None else conflict(present, lock)
        free = present is not None or exist_ok or not folder.exists()
        if free and not reasons:
            return folder
        if exist_ok:
            raise UserError(
                f"{folder}: has a comparison of another protocol, whose rows cannot share a"
                f" table with these: {listed(reasons)}; choose another --name"
            )
        if reasons:
            warn(f"{folder} has another protocol: {listed(reasons)}")
        number += 1
