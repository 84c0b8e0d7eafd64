"""The two containers of `torch.save`: a zip of stored members (since torch 1.6), and raw pickles.

Opened, checked and read without extracting, importing or running anything.
"""

from __future__ import annotations

import contextlib
import io
import mmap
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor

from models.weights import unpickle
from models.weights.pickled import STORAGES, DamagedError, Global, StorageRef, TensorRef
from utils.errors import UserError

MAX_MEMBERS = 100_000
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the raw format
LEGACY_PROTOCOL = 1001
# what reading a damaged zip raises
BAD_ZIP = (
    zipfile.BadZipFile,
    OSError,
    EOFError,
    RuntimeError,
    ValueError,
    LookupError,
    ArithmeticError,
)
COUNT_BYTES = 8  # before each storage of the raw format: its number of elements


class Pickled:
    """An open checkpoint: `root`, its inert values, and the bytes of its tensors."""

    def __init__(
        self, path: Path, root: Any, *, keys: frozenset[str], read: Callable[[StorageRef], bytes]
    ) -> None:
        self.path = path
        self.root = root
        self.keys = keys  # of all storages in the file
        self._read = read
        self._left = path.stat().st_size

    def tensor(self, ref: TensorRef) -> Tensor:
        """A copy of the tensor, contiguous, in the dtype it is stored in.

        Raises UserError for missing or short bytes, and when all tensors taken are larger than the
        file: only a file made to fill the memory asks for that.
        """
        storage = ref.storage
        self._left -= ref.size * storage.dtype.itemsize
        if self._left < 0:
            raise UserError(f"{self.path}: its tensors are larger than the file; refused")
        try:
            data = bytearray(self._read(storage))
        except BAD_ZIP as error:
            cause = str(error).splitlines()[0]
            raise UserError(
                f"{self.path}: not a checkpoint: storage {storage.key!r} cannot be read ({cause})"
            ) from error
        if len(data) != storage.size * storage.dtype.itemsize:
            raise UserError(
                f"{self.path}: not a checkpoint: storage {storage.key!r} has {len(data)} bytes, "
                f"expected {storage.size * storage.dtype.itemsize}"
            )
        if ref.size == 0:
            return torch.empty(ref.shape, dtype=storage.dtype)
        if storage.dtype is torch.bool:  # any byte but 0 is true
            flat = torch.frombuffer(data, dtype=torch.uint8).ne(0)
        else:
            flat = torch.frombuffer(data, dtype=storage.dtype)
        view = flat.as_strided(ref.shape, ref.stride, ref.offset)
        return view.clone(memory_format=torch.contiguous_format)


@contextlib.contextmanager
def open_pickled(path: Path) -> Iterator[Pickled]:
    """Read the pickle of a checkpoint file; `tensor` works while the context is open.

    Raises UserError 'FILE: not a checkpoint: cause' for anything else, and for a file that names
    what could run code.
    """
    with _opened(path) as data:
        if data[:4] == b"PK\x03\x04":
            with _open_zip(path) as archive:
                yield _read_zip(path, archive)
        elif data[:1] == b"\x80":
            yield _read_legacy(path, data)
        else:
            raise UserError(f"{path}: not a checkpoint: {_guess(bytes(data[:64]))}")


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[mmap.mmap]:
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file (nothing is downloaded)")
        if not path.is_file():
            kind = "a directory" if path.is_dir() else "no regular file"
            raise UserError(f"{path}: not a checkpoint: it is {kind}")
        if path.stat().st_size == 0:
            raise UserError(f"{path}: not a checkpoint: the file is empty (0 bytes)")
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            yield data
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _guess(start: bytes) -> str:
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "it is a web page"
    if start.startswith(b"version https://git-lfs"):
        return "it is a Git LFS pointer, the file itself was not fetched"
    if all(32 <= byte < 127 or byte in b"\t\r\n" for byte in start):
        return "it is text"
    return "neither a zip nor a pickle of torch.save"


@contextlib.contextmanager
def _open_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        archive = zipfile.ZipFile(path)
    except BAD_ZIP as error:
        raise UserError(
            f"{path}: not a checkpoint: a truncated or damaged zip ({error})"
        ) from error
    with archive:
        yield archive


