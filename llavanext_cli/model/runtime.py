"""Prepare MindSpore and MindFormers before their first import: where they write, and how much they print.

Both read their settings at import time. By default MindFormers writes `./output/log` and logs to stdout; MindSpore
writes `./rank_0` after a failed compile and warns on stderr. Here all files go to a folder of ours.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from llavanext_cli.errors import RuntimeMissingError
from llavanext_cli.machine.cores import usable_cores
from llavanext_cli.signals import defer_signals


def library_environment(folder: Path, verbose: bool = False) -> dict[str, str]:
    """Environment variables that keep the libraries' files under `folder` and their messages off the terminal."""
    return {
        "LOG_MF_PATH": str(folder / "mindformers"),
        "LOCAL_DEFAULT_PATH": str(folder / "mindformers"),
        "MS_OM_PATH": str(folder / "mindspore"),
        "MS_DEV_SAVE_GRAPHS_PATH": str(folder / "mindspore"),
        "GLOG_v": "2" if verbose else "4",
    }


def share_threads(threads: int | None, workers: int) -> int:
    """Threads of one of `workers` processes: as asked for, or its share of the cores."""
    return threads or max(1, usable_cores() // workers)


_done: set[str] = set()


def load_libraries(
    folder: Path, target: str, *, threads: int | None = None, mindformers: bool = True, verbose: bool = False
) -> None:
    """Import MindSpore, MindFormers and our classes quietly, and choose the device and threads, once in a process.

    Args:
        folder: for the libraries' own logs; created if missing.
        target: "Ascend" or "CPU".
        threads: threads of the CPU kernels; None for all cores that this process may use (MindSpore's default is 25).
        mindformers: False imports MindSpore alone, which takes a third of the time.
        verbose: leave warnings and logs on the terminal.

    Raises:
        RuntimeMissingError: a library is not installed or does not load.
    """
    folder.mkdir(parents=True, exist_ok=True)
    os.environ.update(library_environment(folder, verbose))
    try:
        with contextlib.nullcontext() if verbose else _silence():
            with defer_signals():
                import mindspore
            if mindformers:
                with defer_signals():
                    import llavanext_cli.model.backend.optimizer
                    import llavanext_cli.model.backend.train_step
                    import llavanext_cli.model.registry  # noqa: F401 - puts our classes into MindFormers' registry
    except ImportError as fault:
        raise RuntimeMissingError(f"{fault}", hint="run `pip install mindspore==2.9.0 mindformers==1.9.0`") from fault
    if mindformers and not verbose:
        _drop_stream_handlers()
    mindspore.set_context(mode=mindspore.GRAPH_MODE)
    mindspore.set_device(target)
    if target == "CPU" and not _done:  # MindSpore refuses a second time
        mindspore.device_context.cpu.op_tuning.threads_num(share_threads(threads, 1))
    _done.add(target)


def _drop_stream_handlers() -> None:
    """MindFormers' logger writes to its files only."""
    from mindformers.tools.logger import get_logger

    log = get_logger()
    for handler in list(log.handlers):
        if isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler):
            log.removeHandler(handler)


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Discard what is written to file descriptors 1 and 2: the libraries' C++ code writes there while it loads."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(kept[0], 1)
        os.dup2(kept[1], 2)
        for descriptor in (*kept, nowhere):
            os.close(descriptor)
