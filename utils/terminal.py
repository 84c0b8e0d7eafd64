"""Printing. Text from files may hold control characters, which a terminal would obey.

`say` and `warn` are the records of one logger, whose own handler writes them to the terminal.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import sys
import unicodedata
from collections.abc import Iterable
from typing import Any


def printable(text: str) -> str:
    """The text with control characters and line ends replaced by spaces."""
    # Python counts the spaces of other widths and scripts (Zs) as unprintable
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else " " for c in text)


def readable(text: str) -> str:
    """The text printable, and undecodable bytes of file names as \\udc80."""
    return printable(text.encode("utf-8", "backslashreplace").decode())


def formatted(value: float, form: str) -> str:
    """`format(value, form)` of a number or a share, where a zero has no sign."""
    text = format(value, form)
    return text if text.strip("+-0.%") else text.lstrip("+-")


class Terminal(logging.Handler):
    """Information on stdout, warnings on stderr; an error in writing is the caller's."""

    def emit(self, record: logging.LogRecord) -> None:
        """The text alone, above the progress bars."""
        stream = sys.stderr if record.levelno >= logging.WARNING else sys.stdout
        bars = sys.modules.get("tqdm")  # not imported for the sake of a line
        with bars.tqdm.external_write_mode(stream) if bars else contextlib.nullcontext():
            stream.write(record.getMessage() + "\n")
            stream.flush()


def _logger() -> logging.Logger:
    """The logger named featherdet; a program that has set it up already keeps its setting."""
    logger = logging.getLogger("featherdet")
    if not logger.handlers and logger.propagate and logger.level == logging.NOTSET:
        logger.addHandler(Terminal())
        logger.propagate = False
        logger.setLevel(logging.INFO)
    return logger


LOGGER = _logger()


def warn(text: str) -> None:
    """Print one readable line on stderr: warnings, errors, progress."""
    LOGGER.warning("%s", readable(text))


warn_once = functools.cache(warn)  # the same text only once in this process


def say(text: str) -> None:
    """Print readable lines on stdout: results."""
    LOGGER.info("%s", "\n".join(map(readable, text.split("\n"))))


def is_main_rank() -> bool:
    """Whether this process prints for all ranks (torchrun's RANK is 0 or not set)."""
    return os.environ.get("RANK", "0") == "0"


def warn_main(text: str) -> None:
    """`warn`, from the main rank only."""
    if is_main_rank():
        warn(text)


def say_main(text: str) -> None:
    """`say`, from the main rank only."""
    if is_main_rank():
        say(text)


def progress(
    title: str, items: Iterable[Any] | None = None, *, total: int | None = None, hide: bool = False
) -> Any:
    """A tqdm bar on stderr that is gone at its end; nothing where stderr is not a terminal."""
    from tqdm import tqdm  # here, since --help needs none

    return tqdm(
        items,
        title,
        total=total,
        dynamic_ncols=True,
        mininterval=0.5,
        leave=False,
        disable=True if hide else None,
    )
