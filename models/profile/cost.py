"""Cost of one forward pass: multiply-adds, operations, memory traffic, peak memory.

One recorder sees the operators that really run, on the meta device (shapes, no pixels), so that
nothing functional escapes and what is unknown is named.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from models.profile.kernels import ACTIVATIONS, BATCH_NORM, Kernel, describe


@dataclass(frozen=True)
class Cost:
    """Kernels of a forward pass or of a part of it, and the memory that lived meanwhile."""

    kernels: tuple[Kernel, ...] = ()
    peak_bytes: int = 0  # images and live results; not weights, nor a library's work space
    branches: int = 0  # maximum of kernels that do not depend on each other

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.kernels + other.kernels,
            max(self.peak_bytes, other.peak_bytes),
            max(self.branches, other.branches),
        )

    @property
    def macs(self) -> int:
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def flops(self) -> int:
        return 2 * self.macs

    @property
    def operations(self) -> int:
        """BN, activations, pooling, additions, multiplications, upsampling."""
        return sum(kernel.operations for kernel in self.kernels)

    @property
    def uncounted(self) -> dict[str, int]:
        """Calls of each operator whose MACs and operations are unknown."""
        return dict(Counter(f"aten.{k.name}" for k in self.kernels if k.kind == "other"))

    @property
    def access_bytes(self) -> int:
        """Memory access cost of the convolutions alone (see Convolution), in bytes."""
        return sum(k.convolution.access * k.itemsize for k in self.kernels if k.convolution)

    @property
    def elements(self) -> int:
        """Read and written by all kernels."""
        return sum(kernel.elements for kernel in self.kernels)

    @property
    def bytes(self) -> int:
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def intensity(self) -> float:
        """FLOP per byte; 0 where nothing is moved."""
        return self.flops / self.bytes if self.bytes else 0.0

    def elements_of(self, *kinds: str) -> int:
        return sum(kernel.elements for kernel in self.kernels if kernel.kind in kinds)


class ShapesOnly(TorchDispatchMode):
    """While active, element-wise operators on meta tensors only pass on their input's shape.

    Their decomposition in Python would take most of the time of a meta forward.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(func.overloadpacket.__name__)
        if name.rstrip("_") not in {BATCH_NORM, *ACTIVATIONS} or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        result = args[0] if name.endswith("_") else torch.empty_like(args[0])
        if name != BATCH_NORM:
            return result
        none = args[0].new_empty(0)  # mean and deviation of the batch, which evaluation has not
        return result, none, none


class Recorder(ShapesOnly):
    """While active, notes every kernel and the live results under the current label."""

    def __init__(self) -> None:
        super().__init__()
        self._label: int | None = None
        self._kernels: dict[int | None, list[Kernel]] = {}
        self._peaks: dict[int | None, int] = {}
        self._live = 0  # bytes
        self._storages: dict[int, weakref.ref] = {}  # of live results
        self._depths: dict[int, int] = {}  # of the part's results, by storage

    def enter(self, label: int | None, *_: Any) -> None:
        """What follows belongs to this part; usable as a hook."""
        self._label = label
        self._depths.clear()
        self._update_peak()

    def add_live(self, tensor: Tensor) -> None:
        """Count a tensor as live until it is gone; views of one memory count once."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def gone(_: weakref.ref) -> None:
            del self._storages[key]
            self._live -= size

        self._storages[key] = weakref.ref(storage, gone)
        self._live += size
        self._update_peak()

    def cost(self, label: int | None = None) -> Cost:
        kernels = tuple(self._kernels.get(label, ()))
        branches = max(Counter(kernel.depth for kernel in kernels).values(), default=0)
        return Cost(kernels, self._peaks.get(label, 0), branches)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        read, written = list(_tensors((args, kwargs or {}))), list(_tensors(result))
        known = {_key(tensor) for tensor in read}
        fresh = [tensor for tensor in written if _key(tensor) not in known]
        for tensor in fresh:
            self.add_live(tensor)
        name = str(func.overloadpacket.__name__).rstrip("_")  # relu_ counts as relu
        if name.startswith("empty") or not (fresh or func._schema.is_mutable):
            return result  # an allocation or a view
        depth = 1 + max((self._depths.get(key, 0) for key in known), default=0)
        self._depths.update((_key(tensor), depth) for tensor in written)
        kernel = describe(name, args, read=read, written=written, depth=depth)
        self._kernels.setdefault(self._label, []).append(kernel)
        return result

    def _update_peak(self) -> None:
        self._peaks[self._label] = max(self._peaks.get(self._label, 0), self._live)


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, Mapping):
        yield from _tensors(tuple(value.values()))


def _key(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def record(module: nn.Module, recorder: Recorder, *shapes: Sequence[int]) -> None:
    """One forward pass in eval mode on meta tensors of these shapes (batch included).

    The inputs have the weights' dtype (float32 without weights) and live until the end, as their
    caller keeps them.  The module's own weights, mode and device stay as they are.
    """
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.float32)
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # in inference mode composite operators would arrive whole, and uncounted
        with torch.inference_mode(False), torch.no_grad():
            tensors = (*module.named_parameters(), *module.named_buffers())
            weights = {name: tensor.to("meta") for name, tensor in tensors}
            inputs = tuple(torch.empty(tuple(x), dtype=dtype, device="meta") for x in shapes)
            for tensor in inputs:
                recorder.add_live(tensor)
            with recorder:
                torch.func.functional_call(module, weights, inputs)
    finally:
        for part, training in modes:
            part.training = training


def count(module: nn.Module, *shapes: Sequence[int]) -> Cost:
    """Cost of one forward pass of any module in eval mode on inputs of these shapes."""
    recorder = Recorder()
    record(module, recorder, *shapes)
    return recorder.cost()


def parameters(module: nn.Module) -> int:
    """Number of parameters, trainable or not, each counted once."""
    return sum(math.prod(tensor.shape) for tensor in module.parameters())
