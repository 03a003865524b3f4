"""A session on several devices: workers that msrun starts answer, this process asks and writes.

    RemoteSession ──samples, sampling──▶ worker 0, worker 1 …       one socket each, in a folder that is ours alone
                  ◀──text, answers────── worker 0                   the others say when they are done, and their faults

Nothing of MindSpore is loaded on this side; one question, a batch and a chat use it as they use a `Session`.
"""

from __future__ import annotations

import contextlib
import math
import os
import pickle
import queue
import re
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.errors import LlavaNextError, RuntimeMissingError
from llavanext_cli.inference.session import Answer, TextCallback, check_room
from llavanext_cli.launching.msrun import msrun_command, worker_environment
from llavanext_cli.launching.processes import POLL_SECONDS, Workers
from llavanext_cli.model.runtime import share_threads

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.inference.sampling import Sampling
    from llavanext_cli.records import EncodedSample

LONGEST_SOCKET = 100
"""Characters of a socket's path; Linux allows a few more."""
SEEN_SECONDS = 10
"""How long msrun may take to see which of them ended first."""
TALK = re.compile(r"^\[(INFO|WARNING)\]| - (INFO|WARNING) - ")
"""Lines of a log that are no reason for an end, as MindSpore and MindFormers begin them."""
START_SECONDS = 600
"""How long the workers may take until their libraries and weights are loaded."""


@dataclass(frozen=True)
class Job:
    """What the workers read: absolute paths, the preset, what a `Session` is called with, and where and with which
    password they meet this process."""

    checkpoint: Path
    preset: Preset
    shapes: dict[str, int]
    address: str | tuple[str, int]
    key: bytes


@contextlib.contextmanager
def open_remote(
    checkpoint: Path, preset: Preset, folder: Path, cache_tokens: int, shapes: dict[str, int]
) -> Iterator[RemoteSession]:
    """Start one worker a device, and end them afterwards.

    Args:
        folder: for sockets, logs and what the libraries write; this user's alone.
        cache_tokens: most room for prompt and answer of each.
        shapes: `batch_size`, `bucket`, `cache_step` of the `Session`s.

    Raises:
        LlavaNextError: a worker does not start; with its own reason.
    """
    key, socket = secrets.token_bytes(32), str(folder / "socket")
    worker = [str(Path(__file__).with_name("worker.py")), str(folder)]
    command = msrun_command(worker, folder, preset.parallel.devices)
    on_cpu, devices = preset.runtime.target == "CPU", preset.parallel.devices
    threads = share_threads(preset.runtime.threads, devices) if on_cpu else None
    environment = worker_environment(folder / "libraries", threads)
    with contextlib.ExitStack() as stack:
        place = socket if len(os.fsencode(socket)) <= LONGEST_SOCKET else ("127.0.0.1", 0)
        listener = stack.enter_context(Listener(place, authkey=key))
        job = Job(checkpoint.resolve(), preset, shapes | {"cache_tokens": cache_tokens}, listener.address, key)
        (folder / "job.pickle").write_bytes(pickle.dumps(job))
        workers = stack.enter_context(
            Workers(
                command,
                log=folder / "msrun.log",
                pids=folder,
                ranks=range(preset.parallel.devices),
                environment=environment,
                folder=folder,
            )
        )
        deadline = time.monotonic() + START_SECONDS
        links = _meet(listener, workers, preset.parallel.devices, folder, deadline)
        try:
            session = RemoteSession(links, workers, folder, cache_tokens)
            session.collect("ready", deadline=deadline)
            yield session
        finally:
            for link in links:
                link.close()


class RemoteSession:
    """What `Session` is to its callers, computed elsewhere. The sockets are in the order of the ranks."""

    def __init__(self, links: list[Connection], workers: Workers, folder: Path, cache_tokens: int):
        self.links, self.workers, self.folder, self.cache_tokens = links, workers, folder, cache_tokens
        self.owed = False

    def check_room(self, sample: EncodedSample) -> None:
        """As of `Session`."""
        check_room(sample, self.cache_tokens)

    def answer(
        self, samples: Sequence[EncodedSample], sampling: Sampling, on_text: TextCallback | None = None
    ) -> list[Answer]:
        """As of `Session`. After an interrupt the workers first finish what nobody waits for any more: they have to
        stay in step with each other."""
        if self.owed:
            self.collect("answers")
        for sample in samples:
            self.check_room(sample)
        self.owed = True
        try:
            for link in self.links:
                link.send((list(samples), sampling))
        except OSError:
            raise self._ended() from None
        answers = self.collect("answers", on_text)
        self.owed = False
        return answers

    def collect(self, kind: str, on_text: TextCallback | None = None, deadline: float = math.inf) -> Any:
        """Wait until every worker has sent a message of this kind; the first worker's content."""
        waiting, content = dict(enumerate(self.links)), None
        while waiting:
            for link in wait(list(waiting.values()), POLL_SECONDS):
                rank = self.links.index(link)
                try:
                    name, value = link.recv()
                except (EOFError, ConnectionResetError):
                    raise self._ended() from None
                if name == "fault":
                    raise value
                if name == "bug":
                    raise _broken(f"worker {rank} failed: {value.strip().splitlines()[-1]}", value.splitlines())
                if name == "text" and on_text is not None:
                    on_text(*value)
                if name == kind:
                    del waiting[rank]
                    content = value if rank == 0 else content
            if self.workers.poll() is not None:
                raise self._ended()
            if waiting and time.monotonic() > deadline:
                raise _late(f"worker {min(waiting)} is", self.folder / f"worker_{min(waiting)}.log")
        return content

    def _ended(self) -> LlavaNextError:
        return _worker_ended(self.workers, self.folder)


def _meet(listener: Listener, workers: Workers, count: int, folder: Path, deadline: float) -> list[Connection]:
    """The workers' sockets in the order of their ranks, when all are there."""
    arrived: queue.Queue[Connection] = queue.Queue()

    def accept() -> None:
        for _ in range(count):
            arrived.put(listener.accept())

    threading.Thread(target=accept, daemon=True).start()
    links: dict[int, Connection] = {}
    while len(links) < count:
        if workers.poll() is not None:
            raise _worker_ended(workers, folder)
        if time.monotonic() > deadline:
            raise _late("the workers are", folder / "msrun.log")
        try:
            link = arrived.get(timeout=POLL_SECONDS)
        except queue.Empty:
            continue
        links[link.recv()[1]] = link
    return [links[rank] for rank in sorted(links)]


def _worker_ended(workers: Workers, folder: Path) -> LlavaNextError:
    deadline = time.monotonic() + SEEN_SECONDS
    while (ended := workers.find_ended()) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    log = folder / (f"worker_{ended.rank}.log" if ended else "msrun.log")
    return _broken(str(ended or "the workers ended before they answered"), _lines(log))


def _late(who: str, log: Path) -> LlavaNextError:
    return _broken(f"{who} not ready after {START_SECONDS} s", _lines(log))


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []


def _broken(what: str, lines: Sequence[str]) -> LlavaNextError:
    """The end of a log is all that is left of a worker: its folder goes with the command."""
    lines = [line for line in lines if not TALK.search(line)]
    return RuntimeMissingError(what, hint="check the devices with `llavanext doctor`", details=lines[-12:])
