"""Start a training run and see it through: checks, then one worker a device, then what they did or why they failed.

The workers are processes of their own on every number of devices: one directly, several through MindSpore's `msrun`.
Standard library only until the checks, so that `--dry-run` and every early error are instant.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llavanext_cli.config.mindformers import expand
from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import ConfigError, LlavaNextError, RuntimeMissingError, TrainingError
from llavanext_cli.model.runtime import library_environment, share_threads
from llavanext_cli.training.job import Job
from llavanext_cli.training.plan import RunPlan, plan_run

POLL_SECONDS = 0.2
END_SECONDS = 10.0
"""How long workers get to end after SIGTERM before they are killed."""

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
    """

    preset: Preset
    job: Job
    plan: RunPlan
    expanded: dict[str, Any]
    command: tuple[str, ...]


@dataclass(frozen=True)
class TrainReport:
    """What a run did: the trained model's folder, its metrics, steps, samples, last loss, and seconds of training."""

    model: Path
    metrics: Path
    steps: int
    samples: int
    loss: float | None
    seconds: float


def check_training(
    preset_name: str,
    data: Path,
    checkpoint: Path,
    out: Path,
    *,
    devices: int | None = None,
    overrides: tuple[str, ...] = (),
    progress: Callable[[int, int], None] | None = None,
) -> ReadyRun:
    """Everything that can be found wrong before a device is touched or a file written.

    Args:
        preset_name: name or file of a train preset.
        data: samples, as `mix` writes them, or the original's processed JSON.
        checkpoint: a folder that `convert` or another run made.
        out: folder for everything the run will write.
        devices: NPUs or CPU workers; changes `parallel.devices` and `parallel.data` of the preset.
        overrides: "key.path=value" changes to the preset.
        progress: called with (done, total) while the samples' lengths are counted.

    Raises:
        LlavaNextError: preset, checkpoint or data cannot be used, or samples do not fit.
    """
    from llavanext_cli.mixing.samples import read_samples
    from llavanext_cli.training.inputs import check_lengths, count_tokens
    from llavanext_cli.weights.checkpoint import open_checkpoint

    preset = load_train_preset(preset_name, overrides, devices)
    opened = open_checkpoint(checkpoint)
    samples = read_samples(data)
    plan = plan_run(preset, len(samples))
    check_lengths(count_tokens(samples, opened, preset, progress), preset)
    job = Job(_absolute(preset_name), overrides, devices, data.resolve(), checkpoint.resolve(), out.resolve())
    expanded = expand(preset, architecture=opened.architecture, out=job.libraries_folder, steps=plan.steps)
    return ReadyRun(preset, job, plan, expanded, worker_command(preset, job))


def run_training(run: ReadyRun, *, force: bool = False, on_step: StepCallback | None = None) -> TrainReport:
    """Train.

    Args:
        run: from `check_training`.
        force: replace an existing `out`.
        on_step: called with each line of metrics.

    Raises:
        LlavaNextError: `out` holds something, or a worker failed; logs stay in OUT/logs.
    """
    job = run.job
    _make_out(job, force)
    job.save()
    job.config_file.write_text(yaml.safe_dump(run.expanded, sort_keys=False), encoding="utf-8")
    started = time.monotonic()
    last = _run_workers(run.preset, job, run.command, on_step or (lambda line: None))
    if not job.model_folder.is_dir():
        raise TrainingError("the workers ended without a model", hint=f"see {job.logs_folder}")
    seconds = time.monotonic() - started
    return TrainReport(job.model_folder, job.metrics_file, run.plan.steps, run.plan.samples, last.get("loss"), seconds)


def load_train_preset(name: str, overrides: Sequence[str], devices: int | None) -> Preset:
    """The preset, checked to be one for training."""
    preset = load_preset(name, overrides, devices)
    if preset.train is None:
        raise ConfigError(f"{name} is a preset for asking, not for training", hint="see `llavanext presets list`")
    return preset


def _absolute(preset: str) -> str:
    """A preset given as a file must be found from the workers' folder too."""
    return str(Path(preset).resolve()) if Path(preset).is_file() else preset


