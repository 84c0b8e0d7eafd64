"""What torchrun's environment states about this process; imports no torch."""

from __future__ import annotations

import os

from utils.terminal import say, warn


def is_main_rank() -> bool:
    """Whether this process prints for all ranks (torchrun's RANK is 0 or not set)."""
    return os.environ.get("RANK", "0") == "0"


def local_ranks() -> int:
    """How many ranks share this machine (torchrun's LOCAL_WORLD_SIZE), at least 1."""
    text = os.environ.get("LOCAL_WORLD_SIZE", "")
    return max(int(text), 1) if text.isdecimal() else 1


def say_main(text: str) -> None:
    """Print readable lines on stdout, from the main rank only."""
    if is_main_rank():
        say(text)


def warn_main(text: str) -> None:
    """Print one readable line on stderr, from the main rank only."""
    if is_main_rank():
        warn(text)
