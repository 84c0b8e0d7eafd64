"""The kernels that a forward launches, seen on the meta device, and what lives meanwhile.

As in cost.py, operator by operator as eager execution runs them: each reads its inputs and
writes its results, once, whatever caches may save.  Views move nothing.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from models.profile.cost import FORMULAS, FREE, PER_OUTPUT, CostCounter

# What a kernel is: convolutions, dense layers, operators that compute each element by itself,
# windows and means, those that only move (concatenation, shuffle, upsampling), and unknown ones.
KINDS = ("dense", "group", "depthwise", "linear", "element-wise", "pool", "copy", "other")


@dataclass(frozen=True)
class Convolution:
    """Sizes of a 2-d convolution; pixels (h * w, of the whole batch), window = kernel area."""

    c_in: int
    c_out: int
    pixels_in: int
    pixels_out: int
    window: int = 1
    groups: int = 1

    @property
    def macs(self) -> int:
        """Multiply-adds."""
        return self.pixels_out * self.window * self.c_in * self.c_out // self.groups

    @property
    def access(self) -> int:
        """Memory access cost in elements: input, output and weights (no bias), each once.

        h_in w_in c_in + h_out w_out c_out + k^2 c_in c_out / g; for a 1x1 of one group the paper's
        h w (c_in + c_out) + c_in c_out.
        """
        weights = self.window * self.c_in * self.c_out // self.groups
        return self.pixels_in * self.c_in + self.pixels_out * self.c_out + weights

    @property
    def kind(self) -> str:
        """'depthwise' where each input channel is its own group, 'group' for other groups > 1."""
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.c_in else "group"

    @property
    def pointwise(self) -> bool:
        """1x1, one group, no stride: what G1 speaks of."""
        return self.window == 1 and self.groups == 1 and self.pixels_in == self.pixels_out

    @property
    def least_access(self) -> float:
        """Least access of a 1x1 with the same MACs B: 2 sqrt(hw B) + B / hw (at c_in = c_out)."""
        return 2 * math.sqrt(self.pixels_in * self.macs) + self.macs / self.pixels_in

    @property
    def ungrouped(self) -> Convolution:
        """One group, the same input and the same MACs: c_out / g wide (G2)."""
        return replace(self, c_out=self.c_out // self.groups, groups=1)


@dataclass(frozen=True)
class Kernel:
    """One operator that reads or writes memory; `depth`: its place in the row's longest chain."""

    name: str
    kind: str
    macs: int
    elements: int  # read and written
    bytes: int
    depth: int
    itemsize: int  # bytes of an element of the result
    convolution: Convolution | None = None

    @property
    def flops(self) -> int:
        """2 * MACs."""
        return 2 * self.macs


class KernelRecorder(CostCounter):
    """While active and started, notes each kernel and all live results under the label."""

    def __init__(self) -> None:
        super().__init__()
        self._started = False
        self._kernels: dict[int | None, list[Kernel]] = {}
        self._peaks: dict[int | None, int] = {}
        self._live = 0
        self._storages: dict[int, weakref.ref] = {}  # of what lives
        self._depths: dict[int, int] = {}  # of what the row made, by storage

    def start(self, inputs: Sequence[Tensor]) -> None:
        """Begin to note; the inputs live already."""
        self._started = True
        for tensor in inputs:
            self.hold(tensor)

    def enter(self, label: int | None) -> None:
        """What follows belongs to this row."""
        self.label = label
        self._depths.clear()
        self._touch()

    def hold(self, tensor: Tensor) -> None:
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
        self._touch()

    def kernels(self, label: int | None) -> tuple[Kernel, ...]:
        """What a row launched, in order."""
        return tuple(self._kernels.get(label, ()))

    def peak_bytes(self, label: int | None) -> int:
        """The most that lived while a row ran."""
        return self._peaks.get(label, 0)

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        before = self.cost(self.label).macs
        result = super().__torch_dispatch__(func, types, args, kwargs)
        if self._started:
            self._note(func, args, kwargs or {}, result, self.cost(self.label).macs - before)
        return result

    def _touch(self) -> None:
        self._peaks[self.label] = max(self._peaks.get(self.label, 0), self._live)

    def _note(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any, macs: int
    ) -> None:
        read, written = list(_tensors((args, kwargs))), list(_tensors(result))
        known = {_key(tensor) for tensor in read}
        fresh = [tensor for tensor in written if _key(tensor) not in known]
        for tensor in fresh:
            self.hold(tensor)
        name = str(func.overloadpacket.__name__).rstrip("_")
        if name.startswith("empty") or not (fresh or func._schema.is_mutable):
            return  # an allocation or a view
        depth = 1 + max((self._depths.get(key, 0) for key in known), default=0)
        self._depths.update((_key(tensor), depth) for tensor in written)
        sizes = [(_elements(tensor), tensor.element_size()) for tensor in (*read, *written)]
        convolution = _convolution(args, written[0]) if name == "convolution" else None
        kernel = Kernel(
            name=name,
            kind=convolution.kind if convolution else _kind(name),
            macs=macs,
            elements=sum(count for count, _ in sizes),
            bytes=sum(count * size for count, size in sizes),
            depth=depth,
            itemsize=written[0].element_size(),
            convolution=convolution,
        )
        self._kernels.setdefault(self.label, []).append(kernel)


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


def _elements(tensor: Tensor) -> int:
    """Different ones: an axis of stride 0 repeats the same memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or size == 0)


def _convolution(args: Sequence[Any], out: Tensor) -> Convolution | None:
    image, weight, transposed, groups = args[0], args[1], args[6], args[8]
    if transposed or weight.dim() != 4:
        return None
    return Convolution(
        c_in=image.shape[1],
        c_out=out.shape[1],
        pixels_in=image.numel() // image.shape[1],
        pixels_out=out.numel() // out.shape[1],
        window=weight.shape[2] * weight.shape[3],
        groups=groups,
    )


def _kind(name: str) -> str:
    if name in {"addmm", "mm"}:
        return "linear"
    if name in FREE or name.startswith("upsample"):
        return "copy"
    if name in PER_OUTPUT:
        return "element-wise"
    return "pool" if name in FORMULAS and name != "convolution" else "other"
