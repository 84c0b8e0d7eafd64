from __future__ import annotations

import platform
import subprocess
import sys

import cv2
import pytest
import torch

from utils.environment import use_threads

FAULTS = """
import resource
import torch
from utils.environment import keep_freed_memory

keep_freed_memory()
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(10_000_000)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this setting")
def test_freed_memory_serves_the_next_tensor(root):
    """In a process of its own: 40 MB are paged in a few times, until free parts have joined."""
    done = subprocess.run(
        [sys.executable, "-c", FAULTS], cwd=root, capture_output=True, text=True, check=True
    )
    faults = list(map(int, done.stdout.split()))
    assert faults[0] > 16
    assert max(faults[10:]) < faults[0] / 10


def test_threads_of_torch_and_opencv(monkeypatch):
    counts = []
    monkeypatch.setattr(torch, "set_num_threads", counts.append)
    monkeypatch.setattr(cv2, "setNumThreads", counts.append)
    use_threads(0)
    assert counts == []
    use_threads(3)
    assert counts == [3, 3]
