"""Where things are looked up and where runs are written."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from utils.errors import UserError, nearest
from utils.terminal import warn

ROOT = Path(__file__).resolve().parent.parent


def find_config(name: str, folder: str) -> Path:
    """The YAML file that `name` means, as users type it.

    Tried in turn: the path itself; `cfg/<folder>/<path>`; the path with .yaml, which is added
    wherever it is missing; and, as YOLOv5 users type `data/coco.yaml`, `cfg/<folder>/<last part>`,
    which a line on stderr says.  A path that is absolute or begins with a dot is not looked for in
    cfg.
    `folder` is '' for detectors, 'data', 'train', 'backbones' or 'necks'.
    Raises UserError with the nearest known name.
    """
    path = Path(name)
    file = path if path.suffix in {".yaml", ".yml"} else Path(f"{name}.yaml")
    home = ROOT / "cfg" / folder
    anywhere = not (path.is_absolute() or name.startswith((".", "~")))
    if path.is_file():
        return path
    if anywhere and (home / file).is_file():
        return shown(home / file)
    if file.is_file():
        return file
    if anywhere and (home / file.name).is_file():
        _say_once(f"{name}: no such file here; {shown(home / file.name)} is taken")
        return shown(home / file.name)
    known = sorted(item.stem for item in home.glob("*.yaml"))
    raise UserError(
        f"{name}: no such file, nor is it one of cfg/{folder}{'/' if folder else ''}*.yaml"
        f"{nearest(file.stem, known)}"
    )


@cache
def _say_once(text: str) -> None:
    """A name is looked up several times in a run."""
    warn(text)


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
    if Path(name).name in {"", ".."}:
        raise UserError(f"--name {name!r}: not the name of a folder")
    try:
        return _made(base, exist_ok=exist_ok)
    except OSError as error:
        raise UserError(f"{base}: no run folder can be made there: {error.strerror}") from error


def _made(base: Path, *, exist_ok: bool) -> Path:
    base.parent.mkdir(parents=True, exist_ok=True)
    if exist_ok:
        base.mkdir(exist_ok=True)
        return base
    number = 1
    while True:
        path = base if number == 1 else base.with_name(f"{base.name}{number}")
        try:
            path.mkdir()
        except FileExistsError:
            number += 1
        else:
            return path
