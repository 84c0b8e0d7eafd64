"""What a pickle may hold, as inert values: names, stubs, references to bytes, a few constructors.

Nothing here imports, looks up or calls what a file names; see `models.weights.unpickle`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

MAX_KEY = 1 << 60  # integers over it could share a hash on purpose
MAX_SIDE = 1 << 40  # elements
MAX_DIMENSIONS = 16
MAX_NAME = 200  # characters of a class's name
STUBS = ("models.", "torch.nn.modules.", "ultralytics.")  # namespaces of network classes
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
VALUES = {f"torch.{name}" for name in STORAGES} | {
    f"torch.{str(dtype).removeprefix('torch.')}" for dtype in STORAGES.values()
}
NUMPY = {  # best_fitness and the like; kept as stubs
    "numpy.ndarray",
    "numpy.dtype",
    *(
        f"numpy.{core}.multiarray.{name}"
        for core in ("core", "_core")
        for name in ("_reconstruct", "scalar")
    ),
}


class DamagedError(Exception):
    """The bytes are no well-formed pickle; `unpickle.read` turns it into a UserError."""


@dataclass(frozen=True)
class Global:
    """A name in a pickle. Nothing is ever imported for it."""

    module: str
    name: str

    @property
    def qualified(self) -> str:
        """module.name."""
        return f"{self.module}.{self.name}"


class Stub:
    """An object of a class that is not loaded: its class's name, its arguments and its state."""

    def __init__(self, kind: str, args: tuple[Any, ...]) -> None:
        self.kind = kind
        self.args = args
        self.state: dict[Any, Any] = {}


@dataclass(frozen=True)
class StorageRef:
    """Bytes elsewhere in the file."""

    key: str
    dtype: torch.dtype
    size: int  # elements


@dataclass(frozen=True, eq=False)
class TensorRef:
    """A tensor whose bytes are still in the file; within its storage's bounds."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        total = 1
        for side in self.shape:
            total *= side
        return total


def plain_key(key: Any) -> Any:
    """The key, if it hashes without running anything and cannot collide on purpose."""
    if type(key) is int and -MAX_KEY < key < MAX_KEY:
        return key
    if key is None or type(key) in {str, bool, bytes}:
        return key
    raise DamagedError(f"a {type(key).__name__} as a key")


def plain_set(items: Any = ()) -> set[Any]:
    """A set of plain keys."""
    if type(items) not in {list, tuple, set}:
        raise DamagedError("a set of something that is no list")
    return {plain_key(item) for item in items}


def _ordered_dict(pairs: Any = ()) -> dict[Any, Any]:
    if type(pairs) not in {list, tuple}:
        raise DamagedError("an OrderedDict of something that is no list of pairs")
    return {plain_key(key): value for key, value in pairs}


def _encode(text: Any, encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding not in {"latin1", "latin-1"}:
        raise DamagedError("bytes in an unknown encoding")
    return text.encode("latin1")


def _device(*parts: Any) -> str:
    return ":".join(str(part) for part in parts if type(part) in {str, int})


def _path(*parts: Any) -> str:
    return "/".join(part for part in parts if type(part) is str)


def _integers(values: Any = ()) -> tuple[int, ...]:
    numbers = type(values) in {tuple, list} and all(type(v) is int for v in values)
    if not numbers or not all(0 <= v < MAX_SIDE for v in values):
        raise DamagedError("a tensor's sizes are not numbers from 0")
    return tuple(values)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    shape, stride, (offset,) = _integers(shape), _integers(stride), _integers((offset,))
    if not isinstance(storage, StorageRef):
        raise DamagedError("a tensor without storage")
    if len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise DamagedError("a tensor with odd sizes")
    ref = TensorRef(storage, offset, shape, stride)
    last = offset + sum((side - 1) * step for side, step in zip(shape, stride, strict=True))
    # more elements than the storage has could only overlap: a small file that asks for all memory
    if ref.size > storage.size or (ref.size and last >= storage.size):
        raise DamagedError("a tensor reaches beyond its storage")
    return ref


def _parameter(data: Any, *_: Any) -> TensorRef:
    if not isinstance(data, TensorRef):
        raise DamagedError("a parameter without a tensor")
    return data


CALLS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _ordered_dict,
    "__builtin__.set": plain_set,
    "builtins.set": plain_set,
    "_codecs.encode": _encode,
    "torch.Size": _integers,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _tensor,
    "torch._utils._rebuild_tensor_v2": _tensor,
    "torch._utils._rebuild_parameter": _parameter,
    **{
        f"{module}.{name}": _path
        for module in ("pathlib", "pathlib._local")
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath")
    },
}


def is_known(found: Global) -> bool:
    """Whether the name is a listed constructor, a listed value, or a class of a network."""
    qualified = found.qualified
    if qualified in CALLS or qualified in VALUES or qualified in NUMPY:
        return True
    # a dotted name would reach through the module to anything it imports
    plain = found.name.isidentifier() and len(qualified) <= MAX_NAME
    return plain and f"{found.module}.".startswith(STUBS)
