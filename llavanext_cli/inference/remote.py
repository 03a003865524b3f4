"""A session on several devices: workers that msrun starts compute the answers, this process asks and writes.

    RemoteSession ──samples, sampling──▶ worker 0, worker 1 …       one socket each, in a private folder
                  ◀──text, answers────── worker 0                   the others report when they are done, and errors

MindSpore is not loaded in this process. One question, a batch and a chat use a `RemoteSession` like a `Session`.
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
EXIT_SECONDS = 10
"""How long msrun may take to notice which worker ended first."""
ROUTINE = re.compile(r"^\[(INFO|WARNING)\]| - (INFO|WARNING) - ")
"""Lines in a log of MindSpore or MindFormers that do not explain a failure."""
START_SECONDS = 600
"""How long the workers may take until their libraries and weights are loaded."""
SETUP_FILE = "setup.pickle"


@dataclass(frozen=True)
class WorkerSetup:
    """What each worker reads: how to build its `Session`, and where and with which password it meets this process."""

    checkpoint: Path
    preset: Preset
    shapes: dict[str, int]
    address: str | tuple[str, int]
    key: bytes


@contextlib.contextmanager
def open_remote(
    checkpoint: Path, preset: Preset, folder: Path, cache_tokens: int, shapes: dict[str, int]
) -> Iterator[RemoteSession]:
    """Start one worker for each device, and end them afterwards.

    Args:
        folder: for sockets, logs and what the libraries write; no other user may enter it.
        cache_tokens: most room for prompt and answer of each question.
        shapes: `batch_size`, `bucket`, `cache_step` of the `Session`s.

    Raises:
        LlavaNextError: a worker does not start; with its reason.
    """
    devices, key, socket = preset.parallel.devices, secrets.token_bytes(32), str(folder / "socket")
    command = msrun_command([str(Path(__file__).with_name("ask_worker.py")), str(folder)], folder, devices)
    threads = share_threads(preset.runtime.threads, devices) if preset.runtime.target == "CPU" else None
    with contextlib.ExitStack() as stack:
        address = socket if len(os.fsencode(socket)) <= LONGEST_SOCKET else ("127.0.0.1", 0)
        listener = stack.enter_context(Listener(address, authkey=key))
        shapes = shapes | {"cache_tokens": cache_tokens}
        setup = WorkerSetup(checkpoint.resolve(), preset, shapes, listener.address, key)
        (folder / SETUP_FILE).write_bytes(pickle.dumps(setup))
        workers = stack.enter_context(
            Workers(
                command,
                log=folder / "msrun.log",
                pids=folder,
                ranks=range(devices),
                environment=worker_environment(folder / "libraries", threads),
                folder=folder,
            )
        )
        deadline = time.monotonic() + START_SECONDS
        connections = _accept_all(listener, workers, devices, folder, deadline)
        try:
            session = RemoteSession(connections, workers, folder, cache_tokens)
            session.collect("ready", deadline=deadline)
            yield session
        finally:
            for connection in connections:
                connection.close()


class RemoteSession:
    """Used like a `Session`, but computed by workers. `connections` are in the order of their ranks."""

    def __init__(self, connections: list[Connection], workers: Workers, folder: Path, cache_tokens: int):
        self.connections, self.workers, self.folder = connections, workers, folder
        self.cache_tokens = cache_tokens
        self.is_answering = False

    def answer(
        self, samples: Sequence[EncodedSample], sampling: Sampling, on_text: TextCallback | None = None
    ) -> list[Answer]:
        """As in `Session`. After an interrupt the workers first finish the old answer, which is dropped: all workers
        must take the same steps."""
        if self.is_answering:
            self.collect("answers")
        for sample in samples:
            check_room(sample, self.cache_tokens)
        self.is_answering = True
        try:
            for connection in self.connections:
                connection.send((list(samples), sampling))
        except OSError:
            raise _worker_ended(self.workers, self.folder) from None
        answers = self.collect("answers", on_text)
        self.is_answering = False
        return answers

    def collect(self, kind: str, on_text: TextCallback | None = None, deadline: float = math.inf) -> Any:
        """Wait until every worker has sent a message of this kind; returns the first worker's content."""
        waiting, content = dict(enumerate(self.connections)), None
        while waiting:
            for connection in wait(list(waiting.values()), POLL_SECONDS):
                rank = self.connections.index(connection)
                try:
                    name, value = connection.recv()
                except (EOFError, ConnectionResetError):
                    raise _worker_ended(self.workers, self.folder) from None
                if name == "error":
                    raise value
                if name == "bug":
                    raise _failure(f"worker {rank} failed: {value.strip().splitlines()[-1]}", value.splitlines())
                if name == "text" and on_text is not None:
                    on_text(*value)
                if name == kind:
                    del waiting[rank]
                    content = value if rank == 0 else content
            if self.workers.poll() is not None:
                raise _worker_ended(self.workers, self.folder)
            if waiting and time.monotonic() > deadline:
                raise _too_late(f"worker {min(waiting)} is", self.folder / f"worker_{min(waiting)}.log")
        return content


def _accept_all(listener: Listener, workers: Workers, count: int, folder: Path, deadline: float) -> list[Connection]:
    """The workers' connections in the order of their ranks, when all workers are there."""
    arrived: queue.Queue[Connection] = queue.Queue()

    def accept() -> None:
        for _ in range(count):
            arrived.put(listener.accept())

    threading.Thread(target=accept, daemon=True).start()
    connections: dict[int, Connection] = {}
    while len(connections) < count:
        if workers.poll() is not None:
            raise _worker_ended(workers, folder)
        if time.monotonic() > deadline:
            raise _too_late("the workers are", folder / "msrun.log")
        with contextlib.suppress(queue.Empty):
            connection = arrived.get(timeout=POLL_SECONDS)
            connections[connection.recv()[1]] = connection
    return [connections[rank] for rank in sorted(connections)]


def _worker_ended(workers: Workers, folder: Path) -> LlavaNextError:
    deadline = time.monotonic() + EXIT_SECONDS
    while (ended := workers.find_ended()) is None and time.monotonic() < deadline:
        time.sleep(POLL_SECONDS)
    log = folder / (f"worker_{ended.rank}.log" if ended else "msrun.log")
    return _failure(str(ended or "the workers ended before they answered"), _lines(log))


def _too_late(who: str, log: Path) -> LlavaNextError:
    return _failure(f"{who} not ready after {START_SECONDS} s", _lines(log))


def _lines(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []


def _failure(what: str, lines: Sequence[str]) -> LlavaNextError:
    """An error with the end of a log, whose folder is removed with the command."""
    lines = [line for line in lines if not ROUTINE.search(line)]
    return RuntimeMissingError(what, hint="check the devices with `llavanext doctor`", details=lines[-12:])
