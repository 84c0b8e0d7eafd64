"""The blocks a model YAML may name: their base class, their arguments, and how a row is built.

`import models.blocks` fills the registry; nothing else does.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from inspect import Parameter
from typing import Any, ClassVar, TypeVar

from torch import nn

from models.arguments import Count, check

T = TypeVar("T", bound="type[Block]")


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

    def __init__(self, c_out: int = 0) -> None:  # 0: torch's own layers do not pass it on
        super().__init__()
        self.c_out = c_out

    def forward(self, x: Any) -> Any:
        """The parts one after another, in the order of their assignment."""
        for part in self.children():
            x = part(x)
        return x

    def fuse_(self) -> None:
        """Fold this block's own BN into its own convolution, where one directly follows the other.

        Children are not touched: `fuse` walks the tree.
        """


BLOCKS: dict[str, type[Block]] = {}

# Short keys of a mapping argument, as every YOLO user writes them.
ALIASES = {"c": "c_out", "k": "kernel", "s": "stride"}

# Names that YOLOv5's model files take from torch.nn, and the blocks that stand for them here.
YAML_NAMES = {
    "nn.Conv2d": "Conv2d",
    "nn.MaxPool2d": "MaxPool",
    "nn.Upsample": "Upsample",
    "nn.ZeroPad2d": "ZeroPad",
}


def register(cls: T) -> T:
    """Class decorator: enter a block under its own name.  ValueError when the name is taken."""
    if cls.__name__ in BLOCKS:
        raise ValueError(f"block {cls.__name__!r} is already registered")
    _, *others = inspect.signature(cls).parameters.values()
    hints = typing.get_type_hints(cls.__init__, include_extras=True)
    cls.arguments = {item.name: item.replace(annotation=hints[item.name]) for item in others}
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
