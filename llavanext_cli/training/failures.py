"""Why a run ended before it was done: stopped from outside, or the earliest thing that went wrong in any worker."""

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
from llavanext_cli.training.job import Job

_NOT_ALL_CAME = "Failed to initialize distributed job cluster"
_REGISTERED = re.compile(r"rank id: (\d+),.* is registered successfully")
_READER_KILLED = re.compile(r"Dataset worker process \d+ was killed by signal: (\w+)")
"""What MindSpore 2.9.0 says of a cluster that is not complete in time, its scheduler of a worker that came, and a
worker of a process that read its data."""


def record_failure(logs: Path, rank: int, fault: Exception) -> None:
    """Leave what went wrong in a worker, or in a reader of its data, for the launcher; the first one counts."""
    file = logs / f"failure_{rank}.json"
    if file.exists():
        return
    known = isinstance(fault, LlavaNextError)
    record = {
        "rank": rank,
        "time": time.time(),
        "what": fault.what if known else f"{type(fault).__name__}: {fault}",
        "hint": fault.hint if known else "",
        "details": fault.details if known else (),
        "known": known,
        "traceback": traceback.format_exc(),
    }
    file.write_text(json.dumps(record), encoding="utf-8")


def explain_stop(job: Job, number: int) -> RunStoppedError:
    saved = sorted(job.checkpoints_folder.glob("step-*"))
    where = f"the newest checkpoint is {saved[-1].name}" if saved else "no checkpoint was saved yet"
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return RunStoppedError(
        f"stopped by {name}; {where}",
        f"the same command with --resume {'goes on from there' if saved else 'begins again'}",
        EXIT_INTERRUPTED if number == signal.SIGINT else 128 + number,
    )


def explain_failure(job: Job, nodes: Nodes, devices: int, code: int, ended: Ended | None) -> LlavaNextError:
    """The earliest thing that went wrong in any worker."""
    records = []
    begun = job.file_of(nodes.rank).stat().st_mtime
    for file in job.logs_folder.glob("failure_*.json"):
        with contextlib.suppress(ValueError):
            if file.stat().st_mtime >= begun:  # of other nodes there may be older ones
                records.append(json.loads(file.read_text(encoding="utf-8")))
    if any(_NOT_ALL_CAME in record["what"] for record in records):
        return explain_absence(job, nodes, devices)
    if not records:
        what = ended or Ended(0, code)
        log = job.logs_folder / f"worker_{what.rank}.log"
        if log.is_file() and (killed := _READER_KILLED.search(log.read_text(encoding="utf-8", errors="replace"))):
            return TrainingError(
                f"a data reader of worker {what.rank} was ended: {killed[1]}",
                "often the memory ran out: lower data.workers with --set; the same command with --resume goes on",
            )
        hint = f"see {job.logs_folder}/worker_{what.rank}.log; the same command with --resume goes on"
        return TrainingError(f"{what} and left no traceback", hint=hint)
    first = min(records, key=lambda record: record["time"])
    hint = first["hint"] or f"see {job.logs_folder}/worker_{first['rank']}.log"
    details = first["details"] if first["known"] else first["traceback"].rstrip().splitlines()[-12:]
    return TrainingError(f"worker {first['rank']} failed: {first['what'].splitlines()[0]}", hint=hint, details=details)


def explain_absence(job: Job, nodes: Nodes, devices: int) -> TrainingError:
    """Which nodes did not meet in time, by what the scheduler of the first node wrote."""
    log = job.logs_folder / "scheduler.log"
    text = log.read_text(encoding="utf-8", errors="replace") if nodes.rank == 0 and log.is_file() else ""
    came = {int(found[1]) // (devices // nodes.count) for found in _REGISTERED.finditer(text)}
    absent = [node for node in range(nodes.count) if node not in came]
    within = f"within {nodes.timeout_seconds} s"
    if nodes.rank == 0 and absent:
        missing = f"node{'s' * (len(absent) > 1)} {', '.join(map(str, absent))} did not"
        what = f"{len(came)} of {nodes.count} nodes came {within}: {missing}"
    elif nodes.rank > 0:
        what = f"not all of {nodes.count} nodes met at {':'.join(map(str, nodes.master or ()))} {within}"
    else:
        what = f"not all of {devices} workers started {within}"
    return TrainingError(
        what, "start the same command on every node, each with its --node-rank; --timeout waits for more minutes"
    )
