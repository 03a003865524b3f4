"""Start the workers of a training run, pass on what they write, and report the result or why they failed.

The workers are processes of their own on any number of devices. MindSpore is imported by them alone.
"""

from __future__ import annotations

import contextlib
import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from llavanext_cli.errors import LlavaNextError, TrainingError
from llavanext_cli.launching.msrun import worker_environment
from llavanext_cli.launching.processes import POLL_SECONDS, SAVE_SECONDS, Workers
from llavanext_cli.model.runtime import share_threads
from llavanext_cli.signals import raise_on_termination
from llavanext_cli.training.failures import explain_failure, explain_stop
from llavanext_cli.training.job import TrainJob
from llavanext_cli.training.node_status import NodeStatus
from llavanext_cli.training.ready_run import ReadyRun
from llavanext_cli.training.run_checkpoints import find_unfinished
from llavanext_cli.training.run_folder import claim_out, make_out, resume_run
from llavanext_cli.training.stopping import GracefulStop
from llavanext_cli.training.train_report import write_report

StepCallback = Callable[[dict[str, Any]], None]
LineCallback = Callable[[str], None]


@dataclass(frozen=True)
class TrainReport:
    """The trained model's folder, files with the metrics and their curves, steps, samples, last loss, seconds of
    training, and how many times a sample was skipped because it could not be read."""

    model: Path
    metrics: Path
    curves: Path
    steps: int
    samples: int
    loss: float | None
    seconds: float
    skipped: int = 0


def run_training(
    run: ReadyRun, on_step: StepCallback = lambda line: None, say: LineCallback = lambda line: None
) -> TrainReport:
    """Train.

    Args:
        run: from `check_training`.
        on_step: called with each line of metrics.
        say: called with each line that the user should see at once.

    Raises:
        RunStoppedError: Ctrl-C or SIGTERM ended the run; it can be resumed.
        LlavaNextError: OUT holds something, or a worker failed; logs stay in OUT/logs.
    """
    first_node = run.request.nodes.rank == 0
    with claim_out(run.request):
        job = _prepare(run, say)
        started = time.monotonic()
        try:
            last = _Launch(run, job, on_step, say).run()
        finally:
            skipped = len(job.skipped_file.read_bytes().splitlines()) if job.skipped_file.is_file() else 0
            if first_node:
                try:
                    write_report(job, run.plan, skipped)
                except OSError as fault:
                    say(f"{job.report_file.name} cannot be written: {fault.strerror}")
    if first_node and not job.model_folder.is_dir():
        raise TrainingError("the workers ended without writing a model", f"see {job.logs_folder}")
    seconds = time.monotonic() - started
    if skipped:
        say(f"samples that could not be read were skipped {skipped} times: see {job.skipped_file}")
    return TrainReport(
        job.model_folder,
        job.metrics_file,
        job.report_file,
        run.plan.steps,
        run.plan.samples,
        last.get("loss"),
        seconds,
        skipped,
    )


def _prepare(run: ReadyRun, say: LineCallback) -> TrainJob:
    """The folder of the run with all that its workers read."""
    request, job, node = run.request, run.job, run.request.nodes.rank
    if node > 0:
        job.libraries_folder.mkdir(parents=True, exist_ok=True)
    elif request.resume and job.file.is_file():
        job = resume_run(job, run.preset, run.plan, say)
    else:
        make_out(request, job)
        if request.resume:
            say(f"{job.out} holds no training run yet: starting at step 1")
    for rank in request.nodes.ranks(run.preset.parallel.devices):  # those of other nodes may be new
        for stale in (f"failure_{rank}.json", f"worker_{rank}.pid"):
            (job.logs_folder / stale).unlink(missing_ok=True)
    job.save(node)
    if node == 0:
        GracefulStop(job.stop_file, 0, 1).reset()
        job.config_file.write_text(yaml.safe_dump(run.expanded, sort_keys=False), encoding="utf-8")
    return job


