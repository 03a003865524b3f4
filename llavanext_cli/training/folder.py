"""The folder of a run before its workers start: made empty, or found as an earlier start left it."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from pathlib import Path

from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.files import write_whole
from llavanext_cli.training.job import JOB_FILE, Job
from llavanext_cli.training.plan import RunPlan, digest_file, run_settings
from llavanext_cli.training.state import check_settings, find_run_state, remove_leftovers
from llavanext_cli.weights.checkpoint import open_checkpoint

LOCK = ".lock_"
"""Begins the names of the files by which a running command holds its folder."""
_OF_A_RUN = re.compile(
    r"job(_\d+)?\.json|mindformers\.yaml|metrics\.(jsonl|tmp)|train_report\.html|skipped\.jsonl|checkpoints|logs|\.?model\b.*"
)
"""Names of what a run writes, see job.py."""


def check_out(out: Path, force: bool, but: Collection[str] = ()) -> bool:
    """Whether `out` holds an earlier run that is to be replaced. To be asked before the samples are counted, too.

    Args:
        but: names in it that do not count.

    Raises:
        LlavaNextError: it is a file, or holds something that is no run's, or a run and `force` is not given.
    """
    names = sorted(path.name for path in out.iterdir()) if out.is_dir() else []
    names = [name for name in names if name not in but and not name.startswith(LOCK)]
    if not (names or out.is_file()):
        return False
    if not _is_run(out):
        raise LlavaNextError(f"{out} holds something that is no training run", hint="choose another --out")
    if not force:
        raise LlavaNextError(
            f"{out} already holds a run", hint="add --resume to go on with it, choose another --out, or add --force"
        )
    if others := [name for name in names if not _OF_A_RUN.fullmatch(name)]:
        raise LlavaNextError(
            f"{out} holds {others[0]} beside a run, and --force replaces runs alone",
            hint="move it elsewhere, or choose another --out",
        )
    return True


def _is_run(out: Path) -> bool:
    try:
        Job.load(out / JOB_FILE)
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return True


def make_out(job: Job, force: bool, nodes: int = 1) -> None:
    """An empty folder for the run. `force` replaces an earlier run, and nothing that is none.

    Of several nodes, the others may have begun before the first, and have put their own files there.

    Raises:
        LlavaNextError: as `check_out`; or what is to be trained with lies in what `force` would remove.
    """
    of_nodes = {"logs", *(job.file_of(node).name for node in range(1, nodes))} if nodes > 1 else set()
    if check_out(job.out, force, of_nodes):
        for option, path in (("--checkpoint", job.checkpoint), ("--data", job.data), ("PRESET", Path(job.preset))):
            if job.out in path.resolve().parents and path.exists():
                raise LlavaNextError(
                    f"{option} {path} lies in the run that --force would remove", hint="choose another --out"
                )
        for old in job.out.iterdir():
            if old.name not in of_nodes and not old.name.startswith(LOCK):
                shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()
    try:
        job.libraries_folder.mkdir(parents=True, exist_ok=True)
        job.checkpoints_folder.mkdir(exist_ok=True)
    except OSError as fault:
        raise LlavaNextError(f"{job.out} cannot be made: {fault.strerror}", hint="choose another --out") from fault


@contextlib.contextmanager
def claim(out: Path, node: int) -> Iterator[None]:
    """Hold `out` while a node's workers run, so that no second command goes on with, or replaces, a run that is going.

    Raises:
        LlavaNextError: another command holds it, or it cannot be made.
    """
    from filelock import FileLock, Timeout

    fresh = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = FileLock(out / f"{LOCK}{node}", timeout=0)
        lock.acquire()
    except Timeout as fault:
        raise LlavaNextError(
            f"{out} is in use by another llavanext train", hint="wait until it has ended, or choose another --out"
        ) from fault
    except OSError as fault:
        raise LlavaNextError(f"{out} cannot be made: {fault.strerror}", hint="choose another --out") from fault
    try:
        yield
    finally:
        Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if fresh:
            with contextlib.suppress(OSError):  # it is not empty
                out.rmdir()


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
    write_whole(job.metrics_file, "".join(line + "\n" for line in kept).encode("utf-8"))
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
