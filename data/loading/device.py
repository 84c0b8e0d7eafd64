"""Training images that stay on the device, and the batches composed of them there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from data.loading.compose import Plan, compose
from data.loading.sample import Batch
from utils.errors import cause_of
from utils.terminal import warn_once


class DeviceImages:
    """`slots` squares of `size` pixels on the device, for the batches of a TrainLoader.

    On CUDA the composing is compiled to one kernel where torch can.
    """

    def __init__(self, slots: int, size: int, device: torch.device) -> None:
        self._images = torch.empty((slots, size, size, 3), dtype=torch.uint8, device=device)
        self._compose = torch.compile(compose, dynamic=False) if device.type == "cuda" else compose

    def composed(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches, which are on the device, with the images that their plans describe.

        Batches without a plan pass as they are.
        """
        for batch in batches:
            if batch.plan is None or batch.slots is None:
                yield batch
                continue
            self._images.index_copy_(0, batch.slots, batch.images.permute(0, 2, 3, 1))
            if len(batch):  # else it only brings images
                images = self._composed(batch.plan, batch.letterboxes[0].dst)
                yield replace(batch, images=images, plan=None, slots=None)

    def _composed(self, plan: Plan, size: tuple[int, int]) -> Tensor:
        try:
            return self._compose(self._images, plan, size)
        except Exception as error:
            if self._compose is compose:
                raise
            warn_once(f"warning: images are composed without torch.compile: {cause_of(error)}")
            self._compose = compose
            return compose(self._images, plan, size)
