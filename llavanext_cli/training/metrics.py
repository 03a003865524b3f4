"""The callback of a training run: writes metrics and checkpoints, and stops a run whose loss is NaN or infinite."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspore import Callback

from llavanext_cli.errors import CheckpointError, TrainingError
from llavanext_cli.training.run_checkpoints import keep_newest, step_folder

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Train
    from llavanext_cli.training.plan import RunPlan

BAD_LOSSES = 3
"""Consecutive steps whose loss is NaN or infinite before a run is stopped."""


class TrainingMonitor(Callback):
    """Write metrics of the steps, and checkpoints.

    Args:
        metrics: the file that lines are appended to; None on every worker but the first.
        checkpoints: folder for the checkpoints.
        plan: steps, and samples a step.
        train: how often metrics and checkpoints are written, and how many are kept.
        first: steps that were done before this start.
        begin: called with the training cell before the first step.
        save: writes a checkpoint as a folder after a step; called by every worker.
        batch: step → the ids of its samples over all workers, for messages.
        warn: called with a line that the user should see.
        should_stop: step → whether to save it and end the run; called by every worker.
    """

    def __init__(
        self,
        metrics: Path | None,
        checkpoints: Path,
        plan: RunPlan,
        train: Train,
        *,
        first: int = 0,
        begin: Callable[[Any], None] = lambda cell: None,
        save: Callable[[Path, int], None] = lambda folder, step: None,
        batch: Callable[[int], Sequence[str]] = lambda step: (),
        warn: Callable[[str], None] = lambda line: None,
        should_stop: Callable[[int], bool] = lambda step: False,
    ):
        super().__init__()
        self.metrics, self.checkpoints, self.plan, self.train, self.first = metrics, checkpoints, plan, train, first
        self.begin, self.save, self.batch, self.warn, self.should_stop = begin, save, batch, warn, should_stop
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
        if self.metrics is not None and (step % self.train.log_every == 0 or step in (self.first + 1, self.plan.steps)):
            line = {
                "step": step,
                "steps": self.plan.steps,
                "loss": loss if math.isfinite(loss) else None,
                "learning_rate": rate,
                "gradient_norm": norm if norm is not None and math.isfinite(norm) else None,
                "skipped": bool(overflow),
                "samples_per_second": round(self.plan.global_batch / seconds, 3),
                "seconds": round(now - self.started, 3),
            }
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if step == self.plan.steps:  # the model is written next
            return
        stopping = self.should_stop(step)
        due = self.train.save_every and step % self.train.save_every == 0
        if (stopping or due) and not self.bad_steps:  # a checkpoint of bad weights must not replace the last good one
            self._save(step)
        if stopping and self.metrics is not None:  # the launcher ends the others after the first
            raise SystemExit(143)

    def _save(self, step: int) -> None:
        """A full disk does not end the run: the last good checkpoint stays, and the next one is tried again."""
        try:
            self.save(step_folder(self.checkpoints, step), step)
        except CheckpointError as fault:
            kept = "the earlier ones are kept, " if any(self.checkpoints.glob("step-*")) else ""
            self.warn(f"no checkpoint at step {step}: {fault.what}; {kept}training continues")
            return
        if self.metrics is not None:
            keep_newest(self.checkpoints, self.train.keep)
        self.step_started = time.monotonic()  # the time of saving is not the next step's

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
