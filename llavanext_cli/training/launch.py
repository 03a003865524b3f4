"""Start a training run and see it through: checks, then one worker a device, then what they did or why they failed.

The workers are processes of their own on every number of devices: one directly, several through MindSpore's `msrun`.
MindSpore is imported by the workers alone, so that `--dry-run` and every early error come at once.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.mindformers import expand
from llavanext_cli.config.presets import check_model_settings, load_preset
from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import ConfigError, TrainingError
from llavanext_cli.launching.msrun import ONE_NODE, Nodes, msrun_command, worker_environment
from llavanext_cli.launching.processes import POLL_SECONDS, SAVE_SECONDS, Workers, interrupted_when_ended
from llavanext_cli.training.failures import explain_failure, explain_stop
from llavanext_cli.training.folder import claim, join_run, make_out, resume_run
from llavanext_cli.training.job import Job
from llavanext_cli.training.node_status import NodeStatus
from llavanext_cli.training.plan import RunPlan, plan_run
from llavanext_cli.training.report import write_report
from llavanext_cli.training.state import find_unfinished
from llavanext_cli.training.stopping import GracefulStop

StepCallback = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class ReadyRun:
    """A run that passed every check and has written nothing yet.

    Attributes:
        preset: with devices and overrides in it.
        job: what the workers will read.
        plan: steps, samples, epochs.
        expanded: the complete MindFormers configuration.
        command: what will be started on this machine.
        nodes: the machines.
        unreadable: samples that cannot be read, and will be skipped.
    """

    preset: Preset
    job: Job
    plan: RunPlan
    expanded: dict[str, Any]
    command: tuple[str, ...]
    nodes: Nodes = ONE_NODE
    unreadable: int = 0


@dataclass(frozen=True)
class TrainReport:
    """What a run did: the trained model's folder, its metrics, steps, samples, last loss, seconds of training, and
    how many times a sample was skipped because it could not be read."""

    model: Path
    metrics: Path
    steps: int
    samples: int
    loss: float | None
    seconds: float
    skipped: int = 0


def check_training(
    preset_name: str,
    data: Path,
    checkpoint: Path,
    out: Path,
    *,
    devices: int | None = None,
    overrides: tuple[str, ...] = (),
    nodes: Nodes = ONE_NODE,
    on_bad: str = "fail",
    progress: Callable[[int, int], None] | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> ReadyRun:
    """Everything that can be found wrong before a device is touched or a file written.

    Args:
        preset_name: name or file of a train preset.
        data: samples, as `mix` writes them, or the original's processed JSON.
        checkpoint: a folder that `convert` or another run made.
        out: folder for everything the run will write.
        devices: NPUs or CPU workers; changes `parallel.devices` and `parallel.data` of the preset.
        overrides: "key.path=value" changes to the preset.
        nodes: the machines of the run; `devices` are those of all of them.
        on_bad: what becomes of a sample that cannot be read while training: "fail" or "skip".
        progress: called with (done, total) while the samples are checked.
        say: called with a line for the user when samples must be counted again.

    Raises:
        LlavaNextError: preset, checkpoint or data cannot be used, or samples do not fit.
    """
    from llavanext_cli.mixing.samples import read_samples
    from llavanext_cli.training.inputs import UNREADABLE, check_sizes, measure_samples
    from llavanext_cli.weights.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    preset = load_train_preset(preset_name, overrides, devices, opened.architecture)
    check_model_settings(preset, overrides, opened.architecture)
    samples = read_samples(data)
    plan = plan_run(preset, len(samples))
    sizes = measure_samples(samples, opened, preset, progress, on_bad == "skip", say)
    check_sizes(sizes, samples, preset)
    job = Job(
        _absolute(preset_name), overrides, devices, data.resolve(), checkpoint.resolve(), out.resolve(), None, on_bad
    )
    expanded = expand(preset, architecture=opened.architecture, out=job.libraries_folder, steps=plan.steps)
    command = worker_command(preset, job, nodes)
    return ReadyRun(preset, job, plan, expanded, command, nodes, int((sizes[:, 0] == UNREADABLE).sum()))


def worker_command(preset: Preset, job: Job, nodes: Nodes) -> tuple[str, ...]:
    """The command that starts all workers of this machine.

    Raises:
        ConfigError: the devices cannot be shared by the nodes, or the port is taken.
    """
    worker = [str(Path(__file__).with_name("worker.py")), str(job.file_of(nodes.rank))]
    devices = preset.parallel.devices
    if devices % nodes.count:
        raise ConfigError(
            f"{devices} devices cannot be shared evenly by {nodes.count} nodes", hint="change --devices or --nodes"
        )
    if devices == 1:
        return (sys.executable, *worker)
    return msrun_command(worker, job.logs_folder, devices, nodes)


def run_training(
    run: ReadyRun,
    *,
    force: bool = False,
    resume: bool = False,
    on_step: StepCallback | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> TrainReport:
    """Train.

    Args:
        run: from `check_training`.
        force: replace an existing `out`.
        resume: go on from the newest whole checkpoint in `out`, or begin when there is none.
        on_step: called with each line of metrics.
        say: called with each line that the user should see at once.

    Raises:
        RunStoppedError: Ctrl-C or SIGTERM ended the run; it can be resumed.
        LlavaNextError: `out` holds something, or a worker failed; logs stay in OUT/logs.
    """
    with claim(run.job.out, run.nodes.rank):
        job = _prepare(run, force, resume, say)
        started = time.monotonic()
        try:
            last = _run_workers(run, job, on_step or (lambda line: None), say)
        finally:
            skipped = len(job.skipped_file.read_bytes().splitlines()) if job.skipped_file.is_file() else 0
            if run.nodes.rank == 0:
                _report(job, run.plan, skipped, say)
    if run.nodes.rank == 0 and not job.model_folder.is_dir():
        raise TrainingError("the workers ended without a model", hint=f"see {job.logs_folder}")
    seconds = time.monotonic() - started
    if skipped:
        say(f"{skipped} times a sample could not be read and was skipped: see {job.skipped_file}")
    plan = run.plan
    return TrainReport(job.model_folder, job.metrics_file, plan.steps, plan.samples, last.get("loss"), seconds, skipped)


def _prepare(run: ReadyRun, force: bool, resume: bool, say: Callable[[str], None]) -> Job:
    """The folder of the run, made or found, with all that its workers read."""
    job = run.job
    if run.nodes.rank > 0:
        job.libraries_folder.mkdir(parents=True, exist_ok=True)
        job = join_run(job) if resume else job
    elif resume and job.file.is_file():
        job = resume_run(job, run.preset, run.plan, say)
    else:
        make_out(job, force, run.nodes.count)
        if resume:
            say(f"{job.out} holds no run to go on with: it begins with the first step")
    for rank in run.nodes.ranks(run.preset.parallel.devices):  # those of other nodes may be new
        for stale in (f"failure_{rank}.json", f"worker_{rank}.pid"):
            (job.logs_folder / stale).unlink(missing_ok=True)
    job.save(run.nodes.rank)
    if run.nodes.rank == 0:
        GracefulStop(job.stop_file, 0, 1).reset()
        job.config_file.write_text(yaml.safe_dump(run.expanded, sort_keys=False), encoding="utf-8")
    return job


def _report(job: Job, plan: RunPlan, skipped: int, say: Callable[[str], None]) -> None:
    """A report that cannot be written is no reason to fail."""
    try:
        write_report(job, plan, skipped)
    except OSError as fault:
        say(f"{job.report_file.name} could not be written: {fault.strerror}")


def load_train_preset(name: str, overrides: Sequence[str], devices: int | None, model: Architecture) -> Preset:
    """The preset, checked to be one for training, and for the checkpoint's model."""
    preset = load_preset(name, overrides, devices, model)
    if preset.train is None:
        raise ConfigError(f"{name} is a preset for asking, not for training", hint="see `llavanext presets list`")
    return preset


