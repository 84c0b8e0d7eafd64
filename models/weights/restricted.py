"""Checkpoints of `torch.save` as inert values: an unpickler that imports and runs nothing.

Both containers are read without extracting anything: a zip of stored members (since torch 1.6), and
raw pickles.

The one file that may import pickle (tests/test_architecture.py): genuine YOLOv5 checkpoints are
pickles.  Python's own unpickler imports and calls whatever a file names.  Here `find_class` imports
nothing: a class of a network becomes a `Stub` that only stores its state, a tensor a `TensorRef`, a
few constructors make plain values, and any other name refuses the file.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, ClassVar, NoReturn

import torch
from torch import Tensor

from utils.errors import UserError, cause_of

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C  # the first pickle of the raw format
LEGACY_PROTOCOL = 1001
COUNT_BYTES = 8  # before each storage of the raw format: its number of elements
PACKAGED = "yolov5."  # the PyPI package's prefix of YOLOv5's own module names
NETWORKS = ("models.", "torch.nn.modules.", "ultralytics.")  # namespaces of network classes
YOLOV5_RELEASES = "https://github.com/ultralytics/yolov5/releases"
MAX_NAME = 200  # characters of a class's name
STORAGES = {
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
}
# Names in a checkpoint's other values, e.g. best_fitness; they become stubs as networks' classes do
INERT = {
    *("numpy.ndarray", "numpy.dtype", "torch.device"),
    *(f"numpy.{x}.multiarray.{y}" for x in ("core", "_core") for y in ("_reconstruct", "scalar")),
    *(f"{x}.{y}Path" for x in ("pathlib", "pathlib._local") for y in ("Posix", "Windows")),
}


class Stub:
    """An object of a class that is not loaded: the class's name, its arguments and its state."""

    kind = ""
    args: tuple[Any, ...]
    state: dict[Any, Any]

    def __new__(cls, *args: Any) -> Stub:  # pickle calls either this or the class
        stub = super().__new__(cls)
        stub.args, stub.state = args, {}
        return stub


@dataclass(frozen=True)
class Storage:
    """Bytes elsewhere in the file; `size` in elements."""

    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor whose bytes are still in the file; bounds are checked on reading it."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("a tensor without storage")
    return TensorRef(storage, offset, tuple(shape), tuple(stride))


# What a listed name stands for; nothing else on this side can be reached from a file
ALLOWED: dict[str, Any] = {
    "collections.OrderedDict": dict,
    "__builtin__.set": set,
    "builtins.set": set,
    "_codecs.encode": lambda text, _: text.encode("latin1"),  # bytes under protocol 2
    "torch.Size": tuple,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": lambda data, *_: data,
    **{f"torch.{name}": dtype for name, dtype in STORAGES.items()},
    **{str(dtype): dtype for dtype in STORAGES.values()},
}


class RestrictedUnpickler(pickle._Unpickler):
    """Reads one pickle from a stream and leaves the stream after its end.

    `load` gives dicts, lists, tuples, sets, scalars, Stub and TensorRef; `storages` are those named
    on the way.  Raises UserError for a name that is not listed, and many kinds of exceptions for
    bytes that are no pickle.  Python's implementation instead of C's: its memo is a dict, so that
    one damaged index does not ask for gigabytes.
    """

    stack: list[Any]  # of the base class, as `proto`
    proto: int

    def __init__(self, stream: IO[bytes]) -> None:
        super().__init__(stream)
        self.storages: dict[str, Storage] = {}
        self._stream = stream

    def find_class(self, module: str, name: str) -> Any:
        """The stand-in for a listed name; UserError for any other."""
        if module.startswith(f"{PACKAGED}models."):
            module = module.removeprefix(PACKAGED)
        qualified = f"{module}.{name}"
        if qualified in ALLOWED:
            return ALLOWED[qualified]
        # a dotted name would reach through the module to what it imports
        network = f"{module}.".startswith(NETWORKS) and name.isidentifier()
        if qualified in INERT or (network and len(qualified) <= MAX_NAME):
            return type("Stub", (Stub,), {"kind": qualified})
        if self.proto < 4 and not self._stream.read(1):  # no frames, so nothing is read ahead
            raise EOFError("ends within a name")
        shown = ascii(qualified)[1:-1][:100]
        raise UserError(
            f"refused: the file names {shown!r}, which no detector needs and which could run code; "
            "nothing was run"
        )

    def persistent_load(self, pid: Any) -> Any:
        """('storage', type, key, location, elements[, None]), ('module', class, file, source).

        The raw format stores a network's class with its source text, which is not looked at.
        """
        kind, *rest = pid
        if kind == "module":
            return rest[0]
        dtype, key, _, size, *view = rest
        known = isinstance(dtype, torch.dtype) and type(key) is str and key.isdecimal()
        if kind != "storage" or not known or type(size) is not int or view not in ([], [None]):
            raise pickle.UnpicklingError("an unknown persistent id")
        return self.storages.setdefault(key, Storage(key, dtype, size))

    def get_extension(self, code: int) -> Any:
        """Refused: extension codes name what this process registered, past `find_class`."""
        raise pickle.UnpicklingError(f"an extension code ({code})")

    def _build(self) -> None:
        """BUILD: a stub stores its state, a dict ignores its attributes (a state dict's _metadata).

        The base class would set attributes on anything, functions included.
        """
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, Stub):
            target.state = state if type(state) is dict else {"state": state}
        elif type(target) is not dict:
            raise pickle.UnpicklingError(f"state for a {type(target).__name__}")

    dispatch: ClassVar[dict[int, Any]] = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: _build}
    del dispatch[pickle.BYTEARRAY8[0]]  # fills the memory that a length asks for before it reads


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
            return _strided(bytearray(self.read(ref.storage)), ref)
        except Exception as error:
            key = ref.storage.key
            raise UserError(
                f"not a checkpoint: storage {key!r} cannot be read ({cause_of(error)})"
            ) from error


def _strided(data: bytearray, ref: TensorRef) -> Tensor:
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
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_opened(path))
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
        except OSError as error:  # no permission, too many open files, a disk that fails
            raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error
        except Exception as error:
            raise UserError(
                f"{path}: not a checkpoint: truncated or damaged ({cause_of(error)})"
            ) from error


def _publisher(name: str) -> str:
    """Where the weights of this name are published, for an error message."""
    if re.fullmatch(r"yolov5[nsmlx]6?\.pt", name):
        return f"; YOLOv5's authors publish {name} at {YOLOV5_RELEASES}"
    if re.fullmatch(r"yolo(v?\d+|_?[a-z]+)[a-z]*\d*(-[a-z]+)?\.pt", name):
        return f"; {name} is no YOLOv5 detector, and only those are read"
    return ""


def _opened(path: Path) -> IO[bytes]:
    if not path.exists():
        raise UserError(f"no such file{_publisher(path.name)} (nothing is downloaded)")
    if not path.is_file():  # a FIFO would block
        kind = "a directory" if path.is_dir() else "not a regular file"
        raise UserError(f"not a checkpoint: it is {kind}")
    return path.open("rb")


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
