"""The blocks a model YAML may name: their base class, their arguments, and how a row is built.

`import models.blocks` fills the registry; nothing else does.
"""

from __future__ import annotations

import inspect
import types
import typing
from abc import ABC, abstractmethod
from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import torch
from torch import Tensor, nn

T = TypeVar("T", bound="type[Block] | type[Head]")


@dataclass(frozen=True)
class Range:
    """Numbers from `min` to `max`, odd ones only where asked."""

    min: float
    max: float = 1_000_000
    odd: bool = False

    def __contains__(self, value: float) -> bool:
        return self.min <= value <= self.max and (not self.odd or value % 2 == 1)

    def __str__(self) -> str:
        return f"{'odd, ' if self.odd else ''}{self.min:,} to {self.max:,}"


Positive = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
Count = Annotated[int, Range(1, 1000)]  # of layers; the deepest published stage has some forty
Odd = Annotated[int, Range(1, odd=True)]  # kernel of a convolution or pooling that keeps the size
Factor = Annotated[float, Range(0)]  # of channels
Ratio = Annotated[float, Range(0, 1)]
Act = str | bool  # true: the model's activation; false: none; or a name, see `blocks.conv`


def check(name: str, value: Any, annotation: Any) -> None:
    """ValueError naming the argument unless `value` (of plain types) is of the annotated type."""
    if not _fits(value, annotation):
        raise ValueError(f"{name} must be {_describe(annotation)}, got {value!r}")


def _fits(value: Any, annotation: Any) -> bool:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _fits(value, parts[0]) and value in parts[1]
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin in (tuple, Sequence):
        sized = isinstance(value, tuple | list) and value
        counted = sized and (origin is Sequence or len(value) == len(parts))
        return bool(counted) and all(_fits(item, parts[0]) for item in value)
    return type(value) in ((int, float) if annotation is float else (annotation,))


def _describe(annotation: Any) -> str:
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return f"{_describe(parts[0])} ({parts[1]})"
    if origin is Literal:
        return " or ".join(map(str, parts))
    if origin in (Union, types.UnionType):
        return " or ".join(map(_describe, parts))
    if origin is tuple:
        return f"a list of {len(parts)}, each {_describe(parts[0])}"
    if origin is Sequence:
        return f"a list, each {_describe(parts[0])}"
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "a name"}
    return words.get(annotation, "None")


def hidden_width(channels: int, factor: float) -> int:
    """int(channels * factor), or ValueError when that leaves no channel."""
    width = int(channels * factor)
    if width < 1:
        raise ValueError(f"{factor} times {channels} channels leaves none")
    return width


def must_divide(divisor: int, **values: int) -> None:
    """ValueError naming the first value that is not a multiple of `divisor`."""
    for name, value in values.items():
        if value % divisor:
            raise ValueError(f"{name} must be a multiple of {divisor}, got {value}")


class Block(nn.Module):
    """Base of everything a row of a model YAML may name.

    The constructor takes `c_in` first (a list of widths where `reads_several`) and gives `c_out`,
    its argument of that name where it has one, to this one.  Its annotations are checked before it
    is called with values of a file; it raises ValueError for what they cannot express.

    `ignores`: arguments of the block it replaces that a swap may drop; `channel_args`: arguments
    that follow the width multiple; `arguments`: all after `c_in` in positional order, set by
    `register`.  An argument `n` means that the block takes the row's repeats itself; positional
    arguments of a row skip it, as in YOLOv5's files.
    """

    arguments: ClassVar[Mapping[str, Parameter]]
    ignores: ClassVar[tuple[str, ...]] = ()
    channel_args: ClassVar[tuple[str, ...]] = ("c_out",)
    reads_several: ClassVar[bool] = False
    add: bool = False  # whether the input is added to the output

    def __init__(self, c_out: int = 0) -> None:  # 0: torch's own layers do not pass it on
        super().__init__()
        self.c_out = c_out

    def forward(self, x: Any) -> Any:
        """The parts one after another, in the order of assignment; plus the input where `add`."""
        y = x
        for part in self.children():
            y = part(y)
        return x + y if self.add else y

    def fuse_(self) -> None:
        """Fold this block's own BN into its own convolution, where one directly follows the other.

        Children are not touched: `fuse` walks the tree.
        """