def _read_zip(path: Path, archive: zipfile.ZipFile) -> Pickled:
    prefix, members = _members(path, archive)
    try:
        order = archive.read(f"{prefix}/byteorder") if "byteorder" in members else b"little"
        content = archive.read(f"{prefix}/data.pkl")
    except BAD_ZIP as error:
        raise UserError(f"{path}: not a checkpoint: a damaged zip ({error})") from error
    if order.strip() != b"little":
        raise UserError(f"{path}: written on a big-endian machine, which is not supported")
    root = unpickle.read(io.BytesIO(content), str(path), _persistent)
    keys = frozenset(name.removeprefix("data/") for name in members if name.startswith("data/"))

    def read(storage: StorageRef) -> bytes:
        return archive.read(f"{prefix}/data/{storage.key}")

    return Pickled(path, root, keys=keys, read=read)


def _members(path: Path, archive: zipfile.ZipFile) -> tuple[str, Mapping[str, zipfile.ZipInfo]]:
    """The archive's only folder and its members, which are stored, not packed, and fit the file."""
    entries = archive.infolist()
    heads = [e.filename for e in entries if e.filename.split("/")[1:] == ["data.pkl"]]
    if len(heads) != 1 or len(entries) > MAX_MEMBERS:
        raise UserError(f"{path}: not a checkpoint: a zip without exactly one 'NAME/data.pkl'")
    prefix = heads[0].removesuffix("/data.pkl")
    if any(entry.filename.startswith(f"{prefix}/code/") for entry in entries):
        raise UserError(f"{path}: not a checkpoint: a TorchScript program")
    members: dict[str, zipfile.ZipInfo] = {}
    for entry in entries:
        name = entry.filename.removeprefix(f"{prefix}/")
        if name in members:
            raise UserError(f"{path}: not a checkpoint: member {name[:80]!a} is there twice")
        members[name] = entry
        if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
            raise UserError(
                f"{path}: member {name[:80]!a} is compressed, which torch.save never does"
            )
    if sum(entry.file_size for entry in entries) > path.stat().st_size:
        raise UserError(f"{path}: its members are larger than the file; refused")
    if members["data.pkl"].file_size > unpickle.MAX_PICKLE:
        raise UserError(f"{path}: a pickle of over {unpickle.MAX_PICKLE >> 20} MiB; refused")
    return prefix, members


def _read_legacy(path: Path, data: mmap.mmap) -> Pickled:
    """magic, protocol, system, the object, the storages' keys: five pickles; then the storages."""
    where, stream = str(path), cast("IO[bytes]", data)  # which is all that is asked of it
    if unpickle.read(stream, where, _persistent) != LEGACY_MAGIC:
        raise UserError(f"{path}: not a checkpoint: a pickle that torch.save did not write")
    protocol = unpickle.read(stream, where, _persistent)
    system = unpickle.read(stream, where, _persistent)
    if protocol != LEGACY_PROTOCOL or not (
        type(system) is dict and system.get("little_endian") is True
    ):
        raise UserError(f"{path}: not a checkpoint: an unknown version of torch.save's raw format")
    found: dict[str, StorageRef] = {}

    def persistent(identifier: Any) -> Any:
        value = _persistent(identifier)
        if isinstance(value, StorageRef) and found.setdefault(value.key, value) != value:
            raise DamagedError("one storage described twice")
        return value

    root = unpickle.read(stream, where, persistent)
    keys = unpickle.read(stream, where, _persistent)
    places: dict[str, slice] = {}
    position = data.tell()
    for key in keys if type(keys) is list else ():
        if key not in found or key in places:
            raise UserError(f"{path}: not a checkpoint: unknown or repeated storage")
        start = position + COUNT_BYTES
        position = start + found[key].size * found[key].dtype.itemsize
        if int.from_bytes(data[start - COUNT_BYTES : start], "little") != found[key].size:
            raise UserError(f"{path}: not a checkpoint: truncated or damaged tensor data")
        places[key] = slice(start, position)
    return Pickled(
        path, root, keys=frozenset(places), read=lambda storage: data[places[storage.key]]
    )


def _persistent(identifier: Any) -> Any:
    """('storage', type, key, place, elements[, None]) -> StorageRef; ('module', class, ...) -> it.

    The raw format gives a network's class with its source text, which is not looked at.
    """
    kind, *rest = identifier if type(identifier) is tuple and identifier else (None,)
    if kind == "module" and rest and isinstance(rest[0], Global):
        return rest[0]
    if kind != "storage" or len(rest) not in {4, 5} or (len(rest) == 5 and rest[4] is not None):
        raise DamagedError("an unknown persistent id")
    storage, key, _, size = rest[:4]
    dtype = STORAGES.get(storage.name) if isinstance(storage, Global) else None
    if dtype is None or not (type(key) is str and key.isdecimal() and len(key) < 20):
        raise DamagedError("a storage of unknown type or key")
    if type(size) is not int or size < 0:
        raise DamagedError("a storage of odd size")
    return StorageRef(key, dtype, size)
