"""Systems other than Linux: what they lack is needed nowhere at import, and has a substitute.

Neither Windows nor macOS is at hand: the modules and attributes that one of them lacks are hidden.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from engine.compare.config import CompareConfig
from engine.distributed import select_device
from utils.errors import UserError

HIDE = """
import os, signal, sys
import cv2, hotcoco, matplotlib.figure, pycocotools.mask, torch, torchvision, tqdm  # ask themselves

class Msvcrt:
    LK_NBLCK, taken = 2, False

    def locking(self, descriptor, mode, count):
        if Msvcrt.taken:
            raise PermissionError(13, "Permission denied")
        Msvcrt.taken = True

sys.modules.update(fcntl=None, resource=None, pwd=None, grp=None, termios=None, msvcrt=Msvcrt())
for module, names in (
    (os, "fork pread pwrite sysconf memfd_create sched_getaffinity getuid geteuid killpg setsid"),
    (signal, "SIGHUP SIGCHLD SIGKILL SIGUSR1 SIGALRM setitimer pthread_sigmask"),
):
    for name in names.split():
        vars(module).pop(name, None)
"""
IMPORT_ALL = """
import importlib, pathlib
files = [f for room in ("engine", "models", "data", "utils") for f in pathlib.Path(room).rglob("*.py")]
for file in [*files, *pathlib.Path().glob("*.py")]:
    importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
print(len(files))
"""
USE = """
import pickle
import numpy as np
from data.index.columns import SharedBytes
from data.index.scan import DecoderLog
from data.loading import workers
from data.loading.store import ASSUMED_MEMORY, free_memory
from engine.train.interrupts import stop_requests
from utils.errors import UserError
from utils.files import locked

with stop_requests() as request, locked(pathlib.Path(sys.argv[1])):
    signal.raise_signal(signal.SIGTERM)
    assert request.signal == signal.SIGTERM
    try:
        with locked(pathlib.Path(sys.argv[1])):
            raise AssertionError("locked twice")
    except UserError as error:
        assert "another process is using this folder" in str(error)
with DecoderLog() as log:
    os.write(2, b"Premature end of JPEG file\\n")
assert log.complaint(0) is None
shared = SharedBytes(3)
shared.array[:] = (1, 2, 3)
assert pickle.loads(pickle.dumps(shared)).array.tolist() == [1, 2, 3]
assert free_memory() <= ASSUMED_MEMORY
workers._start_worker(0)
workers._kill_workers()
"""


def test_every_module_works_without_what_windows_lacks(root: Path, tmp_path: Path) -> None:
    code = HIDE + IMPORT_ALL + USE
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 100


def test_opencv_without_display_libraries_is_one_line(root: Path, tmp_path: Path) -> None:
    cause = "libGL.so.1: cannot open shared object file: No such file or directory"
    (tmp_path / "cv2.py").write_text(f"raise ImportError({cause!r})")
    command = "import detect; from utils.errors import run_script; run_script(detect.main)"
    done = subprocess.run(
        [sys.executable, "-c", command, "--weights", "a.pt", "--source", "b.jpg"],
        cwd=root,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "error: OpenCV cannot be imported, libGL.so.1 is missing: pip uninstall opencv-python, then"
        " pip install opencv-python-headless (without --view-img); or, on Debian and Ubuntu,"
        " apt-get install libgl1 libglib2.0-0\n"
    )


def test_apple_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"--device mps: torch finds no Apple GPU.*--device cpu"):
        select_device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert select_device("MPS") == torch.device("mps")
    with pytest.raises(UserError, match="--device mps"):
        select_device("mps", world_size=2)
    with pytest.raises(ValueError, match=r"--device mps: costs are measured on CPUs and CUDA"):
        CompareConfig(cfg=("yolov5n",), device="mps")
