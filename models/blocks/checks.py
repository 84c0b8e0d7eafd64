"""Checks and widths that constructors of blocks share; messages name block, value and remedy."""

from __future__ import annotations

from typing import Any


def require_positive(block: str, **values: Any) -> None:
    """ValueError naming the first value that is not an integer of at least 1."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{block}: {name} must be an integer of at least 1, got {value!r}")


def require_flag(block: str, **values: Any) -> None:
    """ValueError naming the first value that is not true or false."""
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(  # noqa: TRY004  a value of a YAML row
                f"{block}: {name} must be true or false, got {value!r}"
            )


def hidden_width(block: str, channels: int, factor: float) -> int:
    """int(channels * factor), or ValueError when that leaves no channel."""
    require_positive(block, channels=channels)
    if isinstance(factor, bool) or not isinstance(factor, int | float):
        raise ValueError(  # noqa: TRY004  a value of a YAML row
            f"{block}: a width must be a number times the channels, got {factor!r}"
        )
    width = int(channels * factor)
    if width < 1:
        raise ValueError(f"{block}: {factor} times {channels} channels leaves none")
    return width


def round_channels(value: float, divisor: int) -> int:
    """Nearest multiple of `divisor`, at least `divisor` and never under 90 % of `value`."""
    rounded = max(divisor, int(value + divisor / 2) // divisor * divisor)
    return rounded + divisor if rounded < 0.9 * value else rounded


def require_groups(block: str, groups: int, **widths: int) -> None:
    """ValueError when a width is not a multiple of `groups`."""
    require_positive(block, groups=groups)
    for name, width in widths.items():
        if width % groups:
            raise ValueError(f"{block}: {name} {width} is not a multiple of groups {groups}")
