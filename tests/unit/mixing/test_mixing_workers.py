"""Worker processes: a hang or a crash costs one task, and nobody is left behind."""

from __future__ import annotations

import os
import signal
import time

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.conversion import Context
from llavanext_cli.mixing.workers import TaskLostError, WorkerPool, wait

CONTEXT = Context((), "none", "llavanext", 16)


def double(item):
    return 2 * item


def misbehave(item):
    if item == "hang":
        time.sleep(60)
    if item == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if item == "chatter":
        os.write(1, b"noise\n")
        os.write(2, b"noise\n")
    return item


def fail(item):
    raise DataError("the file is odd", "look at it", details=["line 1"])


def sleep(seconds):
    time.sleep(seconds)
    return os.getpid()


@pytest.mark.parametrize("number", [1, 3])
def test_results_come_in_the_order_of_the_tasks(number):
    with WorkerPool(CONTEXT, number) as pool:
        assert list(pool.map(double, range(60))) == [(item, 2 * item) for item in range(60)]


def test_a_hang_and_a_crash_cost_one_task_each(capfd):
    items = ["a", "hang", "b", "crash", "c", "chatter", "hang", "d"]
    found = []
    started = time.monotonic()
    with WorkerPool(CONTEXT, 2) as pool:
        futures = [pool.submit(misbehave, item, time_limit=1.5) for item in items]
        for future in futures:
            try:
                found.append(wait(future))
            except TaskLostError as error:
                found.append(error.reason)
    assert found == ["a", "timeout", "b", "crashed", "c", "chatter", "timeout", "d"]
    assert time.monotonic() - started < 30
    assert capfd.readouterr() == ("", ""), "what decoders write must not reach the terminal"


def test_the_limit_is_for_one_task_and_not_for_all():
    with WorkerPool(CONTEXT, 1) as pool:
        futures = [pool.submit(sleep, 0.4, time_limit=2.0) for _ in range(6)]
        assert len({wait(future) for future in futures}) == 1


def test_errors_of_a_user_keep_their_hint():
    with WorkerPool(CONTEXT, 1) as pool, pytest.raises(DataError) as error:
        wait(pool.submit(fail, 1))
    assert (error.value.what, error.value.hint, error.value.details) == ("the file is odd", "look at it", ("line 1",))


def test_a_worker_that_dies_while_it_reads_records_ends_the_mix():
    with WorkerPool(CONTEXT, 1) as pool, pytest.raises(DataError, match="a worker process died") as error:
        list(pool.map(misbehave, ["a", "crash"]))
    assert "--workers" in error.value.hint


def test_nobody_is_left_behind():
    with WorkerPool(CONTEXT, 2) as pool:
        quick = [pool.submit(sleep, 0.3) for _ in range(2)]
        pids = {wait(future) for future in quick}
        pool.submit(sleep, 60)
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