class _Launch:
    """One start of this machine's workers."""

    def __init__(self, run: ReadyRun, job: TrainJob, on_step: StepCallback, say: LineCallback):
        self.request, self.preset, self.command, self.job = run.request, run.preset, run.command, job
        self.devices = run.preset.parallel.devices
        self.on_step, self.say = on_step, say
        self.metrics, self.warnings = NewLines(job.metrics_file), NewLines(job.warnings_file)
        self.node_status = NodeStatus(job, run.request.nodes)
        self.last: dict[str, Any] = {}
        self.said_saving = False

    def run(self) -> dict[str, Any]:
        """Run to the end; the last line of metrics."""
        with raise_on_termination(KeyboardInterrupt), self._start() as workers:
            try:
                while (code := workers.poll()) is None:
                    time.sleep(POLL_SECONDS)
                    self._pass_on()
                    if ended := self.node_status.heard():
                        workers.stop(self._saving)
                        self._pass_on()
                        hint = "resume it with the same commands and --resume, on every node"
                        raise self._announced(TrainingError(ended, hint))
            except KeyboardInterrupt as interrupt:
                self._stop(workers, interrupt.args[0] if interrupt.args else signal.SIGINT)
                return self.last
            ended = workers.find_ended()
        self._pass_on()
        if code:
            raise self._announced(explain_failure(self.job, self.request.nodes, self.devices, code, ended))
        return self.last

    def _start(self) -> Workers:
        nodes, job = self.request.nodes, self.job
        on_cpu = self.preset.runtime.target == "CPU"
        threads = share_threads(self.preset.runtime.threads, self.devices // nodes.count) if on_cpu else None
        return Workers(
            self.command,
            log=job.logs_folder / ("worker_0.log" if self.devices == 1 else f"msrun_{nodes.rank}.log"),
            pids=job.logs_folder,
            ranks=nodes.ranks(self.devices),
            environment=worker_environment(job.libraries_folder, threads),
            folder=job.libraries_folder,
        )

    def _stop(self, workers: Workers, number: int) -> None:
        """End the run after its next step, which is saved.

        Raises:
            RunStoppedError: unless all steps were done, and the model has been written meanwhile.
        """
        with contextlib.suppress(KeyboardInterrupt):  # a second Ctrl-C ends the waiting
            if self.request.nodes.rank > 0:  # the first worker cannot finish its step without ours
                self.node_status.tell("stopped by a signal")
                self.node_status.wait(SAVE_SECONDS + 1, self._saving)
            workers.stop(self._saving)
        self._pass_on()
        if not self.job.model_folder.is_dir():
            raise self._announced(explain_stop(self.job, number)) from None

    def _announced(self, fault: LlavaNextError) -> LlavaNextError:
        """The fault, after announcing it to the other nodes."""
        self.node_status.tell(fault.what)
        return fault

    def _pass_on(self) -> None:
        for line in self.metrics.read():
            self.last = json.loads(line)
            self.on_step(self.last)
        for line in self.warnings.read():
            self.say(line)

    def _saving(self) -> bool:
        busy = bool(find_unfinished(self.job.checkpoints_folder, self.job.model_folder))
        if busy and not self.said_saving:
            self.said_saving = True
            self.say("saving what is trained; Ctrl-C ends at once")
        return busy


class NewLines:
    """The complete lines that are added to a file from now on, each once."""

    def __init__(self, file: Path):
        self.file = file
        self.offset = file.stat().st_size if file.is_file() else 0

    def read(self) -> Iterator[str]:
        with contextlib.suppress(FileNotFoundError), self.file.open("rb") as stream:
            # Another node may have shortened it to the checkpoint that it resumes from.
            self.offset = min(self.offset, self.file.stat().st_size)
            stream.seek(self.offset)
            for line in stream:
                if not line.endswith(b"\n"):
                    return
                self.offset += len(line)
                yield line.decode().rstrip("\n")
