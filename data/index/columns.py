"""What a split holds an item of for each image, in a few arrays that worker processes share.

118,287 Python objects would be copied into every worker, page by page, as their references are
counted; arrays are not.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import weakref
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

_CODEC = ("utf-8", "surrogatepass")  # undecodable bytes of file names are surrogates


class SharedBytes:
    """A block of memory, zeros at first, that forked and spawned processes share."""

    def __init__(self, size: int) -> None:
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("shared")
            self.file = f"/proc/{os.getpid()}/fd/{descriptor}"
        else:
            descriptor, self.file = tempfile.mkstemp(prefix="shared-")
        os.ftruncate(descriptor, size)
        self.array = np.asarray(np.memmap(self.file, dtype=np.uint8, mode="r+"))
        weakref.finalize(self, _drop_file, self.file, descriptor, os.getpid())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "array": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.array = np.asarray(np.memmap(self.file, dtype=np.uint8, mode="r+"))


def _drop_file(path: str, descriptor: int, owner: int) -> None:
    if os.getpid() != owner:
        return
    os.close(descriptor)
    with contextlib.suppress(OSError):  # Windows keeps a file that is still mapped
        Path(path).unlink(missing_ok=True)


class Texts(Sequence[str]):
    """N texts, one after another in UTF-8; text i is data[ends[i]:ends[i + 1]]."""

    def __init__(self, data: np.ndarray, ends: np.ndarray) -> None:
        self.data = data  # uint8
        self.ends = ends  # (N + 1,) int64

    @staticmethod
    def of(texts: Iterable[str]) -> Texts:
        """The columns of `texts`."""
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += text.encode(*_CODEC)
            ends.append(len(data))
        return Texts(np.frombuffer(data, np.uint8), np.frombuffer(ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        return self.data[self.ends[index] : self.ends[index + 1]].tobytes().decode(*_CODEC)

    def __iter__(self) -> Iterator[str]:
        data, ends = self.data.tobytes(), self.ends.tolist()
        return (data[a:b].decode(*_CODEC) for a, b in itertools.pairwise(ends))

    def take(self, chosen: np.ndarray) -> Texts:
        """The texts at these indices, which rise."""
        return self if len(chosen) == len(self) else Texts.of(self[i] for i in chosen.tolist())

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Texts)
            and np.array_equal(self.ends, other.ends)
            and np.array_equal(self.data, other.data)
        )

    __hash__ = None  # type: ignore[assignment]


@dataclass(frozen=True)
class Entries:
    """The N images that a split names, before their files have been opened."""

    paths: Texts
    ids: Texts
    numeric: np.ndarray  # (N,) bool: the id is a number
    sizes: np.ndarray  # (N, 2) int64: height, width as a COCO JSON claims them, else 0
    label_files: Texts  # of YOLO; () for COCO


@dataclass(frozen=True)
class ImageRecord:
    """One image file and its N boxes."""

    file: str  # a Path in every worker for every image would fill the table of interned texts
    height: int  # as decoded, EXIF orientation applied
    width: int
    image_id: int | str  # the data set's own
    boxes: np.ndarray  # (N, 4) float32, xyxy pixels, inside the image, area > 0
    labels: np.ndarray  # (N,) int64, index into DataIndex.names
    crowd: np.ndarray  # (N,) bool: ignore regions of the evaluation, never training targets
    areas: np.ndarray  # (N,) float32: COCO's 'area' where given, else the box's
    segments: tuple[np.ndarray | None, ...]  # per box (P, 2) float32 pixels, or None

    @property
    def path(self) -> Path:
        """The file."""
        return Path(self.file)


@dataclass(frozen=True, eq=False, repr=False)
class Records(Sequence[ImageRecord]):
    """All records of a split; each is made when it is asked for."""

    paths: Texts
    ids: Texts
    numeric: np.ndarray  # (N,) bool: the id is a number
    sizes: np.ndarray  # (N, 2) int64: height, width
    starts: np.ndarray  # (N + 1,) int64: image i has the boxes starts[i]:starts[i + 1]
    boxes: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    areas: np.ndarray
    points: np.ndarray  # (P, 2) float32 pixels, all polygons one after another
    begins: np.ndarray  # int64: box i has the polygon points[begins[i]:ends[i]], maybe empty
    ends: np.ndarray

    @staticmethod
    def of(records: Sequence[ImageRecord]) -> Records:
        """`records` in columns."""
        if isinstance(records, Records):
            return records
        none = np.zeros((0, 2), np.float32)
        polygons = [none if item is None else item for one in records for item in one.segments]
        ends = np.cumsum([0, *map(len, polygons)])
        return Records(
            paths=Texts.of(item.file for item in records),
            ids=Texts.of(str(item.image_id) for item in records),
            numeric=np.array([isinstance(item.image_id, int) for item in records], bool),
            sizes=np.array([(r.height, r.width) for r in records], np.int64).reshape(-1, 2),
            starts=np.cumsum([0, *(len(item.labels) for item in records)]),
            boxes=np.concatenate([np.zeros((0, 4), np.float32), *(r.boxes for r in records)]),
            labels=np.concatenate([np.zeros(0, np.int64), *(r.labels for r in records)]),
            crowd=np.concatenate([np.zeros(0, bool), *(r.crowd for r in records)]),
            areas=np.concatenate([np.zeros(0, np.float32), *(r.areas for r in records)]),
            points=np.concatenate([none, *polygons]),
            begins=ends[:-1],
            ends=ends[1:],
        )

    def sides(self) -> np.ndarray:
        """(boxes, 2) int64: height, width of each box's image."""
        return np.repeat(self.sizes, np.diff(self.starts), axis=0)

    def __len__(self) -> int:
        return len(self.sizes)

    def __getitem__(self, index: int) -> ImageRecord:  # type: ignore[override]  # no slices
        index = range(len(self))[index]
        height, width = self.sizes[index].tolist()
        rows = self.rows(index)
        return ImageRecord(
            file=self.paths[index],
            height=height,
            width=width,
            image_id=self.image_id(index),
            boxes=self.boxes[rows],
            labels=self.labels[rows],
            crowd=self.crowd[rows],
            areas=self.areas[rows],
            segments=self.segments(rows),
        )

    def image_id(self, index: int) -> int | str:
        """The data set's own id of an image."""
        text = self.ids[index]
        return int(text) if self.numeric[index] else text

    def rows(self, index: int) -> slice:
        """Which of `boxes`, `labels` and `crowd` are of image `index`."""
        return slice(*self.starts[index : index + 2].tolist())

    def segments(self, rows: slice) -> tuple[np.ndarray | None, ...]:
        """The polygons of these boxes."""
        begins, ends = self.begins[rows].tolist(), self.ends[rows].tolist()
        pairs = zip(begins, ends, strict=True)
        # Python keeps 2,000 free tuples of each length if they are made of a generator
        return tuple([self.points[a:b] if b > a else None for a, b in pairs])

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        """For spawned processes: all of them map one copy of the columns."""
        paths, ids, *rest = (getattr(self, field.name) for field in fields(self))
        columns = [paths.data, paths.ends, ids.data, ids.ends, *rest]
        layout = [(column.dtype, column.shape) for column in columns]
        if "_block" not in vars(self):
            block = SharedBytes(sum(column.nbytes + -column.nbytes % 8 for column in columns) + 8)
            vars(self)["_block"] = block
            for target, column in zip(_views(block, layout), columns, strict=True):
                target[:] = column
        return _records_in, (vars(self)["_block"], layout)


