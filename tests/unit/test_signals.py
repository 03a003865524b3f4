"""How commands end: signals become exceptions, beside a library too that takes the handler of SIGINT away."""

import os
import signal
import subprocess
import sys
import textwrap

import pytest

from llavanext_cli import signals

TAKEN = textwrap.dedent("""
    import ctypes, os, sys, threading, time
    from llavanext_cli import signals

    libc = ctypes.CDLL(None)
    with signals.route_sigint():
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()  # one of a library
        with signals.defer_signals():
            libc.signal(2, 0)  # SIG_DFL, as far as the kernel is concerned
            print("ready", flush=True)
            time.sleep(0.5)
            print("through", flush=True)
        sys.exit("not reached")
""")


WAITING = textwrap.dedent("""
    import os, signal, threading
    from llavanext_cli import signals

    def state():
        return signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGURG), signal.pthread_sigmask(0, [])

    before = state()
    reader, writer = os.pipe()
    try:
        with signals.route_sigint():
            threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
            os.read(reader, 1)
    except KeyboardInterrupt:
        assert state() == before
        print("interrupted")
""")


ENDINGS = (signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(params=ENDINGS)
def number(request):
    """A signal that ends, as it is outside of nohup."""
    before = signal.signal(request.param, signal.SIG_DFL)
    yield request.param
    assert signal.signal(request.param, before) == signal.SIG_DFL


def test_a_command_ends_with_the_code_of_its_signal(number):
    with pytest.raises(SystemExit) as caught, signals.raise_on_termination():
        os.kill(os.getpid(), number)
    assert caught.value.code == 128 + number


def test_training_is_interrupted_and_learns_by_which_signal(number):
    with pytest.raises(KeyboardInterrupt) as caught, signals.raise_on_termination(KeyboardInterrupt):
        os.kill(os.getpid(), number)
    assert caught.value.args == (number,)


def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    try:
        with signals.raise_on_termination():
            os.kill(os.getpid(), number)
    finally:
        assert signal.signal(number, signal.SIG_DFL) == signal.SIG_IGN


def test_the_work_that_is_held_is_finished_and_then_interrupted():
    command = [sys.executable, "-c", TAKEN]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        told, fault = process.communicate(timeout=30)
    assert told == "through\n"
    assert fault.splitlines()[-1] == "KeyboardInterrupt"


def test_a_wait_is_interrupted_and_all_is_as_before():
    done = subprocess.run([sys.executable, "-c", WAITING], capture_output=True, text=True, timeout=30, check=False)
    assert done.stdout == "interrupted\n", done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_replaces_what_it_broke(number):
    def leave(number, frame):
        raise SystemExit(number)

    before = signal.signal(number, leave)
    try:
        with pytest.raises(SystemExit), signals.defer_signals():
            signal.raise_signal(number)
            raise ImportError("initialization failed")
        assert signal.getsignal(number) is leave
    finally:
        signal.signal(number, before)
