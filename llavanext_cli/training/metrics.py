"""The callback of a training run: writes metrics and checkpoints, and stops a run whose loss is NaN or infinite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

from mindspore import Callback

from llavanext_cli.errors import CheckpointError, TrainingError
from llavanext_cli.training.state import keep_newest, step_folder

BAD_LOSSES = 3
"""Consecutive steps whose loss is NaN or infinite before a run is stopped."""


class SaveCheckpoint(Protocol):
    """Writes weights and state as a folder."""

    def __call__(self, folder: Path, step: int) -> None: ...


class TrainingMonitor(Callback):
    """Write one line of metrics a step, and checkpoints on the way.

    Args:
        metrics: the file the lines are appended to; None on every worker but the first.
        steps: optimizer steps of the run.
        global_batch: samples a step, over all workers.
        log_every, save_every: steps between lines, and between checkpoints (0: none on the way).
        save: writes one checkpoint folder; called by every worker.
        checkpoints: folder that holds them.
        keep: newest checkpoints that stay.
        first: steps that were done before this start.
        begin: called with the training cell before the first step; fills in the state of a run that goes on.
        batch: step → the ids of its samples over all workers, for messages.
        warn: called with a line that the user should see.
        should_stop: step → whether to save, and end, after it; asked by every worker.
    """

    def __init__(
        self,
        metrics: Path | None,
        *,
        steps: int,
        global_batch: int,
        log_every: int,
        save_every: int,
        save: SaveCheckpoint,
        checkpoints: Path,
        keep: int,
        first: int = 0,
        begin: Callable[[Any], None] = lambda cell: None,
        batch: Callable[[int], Sequence[str]] = lambda step: (),
        warn: Callable[[str], None] = lambda line: None,
        should_stop: Callable[[int], bool] = lambda step: False,
    ):
        super().__init__()
        self.metrics = metrics
        self.steps, self.global_batch, self.first = steps, global_batch, first
        self.log_every, self.save_every = log_every, save_every
        self.save, self.checkpoints, self.keep = save, checkpoints, keep
        self.begin, self.batch, self.warn, self.should_stop = begin, batch, warn, should_stop
        self.bad_steps: list[int] = []
        self.started = self.step_started = time.monotonic()

    def on_train_begin(self, run_context) -> None:
        self.begin(run_context.original_args().train_network)
        self.started = self.step_started = time.monotonic()

    def on_train_step_end(self, run_context) -> None:
        call = run_context.original_args()
        step = self.first + call.cur_step_num
        loss, overflow, _, rate, norm = (_number(value) for value in call.net_outputs)
        now = time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        self._check_loss(step, loss)
        logged = step % self.log_every == 0 or step in (self.first + 1, self.steps)
        if self.metrics is not None and logged:
            line = {
                "step": step,
                "steps": self.steps,
                "loss": loss if math.isfinite(loss) else None,
                "learning_rate": rate,
                "gradient_norm": norm if norm is not None and math.isfinite(norm) else None,
                "skipped": bool(overflow),
                "samples_per_second": round(self.global_batch / seconds, 3),
                "seconds": round(now - self.started, 3),
            }
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        stopping = self.should_stop(step) and step < self.steps
        due = self.save_every and step % self.save_every == 0 and step < self.steps
        if (stopping or due) and not self.bad_steps:  # weights that are spoilt must not push out the last good ones
            self._save(step)
        if stopping and self.metrics is not None:  # the others are ended with the first
            raise SystemExit(143)

    def _save(self, step: int) -> None:
        """A disk that is full ends no run: the last good checkpoint stays, and the next one is tried again."""
        try:
            self.save(step_folder(self.checkpoints, step), step)
        except CheckpointError as fault:
            kept = "the earlier ones are kept, " if any(self.checkpoints.glob("step-*")) else ""
            self.warn(f"no checkpoint at step {step}: {fault.what}; {kept}training goes on")
            return
        if self.metrics is not None:
            keep_newest(self.checkpoints, self.keep)
        self.step_started = time.monotonic()  # saving is no part of the next step's time

    def _check_loss(self, step: int, loss: float) -> None:
        if math.isfinite(loss):
            self.bad_steps.clear()
            return
        self.bad_steps.append(step)
        if len(self.bad_steps) == BAD_LOSSES:
            raise TrainingError(
                f"the loss was NaN or infinite for {BAD_LOSSES} steps, up to step {step}",
                hint="lower train.learning_rate with --set, and check the data with `llavanext mix --check full`",
                details=[f"step {bad} had the samples {', '.join(self.batch(bad))}" for bad in self.bad_steps],
            )


def _number(value: Any) -> float | None:
    """A step's output as a number: MindSpore gives tensors of shape () or (1,), booleans, or None."""
    if value is None:
        return None
    return float(value.asnumpy().reshape(-1)[0]) if hasattr(value, "asnumpy") else float(value)
