"""The folder of a run before its workers start: made empty, or found as an earlier start left it."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Collection
from dataclasses import replace
from pathlib import Path

from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.training.job import JOB_FILE, Job
from llavanext_cli.training.plan import RunPlan, digest_file, run_settings
from llavanext_cli.training.state import check_settings, find_run_state, remove_leftovers
from llavanext_cli.weights.checkpoint import open_checkpoint


def check_out(out: Path, force: bool, but: Collection[str] = ()) -> bool:
    """Whether `out` holds an earlier run that is to be replaced. To be asked before the samples are counted, too.

    Args:
        but: names in it that do not count.

    Raises:
        LlavaNextError: it is a file, or holds something that is no run, or a run and `force` is not given.
    """
    if not (out.is_file() or (out.is_dir() and {path.name for path in out.iterdir()} - set(but))):
        return False
    if not (out / JOB_FILE).is_file():
        raise LlavaNextError(f"{out} holds something that is no training run", hint="choose another --out")
    if not force:
        raise LlavaNextError(
            f"{out} already holds a run", hint="add --resume to go on with it, choose another --out, or add --force"
        )
    return True


def make_out(job: Job, force: bool, nodes: int = 1) -> None:
    """An empty folder for the run. `force` replaces an earlier run, and nothing that is none.

    Of several nodes, the others may have begun before the first, and have put their own files there.
    """
    of_nodes = {"logs", *(job.file_of(node).name for node in range(1, nodes))} if nodes > 1 else set()
    if check_out(job.out, force, of_nodes):
        for old in job.out.iterdir():
            if old.name not in of_nodes:
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    try:
        job.libraries_folder.mkdir(parents=True, exist_ok=True)
        job.checkpoints_folder.mkdir(exist_ok=True)
    except OSError as fault:
        raise LlavaNextError(f"{job.out} cannot be made: {fault.strerror}", hint="choose another --out") from fault


def resume_run(job: Job, preset: Preset, plan: RunPlan, say: Callable[[str], None]) -> Job:
    """The job that goes on where the run in its folder stopped; what came after that is taken out of its metrics."""
    if job.model_folder.is_dir():
        raise LlavaNextError(f"{job.out} is finished", hint=f"its model is {job.model_folder}")
    remove_leftovers(job.checkpoints_folder, job.model_folder)
    state, damaged = find_run_state(job.checkpoints_folder)
    for folder, what in damaged.items():  # out of the way of the step's new checkpoint, and not counted as one
        say(f"{folder.name} is passed over, and is now named damaged-{folder.name}: {what}")
        folder.rename(folder.with_name(f"damaged-{folder.name}"))
    if state is None:
        say("no checkpoint was saved yet: beginning at step 1")
        job.metrics_file.unlink(missing_ok=True)
        return job
    base = open_checkpoint(job.checkpoint).digest
    check_settings(state, run_settings(preset, plan, digest_file(job.data), base))
    say(f"going on after step {state.step} of {plan.steps}")
    lines = job.metrics_file.read_text(encoding="utf-8").splitlines() if job.metrics_file.is_file() else []
    kept = [line for line in lines if _step_of(line) <= state.step]
    shorter = job.metrics_file.with_suffix(".tmp")
    shorter.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
    shorter.replace(job.metrics_file)
    return replace(job, resume=state.model.folder)


def join_run(job: Job) -> Job:
    """The job of a further node of a run that goes on: from the checkpoint that the first node finds, too."""
    state, _ = find_run_state(job.checkpoints_folder)
    return replace(job, resume=state.model.folder if state else None)


def _step_of(line: str) -> float:
    """The step of a line of metrics; one that was cut off counts as later than all."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
