"""Text for a terminal, which obeys control characters, wherever the text came from."""

from __future__ import annotations

import sys


def printable(text: str) -> str:
    """Text without what a terminal would obey: control characters become spaces."""
    return "".join(sign if sign.isprintable() else " " for sign in text)


def complain(text: str) -> None:
    """One line on stderr, printable; the bytes of a file name that are no text stay readable."""
    readable = text.encode("utf-8", "backslashreplace").decode()
    sys.stderr.write(printable(readable) + "\n")
