"""How the launchers of several nodes learn that one of them ended, and why: by files in OUT/logs.

Without it a node waits until the communication library misses the other one, which may take half an hour.
Node 0 watches all others, and they watch node 0.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from llavanext_cli.files import write_whole
from llavanext_cli.launching.processes import POLL_SECONDS

if TYPE_CHECKING:
    from llavanext_cli.launching.msrun import Nodes
    from llavanext_cli.training.job import TrainJob


class NodeStatus:
    """The other nodes of a run. Build it after this node's job file was written: older files are of another start.

    Args:
        job: of the run; its folder is seen by all nodes.
        nodes: the machines.
    """

    def __init__(self, job: TrainJob, nodes: Nodes):
        self.folder, self.rank = job.logs_folder, nodes.rank
        self.others = range(1, nodes.count) if nodes.rank == 0 else range(1)
        self.begun = job.file_of(nodes.rank).stat().st_mtime  # both times are the file server's

    def tell(self, what: str) -> None:
        """Tell the other nodes that this one ended."""
        if self.others:
            write_whole(self.folder / f"ended_{self.rank}.txt", what.encode("utf-8"))

    def heard(self) -> str | None:
        """Which other node ended, and why; None while all run."""
        for node in self.others:
            file = self.folder / f"ended_{node}.txt"
            with contextlib.suppress(FileNotFoundError):
                if file.stat().st_mtime >= self.begun:
                    return f"node {node} ended: {file.read_text(encoding='utf-8')}"
        return None

    def wait(self, seconds: float, saving: Callable[[], bool]) -> None:
        """Wait until another node has ended, or the time is over and nothing is being saved."""
        deadline = time.monotonic() + seconds
        while self.heard() is None and (time.monotonic() < deadline or saving()):
            time.sleep(POLL_SECONDS)
