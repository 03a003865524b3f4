"""All workers save the same step when a signal ends the run."""

import pytest

from llavanext_cli.training.stopping import GracefulStop


@pytest.fixture
def file(tmp_path):
    place = tmp_path / "stop_after"
    GracefulStop(place, 0, 1).reset()
    return place


def test_a_run_continues_without_a_request(file):
    workers = [GracefulStop(file, rank, 2) for rank in range(2)]
    assert not any(worker.reached(step) for step in range(1, 5) for worker in workers)


def test_all_workers_stop_after_the_step_that_follows(file):
    first, second = (GracefulStop(file, rank, 2) for rank in range(2))
    assert not second.reached(4), "it is a little ahead"
    first.requested.set()
    assert not first.reached(4)
    assert second.reached(5) and first.reached(5)
    assert first.reached(5), "asking again changes nothing"


def test_only_the_first_worker_decides(file):
    second = GracefulStop(file, 1, 2)
    second.requested.set()
    assert not second.reached(4) and not second.reached(5)


def test_a_worker_alone_stops_at_once(file):
    alone = GracefulStop(file, 0, 1)
    alone.requested.set()
    assert alone.reached(4)


def test_a_new_start_is_not_stopped_by_the_last_ones_end(file):
    first = GracefulStop(file, 0, 2)
    first.requested.set()
    first.reached(4)
    first.reset()
    assert not GracefulStop(file, 0, 2).reached(6)
