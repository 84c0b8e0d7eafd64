"""Decoded images at the size training or validation needs, kept in memory or on disk."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import secrets
import shutil
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.index.cache import cache_file
from data.index.columns import ImageRecord, Records, SharedBytes
from data.index.decoder import decode_whole
from utils.boxes import Letterbox
from utils.config import local_ranks
from utils.errors import UserError
from utils.images import ImageError, read_bytes
from utils.terminal import warn

FREE_SHARE = 0.8  # --cache ram leaves the rest of the free memory to the network,
ASSUMED_MEMORY = 4 << 30  # bytes, where the system states nothing (Windows)
AUTO_SHARE = 0.4  # --cache auto leaves more,
DISK_SHARE, DISK_LIMIT = 0.1, 20 << 30  # and of the disk it takes this share, and so many bytes
FORMAT = 1  # of the files in the disk cache


class ImageStore:
    """Images scaled to long side `size`, by their index in `records`: (H, W, 3) uint8 RGB.

    Enlarged bilinearly; shrunk by area averages with `area`, else bilinearly from the JPEG at the
    smallest of 1/2, 1/4, 1/8 that is still large enough.  `cache` as in `choose_cache`:
    'ram' keeps all images once they are read, in memory shared with worker processes; 'disk' keeps
    .npy files in the user's cache folder; else they are read each time, and `recent` gives some
    memory for those in use.  Every rank on this machine keeps a set of its own.  The arrays are
    read-only.
    """

    def __init__(
        self,
        records: Sequence[ImageRecord],
        size: int,
        *,
        cache: str = "none",
        area: bool = False,
        recent: int = 0,
        device_memory: int = 0,
    ) -> None:
        self.records = Records.of(records)
        self.size = size
        sources = self.records.sizes.reshape(-1, 2)
        ratios = size / sources.max(1, keepdims=True)
        self.shapes = np.maximum(np.rint(sources * ratios), 1).astype(np.int32)  # as Letterbox does
        # (N, 4) float32: stored pixels per source pixel, x y x y
        self.scales = np.tile(self.shapes[:, ::-1] / sources[:, ::-1], 2).astype(np.float32)
        self.cache, self.cache_line = choose_cache(cache, self.shapes, size, device_memory)
        self._area = area
        self._odd = SharedBytes(max(len(records), 1))  # images a decoder has complained about
        home = cache_file("images", "").parent / "images"  # next to the scans
        self._folder = home / f"{size}{'-area' if area else ''}" if self.cache == "disk" else None
        self._all = SharedImages(image_bytes(self.shapes)) if self.cache == "ram" else None
        largest = image_bytes(self.shapes).max(initial=0)
        fits = (
            self.cache == "none" and recent * largest * local_ranks() <= AUTO_SHARE * free_memory()
        )
        self._recent = SharedImages(np.full(recent, largest)) if fits and recent else None

    def __getitem__(self, position: int) -> np.ndarray:
        """The image of record `position`. Raises UserError when its file is damaged."""
        if self._folder is not None:
            return self._from_disk(self._folder, position)
        return self._kept(self._all, position, position)

    def recent(self, position: int, slot: int) -> np.ndarray:
        """The image of record `position`, which is among the recent ones, at `slot`, for a while.

        At one slot there must not be two images at a time.
        """
        if self._recent is None:
            return self[position]
        return self._kept(self._recent, position, slot)

    def _kept(self, images: SharedImages | None, position: int, slot: int) -> np.ndarray:
        if images is None:
            return self._read(position)
        image = images.get(slot, position, self.shape(position))
        if image is None:
            image = self._read(position)
            images.put(slot, position, image)
        return image

    def shape(self, position: int) -> tuple[int, int]:
        """(height, width) of the stored image."""
        height, width = self.shapes[position].tolist()
        return height, width

    def on_canvas(self, position: int, canvas: tuple[int, int]) -> Letterbox:
        """The stored image of record `position`, unscaled, in the centre of a canvas."""
        return Letterbox(self.shape(position), canvas, self.size)

    def _read(self, position: int) -> np.ndarray:
        file = self.records.paths[position]
        source, (height, width) = tuple(self.records.sizes[position].tolist()), self.shape(position)
        fits = [n for n in (8, 4, 2) if max(source) >= n * self.size and not self._area]
        reduce = fits[0] if fits else 1
        try:
            image, complaint = decode_whole(read_bytes(file), reduce=reduce)
        except ImageError as error:
            raise UserError(
                f"{file}: unreadable: {error}; repair or remove it and start again"
                " (python -m data.index finds all such images)"
            ) from error
        if complaint is not None and not self._odd.array[position]:
            self._odd.array[position] = 1
            warn(f"warning: {file}: {complaint}; used as decoded")
        if image.shape[:2] not in (source, tuple(-(-side // reduce) for side in source)):
            raise UserError(
                f"{file}: was {source[1]}x{source[0]} pixels at the scan and has changed; "
                "start again"
            )
        if image.shape[:2] != source and (source[0] % reduce or source[1] % reduce):
            # a reduced JPEG whose last pixels reach beyond the edges of its source
            right, down = reduce * width / source[1], reduce * height / source[0]
            matrix = np.array([[right, 0, (right - 1) / 2], [0, down, (down - 1) / 2]])
            image = cv2.warpAffine(image, matrix, (width, height), borderMode=cv2.BORDER_REPLICATE)
        if image.shape[:2] != (height, width):
            shrink = self._area and self.size < max(source)
            way = cv2.INTER_AREA if shrink else cv2.INTER_LINEAR
            image = cv2.resize(image, (width, height), interpolation=way)
        image.setflags(write=False)
        return image

    def _from_disk(self, folder: Path, position: int) -> np.ndarray:
        path = Path(self.records.paths[position])
        try:
            status = path.stat()
        except OSError:
            return self._read(position)  # names the cause
        # another path, size or time of change is another file
        text = f"{FORMAT} {path.resolve()} {status.st_size} {status.st_mtime_ns}"
        key = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:40]
        file = folder / f"{key}.npy"
        with contextlib.suppress(Exception):  # not there yet, or damaged
            kept: np.ndarray = np.load(file, allow_pickle=False)
            if kept.shape == (*self.shapes[position].tolist(), 3) and kept.dtype == np.uint8:
                kept.setflags(write=False)
                return kept
        image = self._read(position)
        temporary = file.with_name(f"{secrets.token_hex(8)}.tmp")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with temporary.open("xb") as stream:
                np.save(stream, image)
            temporary.replace(file)
        except BaseException as error:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            if not isinstance(error, OSError):
                raise
            warn(f"warning: {file}: not cached: {error.strerror}; continuing without the cache")
            self._folder = None
        return image


class SharedImages:
    """Slots of `sizes` bytes for images, in one block that forked and spawned processes share.

    The number of a slot's image marks it as complete.  Two processes may put the same image; they
    write the same bytes, and the number last.
    """

    def __init__(self, sizes: np.ndarray) -> None:
        self._starts = np.cumsum([8 * len(sizes), *sizes])
        self._block = SharedBytes(int(self._starts[-1]))

    def get(self, slot: int, number: int, shape: tuple[int, int]) -> np.ndarray | None:
        """Image `number` of (height, width) `shape`, read-only, or None where it is not there."""
        if self._mark(slot)[0] != number + 1:
            return None
        image = self._view(slot, shape)
        image.setflags(write=False)
        return image

    def put(self, slot: int, number: int, image: np.ndarray) -> None:
        """Keep a copy of `image` instead of the one at the slot."""
        mark = self._mark(slot)
        if mark[0] != number + 1:
            mark[0] = 0
            self._view(slot, image.shape[:2])[:] = image
            mark[0] = number + 1

    def _mark(self, slot: int) -> np.ndarray:
        return self._block.array[8 * slot : 8 * slot + 8].view(np.int64)

    def _view(self, slot: int, shape: tuple[int, int]) -> np.ndarray:
        start = self._starts[slot]
        return self._block.array[start : start + math.prod(shape) * 3].reshape(*shape, 3)


def image_bytes(shapes: np.ndarray) -> np.ndarray:
    """(N,) int64 bytes of images of `shapes` (N, 2)."""
    return shapes.prod(1, dtype=np.int64) * 3


def free_memory() -> int:
    """Bytes that this process may still use: the machine's, or the container's if fewer.

    Where the system does not state it, the size of its memory; on Windows `ASSUMED_MEMORY`.
    """
    free = [ASSUMED_MEMORY]
    if hasattr(os, "sysconf"):
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or its limit is "max"
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current"))
        free.append(int(limit) - int(used))
    return min(free)


def choose_cache(asked: str, shapes: np.ndarray, size: int, device_memory: int) -> tuple[str, str]:
    """Where images of `shapes` (N, 2) are kept, and a line that states it with the amounts.

    `asked` is auto, none, ram, disk or device; 'auto' takes the first of device (which stores
    squares of `size` pixels in up to `device_memory` bytes), ram and disk in which they fit, else
    none.  Where 'ram' or 'device' is asked for and too small, a warning, and the next best.
    """
    needed = int(image_bytes(shapes).sum()) * local_ranks()
    squares, free = 3 * size * size * len(shapes), free_memory()
    home = cache_file("images", "").parent
    disk = shutil.disk_usage(next(path for path in home.parents if path.is_dir())).free
    fits = {
        "device": squares <= device_memory,
        "ram": needed <= (FREE_SHARE if asked == "ram" else AUTO_SHARE) * free,
        "disk": needed <= min(DISK_SHARE * disk, DISK_LIMIT),
        "none": True,
    }
    amounts = {
        "device": f"{gib(squares)} of {gib(device_memory)} GiB for images on the device",
        "ram": f"{gib(needed)} GiB in memory, {gib(free)} GiB free",
        "disk": f"{gib(needed)} GiB as files in {home}, {gib(disk)} GiB free",
        "none": f"{gib(needed)} GiB to decode in every epoch",
    }
    choice = asked
    if asked == "auto" or not (fits[asked] or asked == "disk"):
        choice = next(name for name, enough in fits.items() if enough and name != asked)
    if choice != asked != "auto":
        warn(f"warning: --cache {asked} needs {amounts[asked]}; continuing with --cache {choice}")
    return choice, f"cache: {choice} ({amounts[choice]})"


def gib(size: int) -> str:
    """Bytes as GiB, for a text."""
    return f"{size / 2**30:.1f}"
