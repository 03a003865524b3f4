"""The side of `ask --devices` that asks: what workers send, in any order, and workers that fail."""

import time
from multiprocessing import Pipe
from types import SimpleNamespace

import pytest

from llavanext_cli.errors import DataError, RuntimeMissingError
from llavanext_cli.inference import remote
from llavanext_cli.inference.remote import RemoteSession
from llavanext_cli.inference.sampling import Sampling

QUESTION = SimpleNamespace(length=10, id="")


class NoWorkers:
    """All is well, or worker 1 has ended."""

    ended = None

    def poll(self):
        return 1 if self.ended else None

    def find_ended(self):
        return self.ended


@pytest.fixture
def session(tmp_path, monkeypatch):
    """Two workers, and our ends of their sockets."""
    monkeypatch.setattr(remote, "EXIT_SECONDS", 0.1)
    monkeypatch.setattr(remote, "POLL_SECONDS", 0.01)
    ours, theirs = zip(Pipe(), Pipe(), strict=True)
    made = RemoteSession(list(ours), NoWorkers(), tmp_path, cache_tokens=100)
    made.theirs = theirs
    yield made
    for link in (*ours, *theirs):
        link.close()


def test_the_first_worker_talks_and_all_get_the_question(session):
    heard = []
    first, second = session.theirs
    second.send(("answers", None))
    for message in (("text", (0, "a ")), ("text", (0, "cat")), ("answers", ["an answer"])):
        first.send(message)
    answers = session.answer([QUESTION], Sampling(), lambda row, text: heard.append((row, text)))
    assert answers == ["an answer"]
    assert heard == [(0, "a "), (0, "cat")]
    assert [link.recv() for link in session.theirs] == [([QUESTION], Sampling())] * 2


def test_after_an_interrupt_the_old_answer_is_waited_for_and_dropped(session):
    def interrupt(row, text):
        raise KeyboardInterrupt

    first, second = session.theirs
    first.send(("text", (0, "old")))
    with pytest.raises(KeyboardInterrupt):
        session.answer([QUESTION], Sampling(), interrupt)
    heard = []
    for name in ("old", "new"):
        first.send(("text", (0, name)))
        first.send(("answers", [name]))
        second.send(("answers", None))
    assert session.answer([QUESTION], Sampling(), lambda row, text: heard.append(text)) == ["new"]
    assert heard == ["new"]


def test_a_fault_keeps_its_hint_and_a_bug_its_traceback(session):
    session.theirs[1].send(("error", DataError("no weights", "convert them")))
    with pytest.raises(DataError) as fault:
        session.answer([QUESTION], Sampling())
    assert (fault.value.what, fault.value.hint) == ("no weights", "convert them")
    session.theirs[1].send(("bug", "Traceback:\n  line 3\nValueError: 7\n"))
    with pytest.raises(RuntimeMissingError, match="worker 1 failed: ValueError: 7") as bug:
        session.answer([QUESTION], Sampling())
    assert "  line 3" in bug.value.details


@pytest.mark.parametrize("gone", [0, 1])
def test_a_worker_that_is_gone(session, tmp_path, gone):
    (tmp_path / "worker_1.log").write_text(
        "[WARNING] DEVICE(1,7f,python): it is ended\n2026-01-01 - mindformers[a.py:1] - INFO - built\na last word\n"
    )
    session.workers.ended = type("Ended", (), {"rank": 1, "__str__": lambda _: "worker 1 ended"})()
    session.theirs[gone].close()
    with pytest.raises(RuntimeMissingError, match="worker 1 ended") as fault:
        session.answer([QUESTION], Sampling())
    assert fault.value.details == ("a last word",)


def test_a_prompt_that_fills_the_cache_is_refused_on_this_side(session):
    with pytest.raises(DataError, match="100 tokens, media included, but at most 99 fit"):
        session.answer([SimpleNamespace(length=100, id="")], Sampling())
    assert not any(link.poll() for link in session.theirs)


@pytest.mark.parametrize("ready", [0, 1])
def test_a_worker_that_never_gets_ready_does_not_hold_the_others_up(session, tmp_path, ready):
    (tmp_path / f"worker_{1 - ready}.log").write_text("reading weights\n")
    session.theirs[ready].send(("ready", None))
    with pytest.raises(RuntimeMissingError, match=f"worker {1 - ready} is not ready after 600 s") as fault:
        session.collect("ready", deadline=time.monotonic() + 0.1)
    assert fault.value.details == ("reading weights",)
