"""Text for a terminal."""

import io
import logging
import subprocess
import sys

import pytest
from tqdm import tqdm

from utils.terminal import printable, say, warn


@pytest.mark.parametrize("text", ["red cell", "細胞\u3000赤", "globule\u00a0rouge", "é", ""])
def test_spaces_of_all_scripts_stay(text):
    assert printable(text) == text


@pytest.mark.parametrize("sign", ["\x1b", "\n", "\r", "\x9b", "\u2028", "\u202e", "\ud800", "\0"])
def test_what_a_terminal_obeys_goes(sign):
    assert printable(f"a{sign}b") == "a b"


def test_what_is_said_on_either_stream_is_readable(capsys):
    say("a\x1b[31m\nb\u202e \udcff")
    warn("a\x1b[31m\nb")
    told = capsys.readouterr()
    assert told.out == "a [31m\nb  \\udcff\n"
    assert told.err == "a [31m b\n"


def test_the_logger_serves_programs(capsys):
    """Its level silences lines, its handler can be taken away, and the root logger gets them."""
    logger, root, text = logging.getLogger("featherdet"), logging.getLogger(), io.StringIO()
    handlers, own = list(logger.handlers), logging.StreamHandler(text)
    own.setFormatter(logging.Formatter("%(name)s %(levelname)s %(message)s"))
    root.addHandler(own)
    try:
        logger.setLevel(logging.WARNING)
        say("hidden")
        warn("seen 100 %s")
        logger.handlers.clear()
        logger.propagate = True
        logger.setLevel(logging.INFO)
        say("told")
    finally:
        root.removeHandler(own)
        logger.handlers[:], logger.propagate = handlers, False
        logger.setLevel(logging.INFO)
    assert capsys.readouterr() == ("", "seen 100 %s\n")
    assert text.getvalue() == "featherdet INFO told\n"


def test_a_line_stands_above_a_progress_bar(capsys):
    with tqdm(total=2, file=sys.stderr, ascii=True) as bar:
        warn("line")
        bar.update()
    assert "\r" in capsys.readouterr().err.partition("line\n")[0]


def test_the_setting_of_a_program_stays(root):
    code = (
        "import logging\nlogging.basicConfig(format='%(name)s: %(message)s')\n"
        "logging.getLogger('featherdet').setLevel(logging.INFO)\n"
        "from utils.terminal import say\nsay('a line')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("", "featherdet: a line\n")
