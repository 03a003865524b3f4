"""Signals that end a command become exceptions, and are what they were before afterwards."""

import os
import signal

import pytest

from llavanext_cli.ending import tidied_when_ended
from llavanext_cli.training.processes import interrupted_when_ended

ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(params=ENDINGS)
def number(request):
    """A signal that ends, as it is outside of nohup."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    assert signal.signal(request.param, before) == signal.SIG_DFL


def test_a_command_ends_with_the_code_of_its_signal(number):
    with pytest.raises(SystemExit) as caught, tidied_when_ended():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number


def test_workers_are_told_by_an_interrupt_that_says_which_signal_it_was(number):
    with pytest.raises(KeyboardInterrupt), interrupted_when_ended() as seen:
        assert seen["signal"] == signal.SIGINT
        os.kill(os.getpid(), number)
    assert seen["signal"] == number


def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    try:
        with tidied_when_ended():
            os.kill(os.getpid(), number)
    finally:
        assert signal.signal(number, signal.SIG_DFL) == signal.SIG_IGN
