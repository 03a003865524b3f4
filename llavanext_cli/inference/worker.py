"""One of several workers that answer together: `python worker.py FOLDER`, started by remote.py through msrun.

It builds its part of the model, meets the command at a socket, and answers what comes from there until that is closed.
All workers get the same questions and take the same steps; the first one talks.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client, Connection
from pathlib import Path

from llavanext_cli.errors import LlavaNextError
from llavanext_cli.inference.remote import Job
from llavanext_cli.launching.processes import end_with_parent


def main() -> None:
    end_with_parent()
    folder = Path(sys.argv[1])
    job: Job = pickle.loads((folder / "job.pickle").read_bytes())
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # msrun starts its scheduler by this file too
        _wait_as_scheduler(job, folder)
        return
    rank = int(os.environ.get("RANK_ID", "0"))
    (folder / f"worker_{rank}.pid").write_text(str(os.getpid()), encoding="ascii")
    with Client(job.address, authkey=job.key) as link:
        link.send(("rank", rank))
        try:
            answer_all(job, folder / f"libraries_{rank}", link, rank)
        except LlavaNextError as fault:
            link.send(("fault", fault))
        except Exception:
            link.send(("bug", traceback.format_exc()))
            raise


def answer_all(job: Job, folder: Path, link: Connection, rank: int) -> None:
    """Build the session and answer until the other end is closed."""
    from llavanext_cli.inference.session import Session
    from llavanext_cli.weights.checkpoint import open_checkpoint

    session = Session(open_checkpoint(job.checkpoint), job.preset, folder, verbose=True, **job.shapes)
    link.send(("ready", None))

    def on_text(row: int, text: str) -> None:
        link.send(("text", (row, text)))

    while True:
        try:
            samples, sampling = link.recv()
        except EOFError:
            return
        answers = session.answer(samples, sampling, on_text if rank == 0 else None)
        link.send(("answers", answers if rank == 0 else None))


def _wait_as_scheduler(job: Job, folder: Path) -> None:
    from llavanext_cli.model.runtime import load_libraries

    load_libraries(folder / "libraries_scheduler", job.preset.runtime.target, verbose=True)
    from mindspore.communication import init

    init()


if __name__ == "__main__":
    main()
