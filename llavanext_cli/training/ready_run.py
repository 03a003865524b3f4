"""From the arguments of `llavanext train` to a run that passed every check: nothing is written, no device is touched.

MindSpore is not imported, so that `--dry-run`, `--plan` and every early error come at once.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.mindformers import expand
from llavanext_cli.config.presets import check_model_settings, load_preset
from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import ConfigError
from llavanext_cli.launching.msrun import msrun_command
from llavanext_cli.training.job import TrainJob, TrainRequest
from llavanext_cli.training.plan import RunPlan, plan_run

WORKER = Path(__file__).with_name("train_worker.py")


@dataclass(frozen=True)
class ReadyRun:
    """A run that passed every check.

    Attributes:
        request: what was asked for.
        preset: with devices and overrides in it.
        job: what the workers will read.
        plan: steps, samples, epochs.
        expanded: the complete MindFormers configuration.
        command: starts the workers of this machine.
        unreadable: samples that cannot be read, and will be skipped.
    """

    request: TrainRequest
    preset: Preset
    job: TrainJob
    plan: RunPlan
    expanded: dict[str, Any]
    command: tuple[str, ...]
    unreadable: int = 0


def check_training(
    request: TrainRequest,
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ReadyRun:
    """Check preset, checkpoint and data against each other.

    Args:
        progress: called with (done, total) while the samples are checked.
        say: called with a line for the user when samples must be counted again.

    Raises:
        LlavaNextError: preset, checkpoint or data cannot be used, or samples do not fit.
    """
    from llavanext_cli.mixing.samples import read_samples
    from llavanext_cli.training.inputs import UNREADABLE, check_sizes, measure_samples
    from llavanext_cli.weights.checkpoint import open_checkpoint

    opened = open_checkpoint(request.checkpoint)
    preset = load_train_preset(request, opened.architecture)
    samples = read_samples(request.data)
    plan = plan_run(preset, len(samples))
    sizes = measure_samples(samples, opened, preset, progress, request.on_bad == "skip", say)
    check_sizes(sizes, samples, preset)
    job = TrainJob.of(request)
    expanded = expand(preset, architecture=opened.architecture, out=job.libraries_folder, steps=plan.steps)
    command = worker_command(request, preset, job)
    return ReadyRun(request, preset, job, plan, expanded, command, int((sizes[:, 0] == UNREADABLE).sum()))


def load_train_preset(request: TrainRequest, model: Architecture) -> Preset:
    """The preset, which must be one for training, and for the checkpoint's model."""
    preset = load_preset(request.preset, request.overrides, request.devices, model)
    if preset.train is None:
        raise ConfigError(f"{request.preset} is a preset for asking, not for training", "see `llavanext presets list`")
    check_model_settings(preset, request.overrides, model)
    return preset


def worker_command(request: TrainRequest, preset: Preset, job: TrainJob) -> tuple[str, ...]:
    """The command that starts all workers of this machine: one directly, several through MindSpore's `msrun`.

    Raises:
        ConfigError: the nodes cannot share the devices, or the port is taken.
    """
    nodes, devices = request.nodes, preset.parallel.devices
    worker = (str(WORKER), str(job.file_of(nodes.rank)))
    if devices % nodes.count:
        raise ConfigError(f"{nodes.count} nodes cannot share {devices} devices evenly", "change --devices or --nodes")
    return msrun_command(worker, job.logs_folder, devices, nodes) if devices > 1 else (sys.executable, *worker)
