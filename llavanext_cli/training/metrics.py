"""The callback of a training run: metrics.jsonl, checkpoints, and a stop when the loss is no number any more."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

from mindspore import Callback

from llavanext_cli.errors import TrainingError

BAD_LOSSES = 3
"""Consecutive steps whose loss is not a number before a run is stopped."""


class SaveCheckpoint(Protocol):
    """Writes the weights as a folder."""

    def __call__(self, folder: Path, step: int) -> None: ...


class TrainingMonitor(Callback):
    """Write one line of metrics a step, and checkpoints on the way.

    Args:
        metrics: the file the lines are appended to; None on every worker but the first.
        steps: optimizer steps of the run.
        global_batch: samples a step, over all workers.
        log_every, save_every: steps between lines, and between checkpoints (0: none on the way).
        save: writes one checkpoint folder.
        checkpoints: folder that holds them.
        keep: newest checkpoints that stay.
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
    ):
        super().__init__()
        self.metrics = metrics
        self.steps, self.global_batch = steps, global_batch
        self.log_every, self.save_every = log_every, save_every
        self.save, self.checkpoints, self.keep = save, checkpoints, keep
        self.bad_losses = 0
        self.started = self.step_started = time.monotonic()

    def on_train_begin(self, run_context) -> None:
        self.started = self.step_started = time.monotonic()

    def on_train_step_end(self, run_context) -> None:
        call = run_context.original_args()
        step = call.cur_step_num
        loss, overflow, _, rate, norm = (_number(value) for value in call.net_outputs)
        now = time.monotonic()
        seconds, self.step_started = now - self.step_started, now
        self._check_loss(step, loss)
        if self.metrics is None:
            return
        if step % self.log_every == 0 or step in (1, self.steps):
            line = {
                "step": step,
                "steps": self.steps,
                "loss": loss,
                "learning_rate": rate,
                "gradient_norm": norm,
                "skipped": bool(overflow),
                "samples_per_second": round(self.global_batch / seconds, 3),
                "seconds": round(now - self.started, 3),
            }
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        if self.save_every and step % self.save_every == 0 and step < self.steps:
            self.save(self.checkpoints / f"step-{step:08d}", step)
            _keep_newest(self.checkpoints, self.keep)

    def _check_loss(self, step: int, loss: float | None) -> None:
        good = loss is not None and math.isfinite(loss)
        self.bad_losses = 0 if good else self.bad_losses + 1
        if self.bad_losses == BAD_LOSSES:
            raise TrainingError(
                f"the loss has not been a number for {BAD_LOSSES} steps, up to step {step}",
                hint="lower train.learning_rate with --set, and check the data with `llavanext mix --check full`",
            )


def _number(value: Any) -> float | None:
    """A step's output as a number: MindSpore gives tensors of shape () or (1,), booleans, or None."""
    if value is None:
        return None
    return float(value.asnumpy().reshape(-1)[0]) if hasattr(value, "asnumpy") else float(value)


def _keep_newest(folder: Path, keep: int) -> None:
    import shutil

    for old in sorted(folder.glob("step-*"))[:-keep]:
        shutil.rmtree(old)
