"""The loaders of a training run, and what the device keeps of the images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain

import torch

from data.index.records import DataIndex
from data.loading.device import DeviceImages
from data.loading.loader import LoaderConfig, TrainLoader, ValLoader
from data.loading.sample import Batch
from data.loading.store import free_memory
from engine.distributed import Distributed
from engine.train.config import TrainConfig
from utils.errors import UserError
from utils.hyp import Hyperparameters
from utils.terminal import warn_main

IMAGES_SHARE = 0.25  # of a device's free memory, for training images,
IMAGES_SHARE_OF_REST = 0.1  # or where --batch-size -1 has taken most of it


def make_loaders(
    config: TrainConfig,
    hyp: Hyperparameters,
    world: Distributed,
    *,
    train: DataIndex,
    val: DataIndex,
    stride: int,
    on_device: bool,
    measured_batch: bool,
) -> tuple[TrainLoader, ValLoader, DeviceImages | None]:
    """Loaders as `config` says, and where the device composes images, what it keeps them in.

    `on_device` as `composes_on_device` says; `measured_batch`: whether the batch fills the device.
    """
    device = world.device
    common = LoaderConfig(
        image_size=config.imgsz,
        batch_size=config.batch_size // world.world_size,
        stride=stride,
        workers=config.workers,
        seed=config.seed,
        rank=world.rank,
        world_size=world.world_size,
        rect=config.rect,
        fill=config.compile and not config.rect,
        cache=config.cache,
        pin_memory=device.type == "cuda",
    )
    memory = 0
    if on_device:
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
        memory = int(free * (IMAGES_SHARE_OF_REST if measured_batch else IMAGES_SHARE))
    loader = TrainLoader(
        train,
        replace(common, on_device=on_device, device_memory=memory),
        hyp,
        epochs=config.epochs,
        mosaic_epochs=mosaic_epochs(config, hyp),
    )
    images = DeviceImages(loader.slots, config.imgsz, device) if on_device else None
    return loader, ValLoader(val, common), images


def mosaic_epochs(config: TrainConfig, hyp: Hyperparameters) -> int:
    """How many epochs may have mosaics: all but the last ones, by --close-mosaic or the recipe."""
    return max(config.epochs - (config.close_mosaic or round(hyp.close_mosaic)), 0)


def ahead(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The same batches on `device`; on CUDA the next one is copied, by a stream of its own, before
    the one at hand is used.
    """
    if device.type != "cuda":
        for batch in batches:
            yield batch.to(device)
        return
    user, copier = torch.cuda.current_stream(device), torch.cuda.Stream(device)
    following: tuple[Batch, torch.cuda.Event] | None = None
    for item in chain(batches, (None,)):
        ready, following = following, None
        if item is not None:
            with torch.cuda.stream(copier):
                following = item.to(device), copier.record_event()
        if ready is not None:
            there, copied = ready
            user.wait_event(copied)
            for tensor in there.tensors():
                tensor.record_stream(user)  # whose memory the copier may not use until then
            yield there


def delivered(
    batches: Iterable[Batch], device: torch.device, images: DeviceImages | None
) -> Iterator[Batch]:
    """Batches of a TrainLoader -> those that a step takes: on the device, composed there or not."""
    there = ahead(batches, device)
    return there if images is None else images.composed(there)


def composes_on_device(config: TrainConfig, hyp: Hyperparameters, device: torch.device) -> bool:
    """Whether training images are composed on the device; a line where that is asked for in vain.

    UserError for --cache device where they are not.
    """
    wanted = config.augment == "device" or (config.augment == "auto" and device.type == "cuda")
    reason = "--rect" if config.rect else "copy_paste" if hyp.copy_paste else ""
    if config.cache == "device" and (reason or not wanted):
        cause = f" and excludes {reason}" if reason else ""
        raise UserError(f"--cache device needs --augment device{cause}; choose another --cache")
    if wanted and reason:
        warn_main(f"training images are composed on the CPU, because of {reason}")
    return wanted and not reason
