"""Kernels of a forward pass: what one operator computes and moves through memory.

Operator by operator, as eager execution runs them:

- multiply-adds (MACs): convolutions and matrix products, of the model as it is (unfused: BN apart).
- operations, by output element: BN 2 (scale, shift); activations, additions, multiplications and
  nearest upsampling 1; softmax 5; bilinear upsampling 7; max-pool k^2 - 1 comparisons; average
  pool k^2; a mean one per *input* element; the bias of a convolution or linear layer 1.
- copies, concatenation, padding and allocations cost no operation; views are no kernels at all.
- memory: inputs are read and results written once, whatever caches may save.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

BATCH_NORM = "native_batch_norm"
ACTIVATIONS = (
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "sigmoid", "silu", "tanh",
)  # fmt: skip
MOVES = (
    "_reshape_alias", "_to_copy", "_unsafe_view", "cat", "channel_shuffle", "clone",
    "constant_pad_nd", "contiguous", "copy", "native_channel_shuffle", "reshape", "stack",
)  # fmt: skip

Work = tuple[int, int]  # MACs, other operations


def _per_output(operations: int) -> Callable[[Sequence[Any], int], Work]:
    return lambda _, outputs: (0, operations * outputs)


# kind and work of (arguments, number of output elements)
OPERATORS: Mapping[str, tuple[str, Callable[[Sequence[Any], int], Work]]] = {
    "addmm": ("linear", lambda args, outputs: (outputs * args[1].shape[1], outputs)),
    "mm": ("linear", lambda args, outputs: (outputs * args[0].shape[1], 0)),
    "bmm": ("linear", lambda args, outputs: (outputs * args[0].shape[2], 0)),
    "_safe_softmax": ("element-wise", _per_output(5)),
    "max_pool2d_with_indices": (
        "pool",
        lambda args, outputs: (0, outputs * (args[1][0] * args[1][-1] - 1)),
    ),
    "avg_pool2d": ("pool", lambda args, outputs: (0, outputs * args[1][0] * args[1][-1])),
    "mean": ("pool", lambda args, _: (0, args[0].numel())),
    BATCH_NORM: ("element-wise", _per_output(2)),
    **dict.fromkeys((*ACTIVATIONS, "add", "sub", "mul", "div"), ("element-wise", _per_output(1))),
    "upsample_nearest2d": ("copy", _per_output(1)),
    "upsample_bilinear2d": ("copy", _per_output(7)),  # 4 multiplications, 3 additions
    **dict.fromkeys(MOVES, ("copy", _per_output(0))),
}


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
    def weights(self) -> int:
        """k^2 c_in c_out / g."""
        return self.window * self.c_in * self.c_out // self.groups

    @property
    def macs(self) -> int:
        return self.pixels_out * self.weights

    @property
    def access(self) -> int:
        """Memory access cost in elements: input, output and weights (no bias), each once.

        For a 1x1 of one group the paper's h w (c_in + c_out) + c_in c_out.
        """
        return self.pixels_in * self.c_in + self.pixels_out * self.c_out + self.weights

    @property
    def kind(self) -> str:
        """'depthwise' where each input channel is its own group, 'group' for other groups > 1."""
        if self.groups == 1:
            return "dense"
        return "depthwise" if self.groups == self.c_in else "group"

    @property
    def pointwise(self) -> bool:
        """1x1, one group, no stride: the subject of G1."""
        return self.window == 1 and self.groups == 1 and self.pixels_in == self.pixels_out

    @property
    def min_access(self) -> float:
        """Minimum of a 1x1 with the same MACs B: 2 sqrt(hw B) + B / hw (at c_in = c_out)."""
        return 2 * math.sqrt(self.pixels_in * self.macs) + self.macs / self.pixels_in

    @property
    def ungrouped(self) -> Convolution:
        """One group, the same input and the same MACs: c_out / g wide (G2)."""
        return replace(self, c_out=self.c_out // self.groups, groups=1)


@dataclass(frozen=True)
class Kernel:
    """One operator that reads or writes memory; `depth`: its position in the longest chain.

    Kinds: dense, group and depthwise convolutions; linear; element-wise; pool (windows and means);
    copy (operators that only move data: concatenation, shuffle, upsampling); other (unknown).
    """

    name: str
    kind: str
    macs: int
    operations: int  # besides MACs
    elements: int  # read and written
    bytes: int
    depth: int
    itemsize: int  # bytes of an element of the result
    convolution: Convolution | None = None

    @property
    def flops(self) -> int:
        return 2 * self.macs


def describe(
    name: str, args: Sequence[Any], *, read: Sequence[Tensor], written: Sequence[Tensor], depth: int
) -> Kernel:
    """The kernel of an ATen operator (without a trailing _) that was called with `args`."""
    convolution, kind, work = None, "other", (0, 0)
    if name == "convolution" and not args[6] and args[1].dim() == 4:  # not transposed, 2-d
        image, weight, out = args[0], args[1], written[0]
        convolution = Convolution(
            c_in=image.shape[1],
            c_out=out.shape[1],
            pixels_in=image.numel() // image.shape[1],
            pixels_out=out.numel() // out.shape[1],
            window=weight.shape[2] * weight.shape[3],
            groups=args[8],
        )
        bias = 0 if args[2] is None else out.numel()
        kind, work = convolution.kind, (convolution.macs, bias)
    elif name == "convolution" and args[6] and args[1].dim() == 4:  # transposed: by input pixel
        kind = "dense" if args[8] == 1 else "group"
        pixels, bias = args[0].numel() // args[0].shape[1], 0 if args[2] is None else 1
        work = (pixels * args[1].numel(), bias * written[0].numel())
    elif name in OPERATORS:
        kind, formula = OPERATORS[name]
        work = formula(args, written[0].numel())
    sizes = [(_elements(tensor), tensor.element_size()) for tensor in (*read, *written)]
    return Kernel(
        name=name,
        kind=kind,
        macs=work[0],
        operations=work[1],
        elements=sum(count for count, _ in sizes),
        bytes=sum(count * size for count, size in sizes),
        depth=depth,
        itemsize=written[0].element_size(),
        convolution=convolution,
    )


def _elements(tensor: Tensor) -> int:
    """Different ones: an axis of stride 0 repeats the same memory."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return math.prod(size for size, stride in sizes if stride or size == 0)
