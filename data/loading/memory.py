"""Memory for the images of batches, used again and again, in all processes of a loader."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from data.index.columns import SharedBytes

_NUMBERS = itertools.count()
_MEMORIES: weakref.WeakValueDictionary[int, BatchMemory] = weakref.WeakValueDictionary()

Allocate = Callable[[tuple[int, ...]], Tensor]  # shape -> uint8, not initialised


class BatchMemory:
    """Room for `count` batches of at most `size` bytes, that workers fill and their parent reads.

    A place is free again when nobody in the parent holds its images any more.  New memory for each
    batch would be cleared by the system and mapped page by page, in both processes; at 640 px that
    takes a millisecond for an image.
    """

    def __init__(self, size: int, count: int) -> None:
        self.number = next(_NUMBERS)  # by which the parent finds it
        _MEMORIES[self.number] = self
        self._size = size
        self._block = SharedBytes(size * count + 1)
        self._free = set(range(count))

    def lend(self) -> int | None:
        """A free place, or None; called in the parent."""
        return self._free.pop() if self._free else None

    def images(self, place: int | None, shape: tuple[int, ...]) -> Tensor:
        """Bytes of `shape` at a place that was lent, or in memory of their own."""
        if place is None:
            return torch.from_numpy(np.empty(shape, np.uint8))
        array = np.ndarray(shape, np.uint8, self._block.array.data, place * self._size)
        # torch holds the array as long as any view of the tensor lives
        weakref.finalize(array, self._free.add, place).atexit = False
        return torch.from_numpy(array)


def images_at(number: int, place: int, shape: tuple[int, ...]) -> Tensor:
    """What a worker wrote to a place of memory `number`, in its parent."""
    return _MEMORIES[number].images(place, shape)
