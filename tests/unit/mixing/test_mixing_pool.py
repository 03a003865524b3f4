"""Worker processes: every result arrives, and no hang, crash or bug goes unnoticed. This module is the work."""

from __future__ import annotations

import os
import signal
import time

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.pool import Lost, Pool


def prepare(context):
    return context


def double(context, item):
    return context + 2 * item


def misbehave(context, item):
    if item == "hang":
        time.sleep(60)
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "chatter":
        os.write(1, b"noise\n")
        os.write(2, b"noise\n")
    return item


def fail(context, item):
    raise DataError("the file is odd", "look at it", details=["line 1"])


def stumble(context, item):
    return 1 // item


def sleep(context, item):
    time.sleep(item)
    return os.getpid()


@pytest.mark.parametrize("count", [1, 3])
def test_every_item_is_answered(count):
    with Pool(__name__, 100, count) as pool:
        for number in range(20):
            pool.submit(number, "double", range(number, number + number % 4))
        found = {(key, index): value for key, index, value in pool.results()}
    assert found == {(n, index): 100 + 2 * (n + index) for n in range(20) for index in range(n % 4)}


def test_more_may_be_submitted_on_the_way():
    found = []
    with Pool(__name__, 0, 2) as pool:
        pool.submit("a", "double", [1])
        for key, _, value in pool.results():
            found.append((key, value))
            if value < 16:
                pool.submit(key + "a", "double", [value], urgent=True)
    assert found == [("a", 2), ("aa", 4), ("aaa", 8), ("aaaa", 16)]


def test_a_hang_and_a_crash_cost_one_item_each(capfd):
    items = ["a", "hang", "b", "crash", "c", "chatter", "hang"]
    started = time.monotonic()
    with Pool(__name__, None, 2) as pool:
        pool.submit("k", "misbehave", items, time_limit=1.5)
        pool.submit("other", "misbehave", ["d"], time_limit=1.5)
        found = {(key, index): value for key, index, value in pool.results()}
    assert found == {
        ("k", 0): "a",
        ("k", 1): Lost("timeout"),
        ("k", 2): "b",
        ("k", 3): Lost("crashed"),
        ("k", 4): "c",
        ("k", 5): "chatter",
        ("k", 6): Lost("timeout"),
        ("other", 0): "d",
    }
    assert time.monotonic() - started < 30
    assert capfd.readouterr() == ("", ""), "what decoders write must not reach the terminal"


def test_the_limit_is_for_one_item_and_not_for_all():
    with Pool(__name__, None, 1) as pool:
        pool.submit("k", "sleep", [0.4] * 6, time_limit=2.0)
        assert not any(isinstance(value, Lost) for _, _, value in pool.results())


def test_errors_of_a_user_keep_their_hint():
    with Pool(__name__, None, 1) as pool:
        pool.submit("k", "fail", [1])
        with pytest.raises(DataError) as error:
            list(pool.results())
    assert (error.value.what, error.value.hint, error.value.details) == ("the file is odd", "look at it", ("line 1",))


def test_a_bug_keeps_its_traceback():
    with Pool(__name__, None, 1) as pool:
        pool.submit("k", "stumble", [0])
        with pytest.raises(RuntimeError, match=r"ZeroDivisionError"):
            list(pool.results())


def test_a_worker_that_dies_at_work_without_a_limit_stops_the_run():
    with Pool(__name__, None, 1) as pool:
        pool.submit("k", "misbehave", ["crash"])
        with pytest.raises(DataError, match="a worker process died"):
            list(pool.results())


def test_nobody_is_left_behind():
    with Pool(__name__, None, 2) as pool:
        pool.submit("k", "sleep", [0.0, 30.0])
        pool.submit("l", "sleep", [0.0, 30.0])
        pids = [value for _, (_, _, value) in zip(range(2), pool.results(), strict=False)]
    assert len(set(pids)) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
