"""The page with a run's curves."""

import json
import math
import re

import pytest

from llavanext_cli.training.job import TrainJob
from llavanext_cli.training.plan import RunPlan
from llavanext_cli.training.train_report import smooth, write_report


@pytest.fixture
def job(tmp_path):
    return TrainJob("tiny-stage2", ("train.steps=40", "a=<b>"), None, tmp_path / "data", tmp_path / "base", tmp_path)


def line(step: int, loss: float | None = None) -> str:
    values = {"loss": loss, "learning_rate": 1e-3 / step, "gradient_norm": None, "skipped": loss is None}
    return json.dumps({"step": step, "steps": 40, **values, "samples_per_second": 3.5, "seconds": 1.0})


def test_curves_of_the_whole_run_in_one_file_that_loads_nothing(job):
    lines = [line(step, 5 / step if step != 7 else None) for step in range(1, 31)]
    job.metrics_file.write_text("\n".join([*lines, '{"step": 31, "lo']))
    write_report(job, RunPlan(80, 4, 40, 2.0), skipped=3)
    text = job.report_file.read_text()
    titles = ["Loss", "Learning rate", "Throughput (samples a second)"]  # no norm was finite
    assert re.findall("<h2>(.*?)</h2>", text) == titles
    assert [len(found.split()) for found in re.findall('points="(.*?)"', text)] == [29, 29, 30, 30]
    assert "30 of 40" in text and "<td>3</td>" in text and "a=&lt;b&gt;" in text
    assert not re.search("https?://|<script|<link|src=", text)
    assert [path.name for path in job.out.iterdir()] == ["metrics.jsonl", "train_report.html"]


def test_a_run_without_a_step_has_no_report(job):
    write_report(job, RunPlan(80, 4, 40, 2.0))
    assert not job.report_file.exists()
    assert list(job.out.iterdir()) == []


def test_the_mean_of_the_last_points():
    assert smooth([(1, 1.0), (2, math.nan), (3, 3.0), (4, 8.0)], width=2) == [(1, 1.0), (3, 2.0), (4, 5.5)]
