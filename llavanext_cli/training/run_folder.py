"""The folder of a run before its workers start: empty, or as an earlier start left it."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from llavanext_cli import files
from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.training.job import JOB_FILE, TrainJob, TrainRequest
from llavanext_cli.training.plan import RunPlan, digest_file, run_settings
from llavanext_cli.training.run_checkpoints import check_settings, find_run_state, remove_leftovers
from llavanext_cli.weights.checkpoint import open_checkpoint


def check_out(request: TrainRequest) -> None:
    """Check that a new run may be written to OUT. `--force` replaces a run, and nothing else.

    Raises:
        LlavaNextError: OUT holds a run and `--force` is not given, or something else; or what the run reads is in it.
    """
    out = request.out
    names = {path.name for path in out.iterdir()} if out.is_dir() else set()
    if request.nodes.count > 1 and names == {"logs"}:  # another node was faster
        return
    if names and not request.force and is_run(out):
        raise LlavaNextError(
            f"{out} already holds a training run",
            "add --resume to continue it, --force to replace it, or choose another --out",
        )
    read = [request.data, request.checkpoint, *([preset] if (preset := Path(request.preset)).is_file() else [])]
    files.check_target(out, kind="a training run", is_ours=is_run, force=request.force, folder=True, inputs=read)


def is_run(folder: Path) -> bool:
    """Whether a folder holds a training run.

    Raises:
        LlavaNextError: it does, and something else too.
    """
    try:
        job = TrainJob.load(folder / JOB_FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    written = {path.name for path in job.written}
    leftovers = tuple(f".{name}." for name in written)  # of commands that were killed
    names = sorted(path.name for path in folder.iterdir())
    if others := [name for name in names if name not in written and not name.startswith(leftovers)]:
        raise LlavaNextError(
            f"{folder} holds {others[0]} beside a training run", "move it elsewhere, or choose another --out"
        )
    return True


def make_out(request: TrainRequest, job: TrainJob) -> None:
    """An empty folder for the run. Other nodes may have written to OUT/logs already.

    Raises:
        LlavaNextError: as `check_out`.
    """
    check_out(request)
    for old in job.out.iterdir() if job.out.is_dir() else ():
        if request.nodes.count == 1 or old.name != "logs":
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    job.libraries_folder.mkdir(parents=True, exist_ok=True)
    job.checkpoints_folder.mkdir()


def claim_out(request: TrainRequest) -> AbstractContextManager[None]:
    """Hold OUT while this node's workers run, so that no other command resumes or replaces the run."""
    out, node = request.out, request.nodes.rank
    return files.claim(out.with_name(f"{out.name}.node{node}") if node else out)


def resume_run(job: TrainJob, preset: Preset, plan: RunPlan, say: Callable[[str], None]) -> TrainJob:
    """The job that continues the run in its folder; metrics of steps after its checkpoint are removed.

    Raises:
        LlavaNextError: the run is finished, or was begun with other settings.
    """
    if job.model_folder.is_dir():
        raise LlavaNextError(f"{job.out} is finished", f"its model is {job.model_folder}")
    remove_leftovers(job.checkpoints_folder, job.model_folder)
    state, damaged = find_run_state(job.checkpoints_folder)
    for folder, what in damaged.items():  # not counted as a checkpoint, and no obstacle to the step's new one
        say(f"{folder.name} is skipped, and renamed to damaged-{folder.name}: {what}")
        folder.rename(folder.with_name(f"damaged-{folder.name}"))
    if state is None:
        say("no checkpoint was saved yet: starting at step 1")
        job.metrics_file.unlink(missing_ok=True)
        return job
    base = open_checkpoint(job.checkpoint).digest
    check_settings(state, run_settings(preset, plan, digest_file(job.data), base))
    say(f"resuming after step {state.step} of {plan.steps}")
    lines = job.metrics_file.read_text(encoding="utf-8").splitlines() if job.metrics_file.is_file() else []
    kept = [line for line in lines if _step_of(line) <= state.step]
    files.write_whole(job.metrics_file, "".join(line + "\n" for line in kept).encode("utf-8"))
    return replace(job, resume=state.model.folder)


def _step_of(line: str) -> float:
    """The step of a line of metrics. A line that was cut off counts as later than all."""
    with contextlib.suppress(ValueError):
        return json.loads(line)["step"]
    return math.inf
