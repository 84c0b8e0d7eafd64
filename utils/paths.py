"""Where things are looked up and where runs are written."""

from __future__ import annotations

from pathlib import Path

from utils.errors import UserError, nearest

ROOT = Path(__file__).resolve().parent.parent


def find_config(name: str, folder: str) -> Path:
    """The YAML file that `name` means, as users type it.

    Tried in turn: the path itself; `cfg/<folder>/<path>`; `cfg/<folder>/<last part>`; .yaml is
    added where it is missing.
    `folder` is '' for detectors, 'data', 'train', 'backbones' or 'necks'.
    Raises UserError with the nearest known name.
    """
    path = Path(name)
    if path.is_file():
        return path
    home = ROOT / "cfg" / folder
    file = path if path.suffix in {".yaml", ".yml"} else Path(f"{name}.yaml")
    for candidate in (home / file, home / file.name):
        if candidate.is_file():
            return shown(candidate)
    if path.suffix == "" and path.with_suffix(".yaml").is_file():
        return path.with_suffix(".yaml")
    known = sorted(item.stem for item in home.glob("*.yaml"))
    raise UserError(
        f"{name}: no such file, nor is it one of cfg/{folder}{'/' if folder else ''}*.yaml"
        f"{nearest(file.stem, known)}"
    )


def shown(path: Path) -> Path:
    """`path` as people want to read it: relative to the current folder where it lies in it."""
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path


def new_run_dir(project: str, name: str, *, exist_ok: bool = False) -> Path:
    """Make and return project/name, or name2, name3, ... when it exists.

    Creation is the test, so that two runs started at once never share a folder.
    """
    base = Path(project) / name
    base.parent.mkdir(parents=True, exist_ok=True)
    if exist_ok:
        base.mkdir(exist_ok=True)
        return base
    number = 1
    while True:
        path = base if number == 1 else base.with_name(f"{name}{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
