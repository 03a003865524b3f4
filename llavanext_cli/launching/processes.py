"""The processes of a run on this machine: started, watched and ended, so that none outlives the run.

MindSpore's `msrun` gives every worker a session of its own, and data readers are children of workers: a process group
does not hold them all. What does is a mark in their environment, which every descendant inherits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.signals import raise_on_termination

MARK = "LLAVANEXT_RUN"
POLL_SECONDS = 0.2
SAVE_SECONDS = 6.0
"""How long the first worker gets to finish its step and begin to save when a run is ended from outside."""
_PR_SET_PDEATHSIG = 1
_MSRUN_END = re.compile(r"Worker process (\d+) exit with exception\. Error code: (-?\d+)")


@dataclass(frozen=True)
class Ended:
    """A worker that ended badly: its rank, and its exit code (negative: the signal; None: not known)."""

    rank: int
    code: int | None

    def __str__(self) -> str:
        if self.code is None:
            return f"worker {self.rank} ended"
        if self.code < 0:
            return f"worker {self.rank} was ended by {signal.Signals(-self.code).name}"
        return f"worker {self.rank} ended with code {self.code}"


class Workers:
    """All processes of one run on this machine. Use as a context manager: none is left after it.

    Args:
        command: starts them.
        log: file for what the command itself prints.
        pids: folder in which worker R writes its process number, as `worker_R.pid`.
        ranks: of the workers on this machine; the folder may hold those of other nodes.
        environment, folder: of the command.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        log: Path,
        pids: Path,
        ranks: Sequence[int],
        environment: Mapping[str, str],
        folder: Path,
    ):
        self.log, self.pids, self.ranks = log, pids, ranks
        self.mark = uuid.uuid4().hex
        with log.open("wb") as stream:
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env={**environment, MARK: self.mark},
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_begin,
            )

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        kill_marked(self.mark)
        self.process.wait()

    def poll(self) -> int | None:
        """None while they run; the exit code of all, negative for a signal."""
        code = self.process.poll()
        if code is None and (ended := self.find_ended()) is not None:
            kill_marked(self.mark)
            self.process.wait()
            return ended.code or 1
        return code

    def find_ended(self) -> Ended | None:
        """The worker whose end msrun saw first, and which made it end the others."""
        ranks = {pid: rank for rank, pid in self.workers().items()}
        text = self.log.read_text(encoding="utf-8", errors="replace")
        for found in _MSRUN_END.finditer(text):
            if int(found[1]) in ranks:
                return Ended(ranks[int(found[1])], int(found[2]))
        if self.process.poll():
            return Ended(self.ranks[0], self.process.returncode) if len(ranks) == 1 else None
        return None

    def workers(self) -> dict[int, int]:
        """Rank → process number, of the workers that have started here."""
        found = {}
        for rank in self.ranks:
            with contextlib.suppress(ValueError, OSError):
                found[rank] = int((self.pids / f"worker_{rank}.pid").read_text(encoding="ascii"))
        return found

    def stop(self, saving: Callable[[], bool] = lambda: False) -> None:
        """Let the first worker finish its step and save, as long as that takes once it has begun; then end all."""
        first = self.workers().get(0)
        if first is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(first, signal.SIGTERM)
            deadline = time.monotonic() + SAVE_SECONDS
            while _alive(first) and self.process.poll() is None and (time.monotonic() < deadline or saving()):
                time.sleep(POLL_SECONDS)
        kill_marked(self.mark)


def _begin() -> None:
    """In the new process: a SIGTERM for all processes of a job leaves msrun alone, whose end would be the workers'."""
    end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def kill_marked(mark: str) -> None:
    """End every process that carries the mark, and wait until none is left."""
    deadline = time.monotonic() + 10
    while (left := find_marked(mark)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def find_marked(mark: str) -> list[int]:
    """Processes of this user that inherited the mark; those that have ended already do not count."""
    wanted = f"{MARK}={mark}".encode()
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if wanted in (entry / "environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


@contextlib.contextmanager
def interrupted_when_ended() -> Iterator[dict[str, int]]:
    """While workers run, SIGTERM and SIGHUP raise KeyboardInterrupt as Ctrl-C does; the yielded mapping tells which of
    the three it was."""
    seen: dict[str, int] = {"signal": signal.SIGINT}

    def interrupt(number: int) -> KeyboardInterrupt:
        seen["signal"] = number
        return KeyboardInterrupt()

    with raise_on_termination(interrupt):
        yield seen


def _alive(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def end_with_parent() -> None:
    """The kernel ends this process when its parent ends, however that comes about (Linux)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
