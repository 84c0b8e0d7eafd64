"""The two containers of `torch.save`: a zip of stored members (since torch 1.6), and raw pickles.

Opened and read without extracting, importing or running anything.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NoReturn

import torch
from torch import Tensor

from models.weights.restricted import RestrictedUnpickler, Storage, TensorRef
from utils.errors import UserError, cause_of

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the raw format
LEGACY_PROTOCOL = 1001
COUNT_BYTES = 8  # before each storage of the raw format: its number of elements


@dataclass(frozen=True)
class Pickled:
    """An open checkpoint: `root`, its inert values, and a way to the bytes of its tensors."""

    root: Any
    read: Callable[[Storage], bytes]

    def tensor(self, ref: TensorRef) -> Tensor:
        """A copy of the tensor, contiguous, in the dtype it is stored in.

        Raises UserError for missing or short bytes, and for a tensor that reaches beyond its
        storage or repeats it (a small file that asks for all memory).
        """
        try:
            return _tensor(bytearray(self.read(ref.storage)), ref)
        except Exception as error:
            key = ref.storage.key
            raise UserError(
                f"not a checkpoint: storage {key!r} cannot be read ({cause_of(error)})"
            ) from error


def _tensor(data: bytearray, ref: TensorRef) -> Tensor:
    size, dtype = ref.storage.size, ref.storage.dtype
    if len(data) != size * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes, expected {size * dtype.itemsize}")
    if math.prod(ref.shape) > size:
        raise ValueError("a tensor larger than its storage")
    if not data:
        return torch.empty(ref.shape, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8 if dtype is torch.bool else dtype)
    if dtype is torch.bool:
        flat = flat.ne(0)  # any byte but 0 is true
    view = flat.as_strided(ref.shape, ref.stride, ref.offset)
    return view.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def open_pickled(path: Path) -> Iterator[Pickled]:
    """Read the pickle of a checkpoint file; `tensor` works while the context is open.

    Any error until then, the caller's included, becomes a UserError that begins with the path;
    'FILE: not a checkpoint: cause' for anything else than a checkpoint.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file (nothing is downloaded)")
        if not path.is_file():  # a FIFO would block
            kind = "a directory" if path.is_dir() else "not a regular file"
            raise UserError(f"{path}: not a checkpoint: it is {kind}")
        opened = path.open("rb")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
    with opened as file, contextlib.ExitStack() as stack:
        try:
            start = file.read(64)
            file.seek(0)
            if start.startswith(b"PK\x03\x04"):
                yield _read_zip(stack.enter_context(zipfile.ZipFile(file)), path.stat().st_size)
            elif start.startswith(b"\x80"):
                yield _read_raw(file)
            else:
                _refuse(start)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
        except OSError as error:  # too many open files, a disk that fails
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except Exception as error:
            raise UserError(
                f"{path}: not a checkpoint: truncated or damaged ({cause_of(error)})"
            ) from error


def _refuse(start: bytes) -> NoReturn:
    cause = "neither a zip nor a pickle of torch.save"
    if not start:
        cause = "the file is empty (0 bytes)"
    elif start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        cause = "it is a web page"
    elif start.startswith(b"version https://git-lfs"):
        cause = "it is a Git LFS pointer, the file itself was not fetched"
    elif all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        cause = "it is text"
    raise UserError(f"not a checkpoint: {cause}")


def _read_zip(archive: zipfile.ZipFile, file_size: int) -> Pickled:
    entries, names = archive.infolist(), set(archive.namelist())
    found = [name for name in names if name.split("/")[1:] == ["data.pkl"]]
    if len(found) != 1:
        raise UserError("not a checkpoint: a zip without exactly one 'NAME/data.pkl'")
    prefix = found[0].removesuffix("/data.pkl")
    if any(name.startswith(f"{prefix}/code/") for name in names):
        raise UserError("not a checkpoint: a TorchScript program")
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UserError("compressed, which torch.save never does; refused")
    if sum(entry.file_size for entry in entries) > file_size:
        raise UserError("its members are larger than the file; refused")
    if f"{prefix}/byteorder" in names and archive.read(f"{prefix}/byteorder") != b"little":
        raise UserError("written on a big-endian machine, which is not supported")
    root = RestrictedUnpickler(io.BytesIO(archive.read(f"{prefix}/data.pkl"))).load()
    return Pickled(root, lambda storage: archive.read(f"{prefix}/data/{storage.key}"))


def _read_raw(file: IO[bytes]) -> Pickled:
    """magic, protocol, system, the object, the storages' keys: five pickles; then the storages."""
    if RestrictedUnpickler(file).load() != LEGACY_MAGIC:
        raise UserError("not a checkpoint: a pickle that torch.save did not write")
    protocol, system = (RestrictedUnpickler(file).load() for _ in range(2))
    if protocol != LEGACY_PROTOCOL or system.get("little_endian") is not True:
        raise UserError("not a checkpoint: an unknown version of torch.save's raw format")
    unpickler = RestrictedUnpickler(file)
    root = unpickler.load()
    starts: dict[str, int] = {}
    for key in RestrictedUnpickler(file).load():
        storage = unpickler.storages[key]
        if int.from_bytes(file.read(COUNT_BYTES), "little") != storage.size:
            raise ValueError(f"the size of storage {key}")
        starts[key] = file.tell()
        file.seek(storage.size * storage.dtype.itemsize, os.SEEK_CUR)

    def read(storage: Storage) -> bytes:
        file.seek(starts[storage.key])
        return file.read(storage.size * storage.dtype.itemsize)

    return Pickled(root, read)
