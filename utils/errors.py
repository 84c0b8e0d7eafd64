"""Errors that users can fix, exit codes, and the frame that every script runs in."""

from __future__ import annotations

import contextlib
import difflib
import io
import os
import re
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

from utils.terminal import warn

# How long an OpenMP thread that waits keeps its core busy: GNU's (torch on Linux) and LLVM's.
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
# What asks a process to stop; Windows has no SIGHUP.
STOP_SIGNALS = tuple(
    getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)
)
SIMILAR = 0.7  # less alike names are no typing errors
DISPLAY_LIBRARY = re.compile(r"lib(GL|gthread|glib|xcb|X11|SM|Xext|Xrender)[\w.-]*\.so[\w.]*")
DEAD_WORKER = re.compile(r"worker \(pid.*")  # in torch's RuntimeError about a loader process


class FeatherDetError(Exception):
    """Base of the errors that are reported as one line; `exit_code` is what the script returns."""

    exit_code = 1


class UserError(FeatherDetError):
    """Bad input or configuration. The message names file, line, value and remedy."""

    exit_code = 2


class PartlyDoneError(FeatherDetError):
    """Some inputs were skipped (and named); the rest was done."""

    exit_code = 3


class SourceLostError(FeatherDetError):
    """A stream could not be recovered."""

    exit_code = 4


class TerminatedError(BaseException):
    """SIGTERM or SIGHUP arrived.  Like KeyboardInterrupt, `except Exception` does not catch it."""

    def __init__(self, signum: int = signal.SIGTERM) -> None:
        super().__init__("terminated")
        self.exit_code = 128 + signum


def nearest(name: str, known: Iterable[str], *, cutoff: float = SIMILAR) -> str:
    """'; did you mean X?' for the closest known name, or '' when none is similar by `cutoff`."""
    lowered = {item.lower(): item for item in known}
    close = difflib.get_close_matches(name.lower(), lowered, n=1, cutoff=cutoff)
    return f"; did you mean {lowered[close[0]]!r}?" if close else ""


def cause_of(error: BaseException) -> str:
    """The first line of an error, with the type's name unless it was written for users."""
    line = (str(error).splitlines() or [""])[0]
    if isinstance(error, FeatherDetError) and line:
        return line
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


@contextlib.contextmanager
def missing_libraries_named() -> Iterator[None]:
    """Turn the ImportError of an OpenCV without its display libraries into a UserError."""
    try:
        yield
    except ImportError as error:
        found = DISPLAY_LIBRARY.search(str(error))
        if found is None:
            raise
        raise UserError(
            f"OpenCV cannot be imported, {found[0]} is missing: pip uninstall opencv-python, then"
            " pip install opencv-python-headless (without --view-img); or, on Debian and Ubuntu,"
            " apt-get install libgl1 libglib2.0-0"
        ) from error


def _terminate(signum: int, _: object) -> NoReturn:
    raise TerminatedError(signum)


def wait_briefly() -> None:
    """Let OpenMP's waiting threads sleep soon, for processes that import torch after this.

    By default they keep their cores busy for longer than a time slice, and computing threads that
    lost a core to another program wait for it.  What the user has set himself stays.
    """
    if not any(name in os.environ for name in WAITING):
        os.environ.update(GOMP_SPINCOUNT="10000", KMP_BLOCKTIME="1")


def run_script(main: Callable[[list[str] | None], int | None]) -> NoReturn:
    """Run `main(argv)`, print one line for an error, exit with the documented code.

    Exit codes: 0 done, 1 internal error, 2 user error, 3 partly done, 4 source lost, 130 SIGINT,
    129 SIGHUP, 143 SIGTERM.  `--debug` anywhere on the command line adds the traceback.
    """
    wait_briefly()
    argv = sys.argv[1:]
    debug = "--debug" in argv
    argv = [item for item in argv if item != "--debug"]
    signal.signal(signal.SIGTERM, _terminate)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup
        signal.signal(signal.SIGHUP, _terminate)
    sys.stdout = sys.stdout or io.StringIO()  # None where the caller closed it
    sys.stderr = sys.stderr or io.StringIO()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # escapes on a terminal that is not UTF-8
            stream.reconfigure(errors="backslashreplace")
    try:
        with missing_libraries_named():
            code = main(argv) or 0
    except TerminatedError as error:
        code = _report(str(error), error.exit_code, debug)
    except FeatherDetError as error:
        code = _report(f"error: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        code = _report("interrupted", 128 + signal.SIGINT, debug)
    except BrokenPipeError:
        sys.stderr.close()
        code = 1
    except Exception as error:  # the last resort: one line, not a traceback
        hint = "" if debug else " (run again with --debug for the traceback)"
        text = f"internal error: {type(error).__name__}: {error}{hint}"
        code = _report(text, 1, debug)
    sys.exit(code)


def _report(message: str, code: int, debug: bool) -> int:
    """Print the one line of an error, and its traceback with --debug."""
    if debug:
        for line in traceback.format_exc().splitlines():
            warn(line)
    sys.stdout.flush()
    warn(message)
    return code