def _records_in(block: SharedBytes, layout: list[tuple[np.dtype, tuple[int, ...]]]) -> Records:
    paths, path_ends, ids, id_ends, *rest = _views(block, layout)
    records = Records(Texts(paths, path_ends), Texts(ids, id_ends), *rest)
    vars(records)["_block"] = block
    return records


def _views(
    block: SharedBytes, layout: list[tuple[np.dtype, tuple[int, ...]]]
) -> Iterator[np.ndarray]:
    start = 0
    for kind, shape in layout:
        yield np.ndarray(shape, kind, block.array.data, start)
        start += math.prod(shape) * kind.itemsize
        start += -start % 8


@dataclass(frozen=True)
class ImageCheck:
    """An image file's identity, and its size or why it cannot be used."""

    size: int  # bytes
    mtime_ns: int
    edges: str  # hash of the first and the last bytes
    height: int = 0  # 0: cannot be used
    width: int = 0
    cause: str | None = None  # what is wrong with it


@dataclass(frozen=True)
class ImageChecks:
    """The ImageCheck of N images, in columns."""

    states: np.ndarray  # (N, 3) int64, see file_states; 0 where the file could not be read
    edges: np.ndarray  # (N, 16) uint8
    sizes: np.ndarray  # (N, 2) int64: height, width
    causes: dict[int, str]  # by index

    @staticmethod
    def of(states: np.ndarray) -> ImageChecks:
        """Of files in these states; nothing else is known yet."""
        edges, sizes = np.zeros((len(states), 16), np.uint8), np.zeros((len(states), 2), np.int64)
        return ImageChecks(states, edges, sizes, {})

    def __eq__(self, other: object) -> bool:
        pairs = zip(vars(self).values(), vars(other).values(), strict=False)
        return isinstance(other, ImageChecks) and all(np.array_equal(a, b) for a, b in pairs)

    __hash__ = None  # type: ignore[assignment]

    def __getitem__(self, index: int) -> ImageCheck:
        size, mtime_ns, _ = self.states[index].tolist()
        height, width = self.sizes[index].tolist()
        edges, cause = self.edges[index].tobytes().hex(), self.causes.get(index)
        return ImageCheck(size, mtime_ns, edges, height, width, cause)

    def __setitem__(self, index: int, check: ImageCheck) -> None:
        self.states[index, :2] = check.size, check.mtime_ns
        if check.edges:
            self.edges[index] = np.frombuffer(bytes.fromhex(check.edges), np.uint8)
        else:
            self.states[index, 2] = 0
        self.sizes[index] = check.height, check.width
        if check.cause is not None:
            self.causes[index] = check.cause
