"""Text for a terminal."""

import pytest

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
