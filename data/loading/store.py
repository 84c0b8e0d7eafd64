"""Decoded images at the size training or validation needs, kept in memory or on disk."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np

from data.index.cache import cache_file
from data.index.columns import ImageRecord, Records, SharedBytes
from utils.boxes import Letterbox
from utils.config import local_ranks
from utils.errors import UserError
from utils.images import ImageError, read_image
from utils.terminal import warn

SMALL_SET = 1 << 30  # a set of at most this many bytes is kept in memory without a request,
SMALL_SHARE = 0.25  # unless that is more than this share of the free memory
FREE_SHARE = 0.8  # `ram` leaves the rest of the free memory to the network
FORMAT = 1  # of the files in the disk cache


class ImageStore:
    """Images scaled to long side `size`, by their index in `records`: (H, W, 3) uint8 RGB.

    Enlarged bilinearly; shrunk by area averages with `area`, else bilinearly from the JPEG at the
    smallest of 1/2, 1/4, 1/8 that is still large enough.  `cache`: 'ram' keeps all images once
    they are read, in memory shared with worker processes (where it does not fit, a warning, and
    they are read each time); 'disk' keeps .npy files in the user's cache folder; 'none' does as
    'ram' for small sets only.  Every rank on this machine keeps a set of its own.  The arrays are
    read-only.
    """

    def __init__(
        self, records: Sequence[ImageRecord], size: int, *, cache: str = "none", area: bool = False
    ) -> None:
        self.records = Records.of(records)
        self.size = size
        shapes = [self.geometry(position).dst for position in range(len(records))]
        self.shapes = np.array(shapes, np.int32).reshape(-1, 2)
        self._area = area
        home = cache_file("images", "").parent / "images"  # next to the scans
        self._folder = home / f"{size}{'-area' if area else ''}" if cache == "disk" else None
        fits = cache != "disk" and _fits(self.shapes, asked=cache == "ram")
        self._shared = SharedImages(self.shapes) if fits else None

    def __getitem__(self, position: int) -> np.ndarray:
        """The image of record `position`. Raises UserError when its file has become unreadable."""
        if self._folder is not None:
            return self._from_disk(self._folder, position)
        image = self._shared.get(position) if self._shared is not None else None
        if image is None:
            image = self._read(position)
            if self._shared is not None:
                self._shared.put(position, image)
        return image

    def geometry(self, position: int) -> Letterbox:
        """The scale from record `position`'s image to the stored one (no padding)."""
        height, width = self.records.sizes[position].tolist()
        whole = Letterbox((height, width), (self.size, self.size))
        return Letterbox(whole.src, whole.size, self.size)

    def _read(self, position: int) -> np.ndarray:
        record, (height, width) = self.records[position], self.shapes[position].tolist()
        source = (record.height, record.width)
        fits = [n for n in (8, 4, 2) if max(source) >= n * self.size and not self._area]
        reduce = fits[0] if fits else 1
        try:
            image = read_image(record.path, reduce=reduce)
        except ImageError as error:
            raise UserError(
                f"{record.path}: unreadable since the scan: {error}; "
                "repair or remove it and start again"
            ) from error
        if image.shape[:2] not in (source, tuple(-(-side // reduce) for side in source)):
            raise UserError(
                f"{record.path}: was {source[1]}x{source[0]} pixels at the scan and has changed; "
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
        path = self.records[position].path
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
    """Bytes of all images in one block that forked and spawned processes share.

    A flag per image marks it as complete.  Two processes may write the same image; they write
    the same bytes, and the flag last.
    """

    def __init__(self, shapes: np.ndarray) -> None:
        self._shapes = shapes  # (N, 2)
        sizes = shapes.prod(1, dtype=np.int64) * 3
        self._starts = np.cumsum([len(shapes), *sizes])
        self._block = SharedBytes(int(self._starts[-1]))

    def get(self, position: int) -> np.ndarray | None:
        """The image, read-only, or None before its first `put`."""
        if not self._block.array[position]:
            return None
        image = self._view(position)
        image.setflags(write=False)
        return image

    def put(self, position: int, image: np.ndarray) -> None:
        """Keep a copy of `image`."""
        self._view(position)[:] = image
        self._block.array[position] = 1

    def _view(self, position: int) -> np.ndarray:
        start, stop = self._starts[position], self._starts[position + 1]
        return np.asarray(self._block.array[start:stop]).reshape(*self._shapes[position], 3)


def free_memory() -> int:
    """Bytes that this process may still use: the machine's, or the container's if fewer.

    Where the system does not state it, the size of its memory.
    """
    free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    with contextlib.suppress(OSError):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")]
    with contextlib.suppress(OSError, ValueError):  # no cgroup v2, or its limit is "max"
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text() for n in ("max", "current"))
        free.append(int(limit) - int(used))
    return min(free)


def _fits(shapes: np.ndarray, *, asked: bool) -> bool:
    """Whether to keep images of these shapes in memory."""
    needed = int(shapes.prod(1, dtype=np.int64).sum()) * 3 * local_ranks()
    free = free_memory()
    if not asked:
        return needed <= min(SMALL_SET, SMALL_SHARE * free)
    if needed > FREE_SHARE * free:
        warn(
            f"warning: --cache ram needs {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free;"
            " continuing without the cache (--cache disk may help)"
        )
        return False
    return True
