"""The environment of a result: versions, device and commit, as plain values."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import subprocess
from importlib import metadata

import cv2
import torch

from utils.files import ROOT

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h
OPENCV = ("opencv-python", "opencv-python-headless", "opencv-contrib-python")


def run_environment(device: torch.device) -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results, device name, commit.

    None for a package that is not installed.  On CUDA also the versions of CUDA and cuDNN, and
    where TF32 is used.  `commit` is None outside a git checkout and ends in '-dirty' with
    uncommitted changes.  Holds no path and no name of the machine.
    """
    cuda: dict[str, str | None] = {}
    if device.type == "cuda":
        matmul, cudnn = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
        cuda["cuda"] = torch.version.cuda
        cuda["cudnn"] = str(torch.backends.cudnn.version())
        cuda["tf32"] = ", ".join(["matmul"] * matmul + ["cudnn"] * cudnn) or "off"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, e.g. +cpu, which its metadata lacks
        "torchvision": _version("torchvision"),
        "numpy": _version("numpy"),
        "opencv": _version(*OPENCV),
        "pillow": _version("pillow"),
        "hotcoco": _version("hotcoco"),
        "pycocotools": _version("pycocotools"),
        **cuda,
        "device": device_name(device),
        "commit": _commit(),
    }


def keep_freed_memory() -> None:
    """From now on freed memory serves the next tensors of this process, with glibc.

    Its default gives large tensors back to the system at once, and each new one is paged in again.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def use_threads(count: int) -> None:
    """Compute on a CPU with `count` threads in torch and OpenCV; 0 leaves both as they are."""
    if count:
        torch.set_num_threads(count)
        cv2.setNumThreads(count)


def _version(*distributions: str) -> str | None:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's architecture for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _commit() -> str | None:
    if not (ROOT / ".git").exists():  # an enclosing repository would be somebody else's
        return None
    command = "git --no-optional-locks describe --always --dirty --abbrev=40 --exclude=*"
    try:
        text = subprocess.check_output(
            command.split(), cwd=ROOT, stderr=subprocess.DEVNULL, text=True, timeout=10
        )
    except Exception:  # no git, another user's checkout
        return None
    return text.strip() or None
