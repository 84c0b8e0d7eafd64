"""The environment of a result: versions, device and commit, as plain values."""

from __future__ import annotations

import platform
import subprocess
from importlib import metadata

import torch

from utils.paths import ROOT

PACKAGES = ("torchvision", "numpy")
GIT_TIMEOUT = 10  # seconds


def run_environment(device: torch.device) -> dict[str, str | None]:
    """Versions of Python and of the packages that affect results, device name, commit.

    `commit` is None outside a git checkout and ends in '-dirty' with uncommitted changes.  Holds no
    path and no name of the machine.
    """
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),  # with the build, e.g. +cpu, which its metadata lacks
        **{package: metadata.version(package) for package in PACKAGES},
        "device": device_name(device),
        "commit": _commit(),
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
