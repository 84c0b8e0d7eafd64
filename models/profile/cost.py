"""What a forward costs: multiply-adds of convolutions and linear layers, and all else apart.

Counted on the meta device (shapes, no pixels) by the operators that really run, so that nothing
functional escapes and what is unknown is named:

- multiply-adds (MACs): Conv2d and Linear, of the model as it stands (unfused: BN apart).
- operations, by output element: BN 2 (scale, shift); activations, additions, multiplications and
  nearest upsampling 1; bilinear upsampling 7; max-pool k^2 - 1 comparisons; average pool k^2;
  a mean one per *input* element; the bias of a convolution or linear layer 1.
- views, copies, concatenation, splits and padding cost no operation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

# Views, copies, concatenation, splits, padding, allocation.
FREE = frozenset(
    {
        "_reshape_alias", "_to_copy", "_unsafe_view", "alias", "as_strided", "cat",
        "channel_shuffle", "chunk", "clone", "constant_pad_nd", "contiguous", "copy", "detach",
        "empty", "expand", "native_channel_shuffle", "permute", "reshape", "select", "slice",
        "split", "split_with_sizes", "squeeze", "stack", "t", "transpose", "unflatten",
        "unsqueeze", "view",
    }
)  # fmt: skip
BATCH_NORM = "native_batch_norm"
ACTIVATIONS = (
    "hardsigmoid", "hardswish", "hardtanh", "leaky_relu", "mish", "relu", "sigmoid", "silu", "tanh",
)  # fmt: skip
SAME_SHAPE = frozenset({BATCH_NORM, *ACTIVATIONS})
PER_OUTPUT: Mapping[str, int] = MappingProxyType(
    {
        **dict.fromkeys(("add", "sub", "mul", "div", "upsample_nearest2d"), 1),
        **dict.fromkeys(ACTIVATIONS, 1),
        BATCH_NORM: 2,
        "upsample_bilinear2d": 7,  # four multiplications, three additions
    }
)


@dataclass(frozen=True)
class Cost:
    """Multiply-adds, other operations, and calls per operator that nobody could count."""

    macs: int = 0
    operations: int = 0
    uncounted: Mapping[str, int] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        uncounted = Counter(self.uncounted) + Counter(other.uncounted)
        return Cost(self.macs + other.macs, self.operations + other.operations, dict(uncounted))


def _convolution(args: Sequence[Any], out: Tensor) -> Cost | None:
    weight, bias, transposed = args[1], args[2], args[6]
    if transposed or weight.dim() != 4:
        return None
    return Cost(out.numel() * weight[0].numel(), 0 if bias is None else out.numel())


def _addmm(args: Sequence[Any], out: Tensor) -> Cost:
    return Cost(out.numel() * args[1].shape[1], out.numel())


def _mm(args: Sequence[Any], out: Tensor) -> Cost:
    return Cost(out.numel() * args[0].shape[1])


def _window(args: Sequence[Any]) -> int:
    kernel = args[1]
    return kernel[0] * kernel[-1]


def _max_pool(args: Sequence[Any], out: Tensor) -> Cost:
    return Cost(0, out.numel() * (_window(args) - 1))


def _average_pool(args: Sequence[Any], out: Tensor) -> Cost:
    return Cost(0, out.numel() * _window(args))


def _mean(args: Sequence[Any], out: Tensor) -> Cost:
    return Cost(0, args[0].numel())


FORMULAS: Mapping[str, Callable[[Sequence[Any], Tensor], Cost | None]] = MappingProxyType(
    {
        "convolution": _convolution,
        "addmm": _addmm,
        "mm": _mm,
        "max_pool2d_with_indices": _max_pool,
        "avg_pool2d": _average_pool,
        "mean": _mean,
    }
)


class ShapesOnly(TorchDispatchMode):
    """While active, element-wise operators on meta tensors only hand on their input's shape.

    Their decomposition in Python would take most of the time of a meta forward.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        name = str(func.overloadpacket.__name__)
        if name.rstrip("_") not in SAME_SHAPE or not args[0].is_meta:
            return func(*args, **(kwargs or {}))
        result = args[0] if name.endswith("_") else torch.empty_like(args[0])
        if name != BATCH_NORM:
            return result
        none = args[0].new_empty(0)  # mean and deviation of the batch, which evaluation has not
        return result, none, none


class CostCounter(ShapesOnly):
    """While active, adds up the cost of every operator under the current `label`."""

    def __init__(self) -> None:
        super().__init__()
        self.label: int | None = None
        self.costs: dict[int | None, Cost] = {}

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = super().__torch_dispatch__(func, types, args, kwargs)
        self.costs[self.label] = self.cost(self.label) + _cost(func, args, result)
        return result

    def cost(self, label: int | None) -> Cost:
        """What was counted under a label."""
        return self.costs.get(label, Cost())


def _cost(func: Any, args: Sequence[Any], result: Any) -> Cost:
    name = str(func.overloadpacket.__name__).rstrip("_")  # relu_ costs what relu costs
    if name in FREE:
        return Cost()
    out = result[0] if isinstance(result, (tuple, list)) else result
    if name in PER_OUTPUT:
        return Cost(0, PER_OUTPUT[name] * out.numel())
    counted = FORMULAS[name](args, out) if name in FORMULAS else None
    return Cost(uncounted={f"aten.{name}": 1}) if counted is None else counted


def run_on_meta(module: nn.Module, *inputs: Any) -> Any:
    """`module(*inputs)` in eval mode with every weight replaced by its shape.

    Inputs are meta tensors or lists of them.  The module's own weights, mode and device stay as
    they are.
    """
    shapes = {
        name: tensor.to("meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        # composite operators would arrive whole, and uncounted, in inference mode
        with torch.inference_mode(False), torch.no_grad():
            return torch.func.functional_call(module, shapes, inputs)
    finally:
        for part, training in modes:
            part.training = training


def count(module: nn.Module, *shapes: Sequence[int]) -> Cost:
    """Cost of one forward in eval mode on float inputs of these shapes (batch included)."""
    inputs = [torch.empty(tuple(shape), device="meta") for shape in shapes]
    counter = CostCounter()
    with counter:
        run_on_meta(module, *inputs)
    return counter.cost(None)


def parameters(module: nn.Module) -> int:
    """Trainable or not, each counted once."""
    return sum(math.prod(tensor.shape) for tensor in module.parameters())