def _absolute(preset: str) -> str:
    """A preset given as a file must be found from the workers' folder too."""
    return str(Path(preset).resolve()) if Path(preset).is_file() else preset


def _run_workers(run: ReadyRun, job: Job, on_step: StepCallback, say: Callable[[str], None]) -> dict[str, Any]:
    """Run to the end, handing on metrics as they come; returns the last line of them."""
    single = run.preset.parallel.devices == 1
    log = job.logs_folder / ("worker_0.log" if single else f"msrun_{run.nodes.rank}.log")
    lines, warnings = _follow(job.metrics_file), _follow(job.warnings_file)
    lines.skip()
    warnings.skip()
    last: dict[str, Any] = {}

    def hand_on() -> None:
        nonlocal last
        for line in lines.read():
            last = json.loads(line)
            on_step(last)
        for line in warnings.read():
            say(line)

    said_so = False

    def saving() -> bool:
        nonlocal said_so
        busy = bool(find_unfinished(job.checkpoints_folder, job.model_folder))
        if busy and not said_so:
            said_so = True
            say("saving what is trained; Ctrl-C ends at once")
        return busy

    node_status = NodeStatus(job, run.nodes)
    with (
        interrupted_when_ended() as seen,
        Workers(
            run.command,
            log=log,
            pids=job.logs_folder,
            ranks=run.nodes.ranks(run.preset.parallel.devices),
            environment=worker_environment(run.preset, job.libraries_folder, run.nodes),
            folder=job.libraries_folder,
        ) as workers,
    ):
        try:
            while (code := workers.poll()) is None:
                time.sleep(POLL_SECONDS)
                hand_on()
                if said := node_status.heard():
                    workers.stop(saving)
                    hand_on()
                    node_status.tell(said)
                    raise TrainingError(said, hint="the same commands with --resume, on every node, go on from there")
        except KeyboardInterrupt:
            with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the waiting
                if run.nodes.rank > 0:  # the first worker cannot finish its step without ours
                    node_status.tell("stopped from outside")
                    node_status.wait(SAVE_SECONDS + 1, saving)
                workers.stop(saving)
            hand_on()
            if job.model_folder.is_dir():  # all steps were done, and the model has been written meanwhile
                return last
            stopped = explain_stop(job, seen["signal"])
            node_status.tell(stopped.what)
            raise stopped from None
        ended = workers.find_ended()
    hand_on()
    if code:
        fault = explain_failure(job, run.nodes, run.preset.parallel.devices, code, ended)
        node_status.tell(fault.what)
        raise fault
    return last


class _follow:
    """The complete lines of a growing file, each once."""

    def __init__(self, file: Path):
        self.file, self.offset = file, 0

    def skip(self) -> None:
        """Pass over what is there already."""
        with contextlib.suppress(FileNotFoundError):
            self.offset = self.file.stat().st_size

    def read(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), self.file.open("rb") as stream:
            # A run that goes on is cut back to its checkpoint, by another node perhaps.
            self.offset = min(self.offset, self.file.stat().st_size)
            stream.seek(self.offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield line.decode().rstrip("\n")
