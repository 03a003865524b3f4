"""One of several workers that answer together: `python ask_worker.py FOLDER`, started by remote.py through msrun.

It builds its part of the model, connects to the command's socket, and answers what comes from there until that is
closed. All workers get the same questions and take the same steps; only the first one sends text.
"""

from __future__ import annotations

import os
import pickle
import sys
import traceback
from multiprocessing.connection import Client, Connection
from pathlib import Path

from llavanext_cli.errors import LlavaNextError
from llavanext_cli.inference.remote import SETUP_FILE, WorkerSetup
from llavanext_cli.launching.processes import end_with_parent


def main() -> None:
    end_with_parent()
    folder = Path(sys.argv[1])
    setup: WorkerSetup = pickle.loads((folder / SETUP_FILE).read_bytes())
    if os.environ.get("MS_ROLE") == "MS_SCHED":  # msrun starts its scheduler with this file too
        _run_scheduler(setup, folder)
        return
    rank = int(os.environ.get("RANK_ID", "0"))
    (folder / f"worker_{rank}.pid").write_text(str(os.getpid()), encoding="ascii")
    with Client(setup.address, authkey=setup.key) as connection:
        connection.send(("rank", rank))
        try:
            answer_all(setup, folder / f"libraries_{rank}", connection, rank)
        except LlavaNextError as fault:
            connection.send(("error", fault))
        except Exception:
            connection.send(("bug", traceback.format_exc()))
            raise


def answer_all(setup: WorkerSetup, folder: Path, connection: Connection, rank: int) -> None:
    """Build the session and answer until the command closes the connection."""
    from llavanext_cli.inference.session import Session
    from llavanext_cli.weights.checkpoint import open_checkpoint

    session = Session(open_checkpoint(setup.checkpoint), setup.preset, folder, verbose=True, **setup.shapes)
    connection.send(("ready", None))

    def on_text(row: int, text: str) -> None:
        connection.send(("text", (row, text)))

    while True:
        try:
            samples, sampling = connection.recv()
        except EOFError:
            return
        answers = session.answer(samples, sampling, on_text if rank == 0 else None)
        connection.send(("answers", answers if rank == 0 else None))


def _run_scheduler(setup: WorkerSetup, folder: Path) -> None:
    from llavanext_cli.model.runtime import load_libraries

    load_libraries(folder / "libraries_scheduler", setup.preset.runtime.target, verbose=True)
    from mindspore.communication import init

    init()


if __name__ == "__main__":
    main()
