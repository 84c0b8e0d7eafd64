"""Text for a terminal, which obeys control characters, wherever the text came from."""

from __future__ import annotations

import sys
import unicodedata


def is_printable(text: str) -> bool:
    """Whether there is nothing in it that a terminal would obey: control characters, line ends."""
    return all(map(_harmless, text))


def printable(text: str) -> str:
    """Text without what a terminal would obey: control characters become spaces."""
    return "".join(sign if _harmless(sign) else " " for sign in text)


def _harmless(sign: str) -> bool:
    # Python counts the spaces of other widths and scripts as unprintable
    return sign.isprintable() or unicodedata.category(sign) == "Zs"


def readable(text: str) -> str:
    """Printable, and the bytes of a file name that are no text as \\udc80."""
    return printable(text.encode("utf-8", "backslashreplace").decode())


def warn(text: str) -> None:
    """One readable line on stderr."""
    sys.stderr.write(readable(text) + "\n")


def say(text: str) -> None:
    """Readable lines on stdout; progress bars go to stderr."""
    sys.stdout.write("\n".join(map(readable, text.split("\n"))) + "\n")
    sys.stdout.flush()
