"""`pip install .` gives a wheel that works in another folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

OWN = ("featherdet", "cfg", "models", "data", "utils", "engine")
SCRIPTS = ("train", "val", "detect", "compare", "export")


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: a build leaves folders behind."""
    source = tmp_path_factory.mktemp("source") / "featherdet"
    ignored = shutil.ignore_patterns("__pycache__", ".*", "runs", "datasets", "tests", "docs")
    shutil.copytree(root, source, ignore=ignored)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q"]
    done = subprocess.run(
        [*command, "-w", str(source.parent), str(source)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return next(source.parent.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_has_every_file(root: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
        info = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = archive.read(info).decode()
    files = [file for name in OWN for file in (root / name).rglob("*") if file.is_file()]
    assert packed == {
        file.relative_to(root).as_posix() for file in files if file.suffix not in {".pyc", ".so"}
    }
    assert {f"{name}/py.typed" for name in OWN if name != "cfg"} <= packed
    for line in (root / "requirements.txt").read_text().splitlines():
        assert line.startswith("#") or f"Requires-Dist: {line}" in metadata


@pytest.mark.slow
def test_the_wheel_works_elsewhere(
    wheel: Path, tmp_path: Path, rectangles: Path, tiny_model: Path
) -> None:
    """In an environment of its own (with this one's torch), in an empty folder."""
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "env")], check=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    # as --system-site-packages, where the tests run in an environment themselves
    here = next(path for path in sys.path if (Path(path) / "torch").is_dir())
    (site / "here.pth").write_text(here)
    binary, folder = tmp_path / "env" / "bin", tmp_path / "empty"
    folder.mkdir()

    def run(*words: object) -> str:
        done = subprocess.run(
            [*map(str, words)],
            cwd=folder,
            capture_output=True,
            text=True,
            env={"HOME": str(folder)},
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(binary / "python", "-m", "pip", "install", "--no-deps", "-q", wheel)
    for name in SCRIPTS:
        assert f"usage: featherdet-{name} " in run(binary / f"featherdet-{name}", "--help")
    code = (
        "import featherdet, pathlib\n"
        "from models.yaml.parser import load_spec\n"
        "assert load_spec('yolov5n-ghost').layers\n"
        "assert pathlib.Path(featherdet.__file__).is_relative_to(pathlib.Path(__import__('sys').prefix))\n"
    )
    run(binary / "python", "-c", code)
    small = ("--data", rectangles, "--img", 64, "--batch", 4, "--workers", 0, "--device", "cpu")
    run(binary / "featherdet-train", "--cfg", tiny_model, "--epochs", 1, *small)
    best = folder / "runs" / "train" / "exp" / "weights" / "best.pt"
    run(
        *(binary / "featherdet-detect", "--weights", best, "--conf", 0.0001),
        *("--source", rectangles.parent / "val"),
    )
    assert len(list((folder / "runs" / "detect" / "exp").glob("*.png"))) == 5
    run(
        *(binary / "featherdet-compare", "--cfg", tiny_model, "--epochs", 1, *small),
        *("--latency-seconds", 0.1, "--latency-batches", 1),
    )
    assert (folder / "runs" / "compare" / "exp" / "report.html").is_file()
    run(binary / "python", "-m", "data.shapes")
    assert (folder / "datasets" / "shapes" / "val").is_dir()
    assert not (site / "datasets").exists()
