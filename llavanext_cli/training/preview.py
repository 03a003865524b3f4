"""`train --plan`: what a run would take, before it is started."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavanext_cli.errors import TrainingError
from llavanext_cli.training.memory import MemoryPlan, advice, checkpoint_bytes, plan_memory
from llavanext_cli.units import format_memory, format_size
from llavanext_cli.weights.checkpoint import open_checkpoint

if TYPE_CHECKING:
    from llavanext_cli.training.ready_run import ReadyRun


@dataclass(frozen=True)
class RunPreview:
    """Sizes of a run.

    Attributes:
        samples, steps, epochs, global_batch: as in `RunPlan`.
        steps_per_epoch: optimizer steps in one pass over the samples.
        tokens_per_step, tokens_per_epoch: positions that are computed, padding included.
        model_bytes: of the trained model, on the disk.
        checkpoint_bytes: of one checkpoint on the way: weights and the optimizer's moments.
        disk_bytes: most that the run has on the disk at once.
        memory: of one device.
        advice: what to change when it does not fit; empty when it does.
    """

    samples: int
    steps: int
    epochs: float
    global_batch: int
    steps_per_epoch: int
    tokens_per_step: int
    tokens_per_epoch: int
    model_bytes: int
    checkpoint_bytes: int
    disk_bytes: int
    memory: MemoryPlan
    advice: str


def preview_run(run: ReadyRun) -> RunPreview:
    """What a run that passed its checks would take."""
    preset, plan = run.preset, run.plan
    model = open_checkpoint(run.job.checkpoint).architecture
    memory = plan_memory(preset, model)
    steps = plan.samples // plan.global_batch
    tokens = plan.global_batch * preset.data.seq_length
    written, saved = checkpoint_bytes(preset, model)
    # A new checkpoint is complete before an old one goes, and on several NPUs its slices lie beside it until then.
    at_once = preset.train.keep + (2 if preset.runtime.target == "Ascend" and preset.parallel.devices > 1 else 1)
    return RunPreview(
        samples=plan.samples,
        steps=plan.steps,
        epochs=plan.epochs,
        global_batch=plan.global_batch,
        steps_per_epoch=steps,
        tokens_per_step=tokens,
        tokens_per_epoch=steps * tokens,
        model_bytes=written,
        checkpoint_bytes=saved,
        disk_bytes=saved * at_once if preset.train.save_every else written,
        memory=memory,
        advice="" if memory.fits else advice(preset, model),
    )


def check_resources(run: ReadyRun) -> None:
    """Stop a run that cannot fit its memory pool, or the disk, before a device is touched.

    Raises:
        TrainingError: what it needs, what there is, and what to change.
    """
    preview, out = preview_run(run), run.job.out
    memory = preview.memory
    if not memory.fits:
        raise TrainingError(
            f"each device would need {format_memory(memory.total)}, but "
            f"its memory pool has {format_memory(memory.pool)} "
            "(runtime.memory)",
            hint=f"{preview.advice}; or start it anyway with --force",
            details=[f"{name} {format_memory(size)}" for name, size in memory.parts.items()],
        )
    there = sum(file.stat().st_size for file in run.job.checkpoints_folder.rglob("*") if file.is_file())
    disk = next(place for place in (out, *out.parents) if place.exists())
    free = shutil.disk_usage(disk).free
    if preview.disk_bytes > free + there:
        raise TrainingError(
            f"{out} will take up to {format_size(preview.disk_bytes)}, but "
            f"only {format_size(free)} are free on its disk",
            hint="make room, name another --out, keep fewer checkpoints (train.keep), or start it anyway with --force",
        )
