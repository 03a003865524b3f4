"""Why a run ended before it was done: a signal, or the earliest failure of any worker."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import time
import traceback
from pathlib import Path

from llavanext_cli.errors import EXIT_INTERRUPTED, LlavaNextError, RunStoppedError, TrainingError
from llavanext_cli.launching.msrun import Nodes
from llavanext_cli.launching.processes import Ended
from llavanext_cli.training.job import TrainJob

RESUME = "the same command with --resume continues from the newest checkpoint"
_INCOMPLETE = "Failed to initialize distributed job cluster"
_REGISTERED = re.compile(r"rank id: (\d+),.* is registered successfully")
_READER_KILLED = re.compile(r"Dataset worker process \d+ was killed by signal: (\w+)")
"""What MindSpore 2.9.0 logs: a cluster that is not complete in time; a worker that joined (scheduler's log); a data
reader that was killed (worker's log)."""


def record_failure(logs: Path, rank: int, fault: Exception) -> None:
    """Write a failure of a worker, or of its data reader, for the launcher. The first one counts."""
    file = logs / f"failure_{rank}.json"
    if file.exists():
        return
    known = isinstance(fault, LlavaNextError)
    record = {
        "rank": rank,
        "time": time.time(),
        "what": fault.what if known else f"{type(fault).__name__}: {fault}",
        "hint": fault.hint if known else "",
        "details": fault.details if known else traceback.format_exc().rstrip().splitlines()[-12:],
    }
    file.write_text(json.dumps(record), encoding="utf-8")


def explain_stop(job: TrainJob, number: int) -> RunStoppedError:
    """A run that signal `number` ended."""
    saved = sorted(job.checkpoints_folder.glob("step-*"))
    where = f"the newest checkpoint is {saved[-1].name}" if saved else "no checkpoint was saved yet"
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return RunStoppedError(
        f"stopped by {name}; {where}",
        f"the same command with --resume {'continues from it' if saved else 'starts again'}",
        EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number,
    )


def explain_failure(job: TrainJob, nodes: Nodes, devices: int, code: int, ended: Ended | None) -> LlavaNextError:
    """The earliest failure of any worker."""
    records = []
    begun = job.file_of(nodes.rank).stat().st_mtime
    for file in job.logs_folder.glob("failure_*.json"):
        with contextlib.suppress(ValueError):
            if file.stat().st_mtime >= begun:  # those of other nodes may be older
                records.append(json.loads(file.read_text(encoding="utf-8")))
    if any(_INCOMPLETE in record["what"] for record in records):
        return explain_absence(job, nodes, devices)
    if not records:
        rank, what = (ended.rank, str(ended)) if ended else (0, f"the workers exited with code {code}")
        log = job.logs_folder / f"worker_{rank}.log"
        if log.is_file() and (killed := _READER_KILLED.search(log.read_text(encoding="utf-8", errors="replace"))):
            return TrainingError(
                f"a data reader of worker {rank} was killed: {killed[1]}",
                f"the machine may have run out of memory: lower data.workers with --set; {RESUME}",
            )
        return TrainingError(f"{what} and left no traceback", f"see {log}; {RESUME}")
    first = min(records, key=lambda record: record["time"])
    hint = first["hint"] or f"see {job.logs_folder}/worker_{first['rank']}.log"
    return TrainingError(f"worker {first['rank']} failed: {first['what'].splitlines()[0]}", hint, first["details"])


def explain_absence(job: TrainJob, nodes: Nodes, devices: int) -> TrainingError:
    """Which nodes did not join in time, from the log of the scheduler on node 0."""
    log = job.logs_folder / "scheduler.log"
    text = log.read_text(encoding="utf-8", errors="replace") if nodes.rank == 0 and log.is_file() else ""
    joined = {int(found[1]) // (devices // nodes.count) for found in _REGISTERED.finditer(text)}
    absent = [node for node in range(nodes.count) if node not in joined]
    within = f"within {nodes.timeout_seconds} s"
    if nodes.rank == 0 and absent:
        missing = f"node{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} did not"
        what = f"{len(joined)} of {nodes.count} nodes joined {within}: {missing}"
    elif nodes.rank > 0:
        what = f"not all of {nodes.count} nodes met at {':'.join(map(str, nodes.master or ()))} {within}"
    else:
        what = f"not all of {devices} workers started {within}"
    return TrainingError(
        what, "start the same command on every node, each with its --node-rank; raise --timeout to wait longer"
    )
