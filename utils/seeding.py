"""Randomness from explicit keys, never from a worker's or a process's state."""

from __future__ import annotations

import random

import numpy as np


def generator(seed: int, *key: int) -> np.random.Generator:
    """A generator that depends only on (seed, *key), e.g. (seed, epoch, sample index)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *key))))


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch (all devices), for weights' initial values."""
    import torch  # `generator` is used where torch is not needed

    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002  third-party code may draw from the global state
    torch.manual_seed(seed)
