"""The environment of a result: versions, device and commit, as plain values."""

from __future__ import annotations

import contextlib
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata

import torch

from utils.paths import ROOT

PACKAGES = {  # that decide metrics, by the distributions that bring them
    "torchvision": ("torchvision",),
    "numpy": ("numpy",),
    "opencv": ("opencv-python", "opencv-python-headless", "opencv-contrib-python"),
    "pillow": ("pillow",),
    "hotcoco": ("hotcoco",),
    "pycocotools": ("pycocotools",),
}
GIT_TIMEOUT = 10  # seconds


def run_environment(device: torch.device) -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results, device name, commit.

    None for a package that is not installed.  On CUDA also the versions of CUDA and cuDNN, and
    where TF32 is used.  `commit` is None outside a git checkout and ends in '-dirty' with
    uncommitted changes.  Holds no path and no name of the machine.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, e.g. +cpu, which its metadata lacks
        **{package: _version(names) for package, names in PACKAGES.items()},
        **(_cuda() if device.type == "cuda" else {}),
        "device": device_name(device),
        "commit": _commit(),
    }


def _version(distributions: Sequence[str]) -> str | None:
    for name in distributions:
        with contextlib.suppress(metadata.PackageNotFoundError):
            return metadata.version(name)
    return None


def _cuda() -> dict[str, str | None]:
    uses = {
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
    }
    return {
        "cuda": torch.version.cuda,
        "cudnn": str(torch.backends.cudnn.version()),
        "tf32": ", ".join(name for name, allowed in uses.items() if allowed) or "off",
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's architecture for the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()})"


def _commit() -> str | None:
    if not (ROOT / ".git").exists():  # an enclosing repository would be somebody else's
        return None
    command = ["git", "--no-optional-locks", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(
            [*command, "--exclude=*"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.strip() or None