def _make_out(job: Job, force: bool) -> None:
    """An empty folder for the run. `force` replaces an earlier run, and nothing that is none."""
    if job.out.is_file() or (job.out.is_dir() and any(job.out.iterdir())):
        if not job.file.is_file():
            raise LlavaNextError(f"{job.out} holds something that is no training run", hint="choose another --out")
        if not force:
            raise LlavaNextError(f"{job.out} already holds a run", hint="choose another --out, or add --force")
        shutil.rmtree(job.out)
    try:
        job.libraries_folder.mkdir(parents=True)
        job.checkpoints_folder.mkdir()
    except OSError as fault:
        raise LlavaNextError(f"{job.out} cannot be made: {fault.strerror}", hint="choose another --out") from fault


def worker_command(preset: Preset, job: Job) -> tuple[str, ...]:
    """The command that starts all workers of this machine."""
    worker = [str(Path(__file__).with_name("worker.py")), str(job.file)]
    devices = preset.parallel.devices
    if devices == 1:
        return (sys.executable, *worker)
    msrun = Path(sys.executable).with_name("msrun")
    if not msrun.is_file():
        raise RuntimeMissingError(f"msrun is not beside {sys.executable}", hint="run `pip install mindspore==2.9.0`")
    return (
        str(msrun),
        f"--worker_num={devices}",
        f"--local_worker_num={devices}",
        "--master_addr=127.0.0.1",
        f"--master_port={_free_port()}",
        f"--log_dir={job.logs_folder}",
        "--join=True",
        *worker,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _environment(preset: Preset, job: Job) -> dict[str, str]:
    """msrun starts `python` from PATH: ours must come first. Threads are shared between the workers of a CPU."""
    environment = os.environ | library_environment(job.libraries_folder, verbose=True)
    environment["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), environment.get("PATH", "")])
    package_root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [package_root, environment.get("PYTHONPATH", "")]))
    if preset.runtime.target == "CPU":
        environment["OMP_NUM_THREADS"] = str(share_threads(preset.runtime.threads, preset.parallel.devices))
    return environment


def _run_workers(preset: Preset, job: Job, command: tuple[str, ...], on_step: StepCallback) -> dict[str, Any]:
    """Run to the end, handing on metrics as they come; returns the last line of them."""
    output = job.logs_folder / ("worker_0.log" if preset.parallel.devices == 1 else "msrun.log")
    last: dict[str, Any] = {}
    lines = _follow(job.metrics_file)
    with output.open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=job.libraries_folder,
            env=_environment(preset, job),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            with _terminated_like_interrupted():
                while process.poll() is None:
                    time.sleep(POLL_SECONDS)
                    for last in lines.read():
                        on_step(last)
        finally:
            _end(process)
    for last in lines.read():
        on_step(last)
    if process.returncode:
        raise _failure(job, process.returncode)
    return last


class _follow:
    """The complete lines of a growing JSON Lines file, each once."""

    def __init__(self, file: Path):
        self.file, self.offset = file, 0

    def read(self) -> Iterator[dict[str, Any]]:
        with contextlib.suppress(FileNotFoundError), self.file.open("rb") as stream:
            stream.seek(self.offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield json.loads(line)


@contextlib.contextmanager
def _terminated_like_interrupted() -> Iterator[None]:
    """While workers run, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that they are ended too."""

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, interrupt)
    except ValueError:  # not the main thread: whoever runs us there handles signals
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the workers with everything they started; none is left when this returns."""
    if process.poll() is not None and not _group_alive(process.pid):
        return
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + END_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None and not _group_alive(process.pid):
                return
            time.sleep(POLL_SECONDS)


def _group_alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def _failure(job: Job, code: int) -> LlavaNextError:
    """The earliest thing that went wrong in any worker."""
    records = []
    for file in job.logs_folder.glob("failure_*.json"):
        with contextlib.suppress(ValueError):
            records.append(json.loads(file.read_text(encoding="utf-8")))
    if not records:
        ending = f"was ended by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
        return TrainingError(f"a worker {ending} and left no traceback", hint=f"see the logs in {job.logs_folder}")
    first = min(records, key=lambda record: record["time"])
    hint = first["hint"] or f"see {job.logs_folder}/worker_{first['rank']}.log"
    details = [] if first["known"] else first["traceback"].rstrip().splitlines()[-12:]
    return TrainingError(f"worker {first['rank']} failed: {first['what'].splitlines()[0]}", hint=hint, details=details)
