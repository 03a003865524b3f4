"""Why a run ended before it was done: stopped from outside, or the earliest thing that went wrong in any worker."""

from __future__ import annotations

import contextlib
import json
import signal

from llavanext_cli.errors import EXIT_INTERRUPTED, EXIT_TERMINATED, LlavaNextError, RunStoppedError, TrainingError
from llavanext_cli.training.job import Job
from llavanext_cli.training.processes import Ended


def explain_stop(job: Job, number: int) -> RunStoppedError:
    saved = sorted(job.checkpoints_folder.glob("step-*"))
    where = f"the newest checkpoint is {saved[-1].name}" if saved else "no checkpoint was saved yet"
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    return RunStoppedError(
        f"stopped by {name}; {where}",
        "the same command with --resume goes on from there",
        EXIT_INTERRUPTED if number == signal.SIGINT else EXIT_TERMINATED,
    )


def explain_failure(job: Job, code: int, ended: Ended | None) -> LlavaNextError:
    """The earliest thing that went wrong in any worker."""
    records = []
    for file in job.logs_folder.glob("failure_*.json"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(file.read_text(encoding="utf-8")))
    if not records:
        what = ended or Ended(0, code)
        hint = f"see {job.logs_folder}/worker_{what.rank}.log; the same command with --resume goes on"
        return TrainingError(f"{what} and left no traceback", hint=hint)
    first = min(records, key=lambda record: record["time"])
    hint = first["hint"] or f"see {job.logs_folder}/worker_{first['rank']}.log"
    details = first["details"] if first["known"] else first["traceback"].rstrip().splitlines()[-12:]
    return TrainingError(f"worker {first['rank']} failed: {first['what'].splitlines()[0]}", hint=hint, details=details)
