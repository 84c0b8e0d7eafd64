"""Pickled PyTorch objects as inert values: an unpickler that imports and runs nothing.

The one file that may import pickle (tests/test_architecture.py): genuine YOLOv5 checkpoints are
pickles.  Python's own unpickler imports and calls whatever a file names.  Here `find_class` imports
nothing: a class of a network becomes a `Stub` that only stores its state, a tensor a `TensorRef`, a
few constructors make plain values, and any other name refuses the file.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, Any, ClassVar

import torch

from utils.errors import UserError

PACKAGED = "yolov5."  # the PyPI package's prefix of YOLOv5's own module names
NETWORKS = ("models.", "torch.nn.modules.", "ultralytics.")  # namespaces of network classes
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
INERT = frozenset(
    (
        "numpy.ndarray",
        "numpy.dtype",
        "torch.device",
        *(f"numpy.{core}.multiarray._reconstruct" for core in ("core", "_core")),
        *(f"numpy.{core}.multiarray.scalar" for core in ("core", "_core")),
        *(f"{module}.PosixPath" for module in ("pathlib", "pathlib._local")),
        *(f"{module}.WindowsPath" for module in ("pathlib", "pathlib._local")),
    )
)


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
ALLOWED: Mapping[str, Any] = MappingProxyType(
    {
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
)


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