class Head(nn.Module, ABC):
    """Base of what the last row of a detector may name.

    The constructor takes the widths of the maps that it reads and, by keyword, `classes`; its other
    arguments are the row's, checked and scaled as those of a Block.  No part of it but its loss
    (`models.losses.build`) is known by name elsewhere.
    """

    arguments: ClassVar[Mapping[str, Parameter]]
    ignores: ClassVar[tuple[str, ...]] = ()
    channel_args: ClassVar[tuple[str, ...]] = ()
    losses: ClassVar[tuple[str, str, str]]  # the parts of its loss
    classes: int
    stride: tuple[int, ...] = ()  # set by the builder, which measures it
    end_to_end: bool = False  # whether its boxes need no suppression

    def set_stride(self, stride: Sequence[int], anchors: Sequence[Sequence[float]] | int) -> None:
        """Fix the levels' strides in pixels, and from them the first biases."""
        self.stride = tuple(stride)

    def deployed(self, *, nms: bool) -> Head:
        """What inference needs of it; of two branches the one with NMS, or the end-to-end one."""
        return self

    @property
    def layout(self) -> tuple[int, ...]:
        """What its outputs mean: those of another head fit only where this is the same."""
        return (self.classes,)

    @abstractmethod
    def decode(self, raw: Sequence[Tensor], conf: float) -> tuple[Tensor, Tensor, Tensor]:
        """Raw maps -> what may score over `conf`, of all images.

        Image (M,) of each, box (M, 4) in xyxy network pixels, scores (M, classes); float32.  What
        is not a number is kept, so that it is noticed.
        """

    @abstractmethod
    def dense(self, raw: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Raw maps -> the boxes (B, N, 4) and scores (B, N, classes) of all cells, as in `decode`.

        Without shapes that depend on values, for other runtimes.
        """

    def predict(self, convolution: nn.Module, feature: Tensor) -> Tensor:
        """The last convolution of a level; in evaluation in the type of its weights.

        Autocast would round the scores to ties there.
        """
        dtype = next(convolution.parameters()).dtype
        if self.training or feature.dtype == dtype:
            return convolution(feature)
        with torch.autocast(feature.device.type, enabled=False):
            return convolution(feature.to(dtype))


BLOCKS: dict[str, type[Block]] = {}
HEADS: dict[str, type[Head]] = {}
ROWS: Mapping[str, Any] = ChainMap(BLOCKS, HEADS)  # all a row may name

# Short keys of a mapping argument, as every YOLO user writes them.
ALIASES = {"c": "c_out", "k": "kernel", "s": "stride"}

# Names that YOLOv5's model files take from torch.nn, and the blocks that stand for them here.
YAML_NAMES = {
    "nn.Conv2d": "Conv2d",
    "nn.ConvTranspose2d": "ConvTranspose2d",
    "nn.MaxPool2d": "MaxPool",
    "nn.Upsample": "Upsample",
    "nn.ZeroPad2d": "ZeroPad",
}


def register(cls: T) -> T:
    """Class decorator: enter a block or head under its own name.  ValueError when it is taken."""
    if cls.__name__ in ROWS:
        raise ValueError(f"block {cls.__name__!r} is already registered")
    _, *others = inspect.signature(cls).parameters.values()
    if issubclass(cls, Head):  # what the builder gives is no argument of the row
        others = [item for item in others if item.kind is not Parameter.KEYWORD_ONLY]
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    cls.arguments = {item.name: item.replace(annotation=hints[item.name]) for item in others}
    if issubclass(cls, Head):
        HEADS[cls.__name__] = cls
    else:
        BLOCKS[cls.__name__] = cls
    return cls


def build(
    name: str, inputs: list[int], repeats: int, args: Mapping[str, Any]
) -> tuple[nn.Module, int]:
    """The module of a row that reads maps of `inputs` channels, and the channels that it delivers.

    A block that takes no `n` is stacked `repeats` times.  ValueError or TypeError for arguments
    that are impossible.
    """
    if name not in BLOCKS:
        raise ValueError("unknown block")
    block: Any = BLOCKS[name]
    for key, value in args.items():
        if key in block.arguments:
            check(key, value, block.arguments[key].annotation)
    check("number", repeats, Count)
    if not block.reads_several and len(inputs) != 1:
        raise ValueError(f"reads one row, got {len(inputs)}")
    c_in: Any = inputs if block.reads_several else inputs[0]
    if "n" in block.arguments:
        module = block(c_in, n=repeats, **args)
        return module, module.c_out
    stack: list[Block] = []
    for _ in range(repeats):
        stack.append(block(c_in, **args))
        c_in = stack[-1].c_out
    return (stack[0] if repeats == 1 else nn.Sequential(*stack)), int(c_in)
