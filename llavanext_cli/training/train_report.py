"""`train_report.html`: the curves of a run, drawn from its metrics when it ends for any reason."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.files import write_whole
from llavanext_cli.plots import curve, facts, page

if TYPE_CHECKING:
    from llavanext_cli.training.job import TrainJob
    from llavanext_cli.training.plan import RunPlan

SMOOTHED = 20
"""Logged steps over which the second line of the loss is averaged."""


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, without one that was cut off; none when the file is missing."""
    lines = []
    with contextlib.suppress(FileNotFoundError):
        for text in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                lines.append(json.loads(text))
    return lines


def write_report(job: TrainJob, plan: RunPlan, skipped: int = 0) -> None:
    """Draw the metrics of a run, those from before it was resumed too. Without any there is no report.

    Args:
        plan: steps and samples of the whole run.
        skipped: how many times a sample could not be read.

    Raises:
        OSError: the report cannot be written.
    """
    lines = read_metrics(job.metrics_file)
    if not lines:
        return
    last = lines[-1]
    losses = _points(lines, "loss")
    text = page(
        f"llavanext train {Path(job.preset).name}",
        facts(
            {
                "steps": f"{last['step']} of {plan.steps}",
                "samples": f"{plan.samples}, {plan.global_batch} a step, {plan.epochs:.2f} epochs",
                "last loss": "NaN" if last["loss"] is None else f"{last['loss']:.4f}",
                "steps without finite gradients": sum(line["skipped"] for line in lines),
                "samples that could not be read": skipped,
                "data": job.data,
                "started from": job.checkpoint,
                "changes": " ".join(job.overrides) or "none",
            }
        ),
        curve("Loss", {"as logged": losses, f"mean of {SMOOTHED}": smooth(losses)}),
        curve("Learning rate", {"rate": _points(lines, "learning_rate")}),
        curve("Throughput (samples a second)", {"samples/s": _points(lines, "samples_per_second")}),
        curve("Norm of the gradient", {"norm": _points(lines, "gradient_norm")}),
    )
    write_whole(job.report_file, text.encode())


def smooth(points: list[tuple[float, float]], width: int = SMOOTHED) -> list[tuple[float, float]]:
    """The mean of each point and those before it, at most `width`. NaN and infinite points are left out."""
    kept = [point for point in points if math.isfinite(point[1])]
    means = []
    for end in range(1, len(kept) + 1):
        window = kept[max(0, end - width) : end]
        means.append((kept[end - 1][0], sum(y for _, y in window) / len(window)))
    return means


def _points(lines: list[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    return [(line["step"], math.nan if line.get(key) is None else line[key]) for line in lines]
