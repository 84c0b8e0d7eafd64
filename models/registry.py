"""The blocks a model YAML may name, and what their constructors take.  No torch in here.

`import models.blocks` fills the registry; nothing else does.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from models.blocks.conv import Block

T = TypeVar("T", bound=type)

BLOCKS: dict[str, type[Block]] = {}

# Short keys of a mapping argument, as every YOLO user writes them.
ALIASES: Mapping[str, str] = MappingProxyType({"c": "c_out", "k": "kernel", "s": "stride"})

# Names that YOLOv5's model files take from torch.nn, and the blocks that stand for them here.
YAML_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "nn.Conv2d": "Conv2d",
        "nn.MaxPool2d": "MaxPool",
        "nn.Upsample": "Upsample",
        "nn.ZeroPad2d": "ZeroPad",
    }
)


@dataclass(frozen=True)
class Parameter:
    """One constructor parameter of a block; `default` is None and meaningless when `required`."""

    name: str
    default: Any
    required: bool
    text: bool  # whether a word may be given (the name of an activation, a mode)


def register(cls: T) -> T:
    """Class decorator: enter a block under its own name.

    ValueError when the name is taken, TypeError when the constructor's first parameter is not
    `c_in`.
    """
    if cls.__name__ in BLOCKS:
        raise ValueError(f"block {cls.__name__!r} is already registered")
    names = list(inspect.signature(cls).parameters)
    if not names or names[0] != "c_in":
        raise TypeError(f"block {cls.__name__!r} must take c_in first, takes {names}")
    BLOCKS[cls.__name__] = cls
    return cls


def signature(name: str) -> tuple[Parameter, ...]:
    """Constructor parameters of a registered block after `c_in`, in positional order.

    A parameter `n` means that the block takes the row's repeats itself; positional YAML arguments
    skip it, as in YOLOv5's files.  KeyError for an unknown name.
    """
    parameters = list(inspect.signature(BLOCKS[name]).parameters.values())[1:]
    return tuple(
        Parameter(
            name=parameter.name,
            default=None if parameter.default is parameter.empty else parameter.default,
            required=parameter.default is parameter.empty,
            text=re.search(r"\bstr\b", str(parameter.annotation)) is not None,
        )
        for parameter in parameters
    )


def is_required(parameter: Parameter) -> bool:
    """Whether a row must give it."""
    return parameter.required


def takes_text(name: str, parameter: str) -> bool:
    """Whether the argument of that block may be a word; everything else in a row is a value."""
    return any(item.name == parameter and item.text for item in signature(name))


def ignored(name: str) -> tuple[str, ...]:
    """Parameters of the block it replaces that a `swap` may drop, since they mean nothing here."""
    return BLOCKS[name].ignores


def channel_args(name: str) -> tuple[str, ...]:
    """Parameters that count channels and so follow `width_multiple`."""
    return BLOCKS[name].channel_args


def reads_several(name: str) -> bool:
    """Whether the block takes a list of maps, and `c_in` as a list of widths."""
    return BLOCKS[name].reads_several


def width_out(name: str, c_in: int | list[int], args: Mapping[str, Any]) -> int:
    """Channels that the block delivers for these constructor arguments, without building it."""
    return BLOCKS[name].width_out(c_in, args)
