import os
import signal

import pytest

from engine.train import interrupts
from engine.train.interrupts import stop_requests
from utils.errors import TerminatedError


def test_a_signal_is_noted_and_handlers_return():
    before = signal.getsignal(signal.SIGTERM)
    with stop_requests() as request:
        assert request.signal == 0
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)  # a moment later: not insisting
        assert request.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_aborts_what_changes_no_state():
    with stop_requests() as request:
        with pytest.raises(KeyboardInterrupt), request.may_abort():
            os.kill(os.getpid(), signal.SIGINT)
        assert request.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt), request.may_abort():
            raise AssertionError("must not begin after a signal")


def test_insisting_is_obeyed_at_once(monkeypatch):
    monkeypatch.setattr(interrupts, "INSISTING", -1.0)
    with stop_requests():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(TerminatedError) as caught:
            os.kill(os.getpid(), signal.SIGTERM)
    assert caught.value.exit_code == 143


def test_a_closed_terminal_stops_a_run_unless_nohup_started_it():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal == signal.SIGHUP
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        with stop_requests() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert request.signal == 0
    finally:
        signal.signal(signal.SIGHUP, before)
