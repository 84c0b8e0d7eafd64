"""Where configuration files are found and where runs are written."""

from __future__ import annotations

import contextlib
from pathlib import Path

from utils.errors import UserError, nearest
from utils.terminal import warn_once

ROOT = Path(__file__).resolve().parent.parent


def find_config(name: str, folder: str) -> Path:
    """The YAML file that a user means by `name`.

    The first that exists of: the path itself; `cfg/<folder>/<path>`; the path with .yaml, which is
    added wherever it is missing; and, since YOLOv5 users type `data/coco.yaml`,
    `cfg/<folder>/<last part>`, with a line on stderr.  An absolute path or one that begins with a
    dot is not searched for in cfg.
    `folder` is '' for detectors, 'data', 'train', 'backbones' or 'necks'.
    Raises UserError with the nearest known name.
    """
    path = Path(name)
    file = path if path.suffix in {".yaml", ".yml"} else Path(f"{name}.yaml")
    home = ROOT / "cfg" / folder
    anywhere = not (path.is_absolute() or name.startswith((".", "~")))
    try:
        if path.is_file():
            return path
        if anywhere and (home / file).is_file():
            return shown(home / file)
        if file.is_file():
            return file
        if anywhere and (home / file.name).is_file():
            warn_once(f"{name} does not exist; {shown(home / file.name)} is used instead")
            return shown(home / file.name)
    except OSError as error:  # a name too long, a folder without permission
        raise UserError(f"{name[:80]}: {error.strerror}") from error
    known = sorted(item.stem for item in home.glob("*.yaml"))
    raise UserError(
        f"{name}: no such file, and not the name of a file in cfg/{folder}"
        f"{nearest(file.stem, known)}"
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
