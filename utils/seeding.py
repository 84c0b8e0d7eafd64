"""Randomness from explicit keys, never from a worker's or a process's state."""

from __future__ import annotations

import numpy as np


def generator(seed: int, *key: int) -> np.random.Generator:
    """A generator that depends only on (seed, *key), e.g. (seed, epoch, sample index)."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, *key))))
