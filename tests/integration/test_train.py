"""`llavanext train` when all is well: what a run writes and learns, and what `--dry-run` prints."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file
from typer.testing import CliRunner

from llavanext_cli.app import app
from tests.integration.conftest import sample, write_samples

COMMON = ["--set", "data.seq_length=256", "--set", "data.tiles=5", "--set", "data.frames=4"]


def start(run, data, checkpoint, out, *more):
    """Twenty-step training commands differ in little."""
    return run("train", "tiny-stage2", "--data", data, "--checkpoint", checkpoint, "--out", out, *COMMON, *more)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, np.ndarray]:
    return load_file(next(folder.glob("*.safetensors")))


def test_a_run_writes_what_the_readme_lists(demo):
    names = {path.name for path in demo.run.iterdir()}
    files = {"job.json", "mindformers.yaml", "metrics.jsonl", "train_report.html"}
    assert names == files | {"checkpoints", "model", "logs"}
    assert "4 of 4" in (demo.run / "train_report.html").read_text()
    line = json.loads((demo.run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "learning_rate", "gradient_norm", "samples_per_second", "seconds"} <= line.keys()


def test_the_loss_falls_and_every_part_is_trained(demo):
    run = demo.folder / "runs" / "stage2"
    assert losses(run)[-1] < losses(run)[0]
    before, after = weights(demo.base), weights(run / "model")
    assert before.keys() == after.keys()
    for name in ("vision_tower.embeddings.class_embedding", "projector.linear_1.weight", "image_newline"):
        assert np.abs(before[name] - after[name]).max() > 0, name


@pytest.mark.full
def test_a_frozen_part_stays_the_same_to_the_bit(run_llavanext, data, tiny_checkpoint):
    settings = ["--set", "train.trainable=[projector,newline]", "--set", "train.steps=3", "--set", "train.batch_size=4"]
    done = start(run_llavanext, data, tiny_checkpoint, "run", *settings)
    assert done.returncode == 0, done.stderr
    before, after = weights(tiny_checkpoint), weights(run_llavanext.folder / "run" / "model")
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if name.startswith(("projector.", "image_newline"))}


def test_dry_run_prints_command_and_configuration_and_writes_nothing(data, tiny_checkpoint, tmp_path):
    words = [
        "train",
        "tiny-stage2",
        "--data",
        data,
        "--checkpoint",
        tiny_checkpoint,
        "--out",
        tmp_path / "run",
        *COMMON,
    ]
    words += ["--dry-run", "--devices", "2", "--set", "train.batch_size=4"]
    done = CliRunner().invoke(app, [*map(str, words)])
    assert done.exit_code == 0, done.stderr
    command, _ = done.stdout.split("\n", 1)
    assert command.startswith("# ") and "msrun --worker_num=2" in command
    config = yaml.safe_load(done.stdout)
    assert config["parallel_config"]["data_parallel"] == 2
    assert config["lr_schedule"]["total_steps"] == 24, "4 epochs of 48 samples, 8 a step"

    report = json.loads(CliRunner().invoke(app, [*map(str, words), "--json"]).stdout)
    assert report["config"] == config and report["steps"] == 24
    assert "--worker_num=2" in report["command"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_an_image_that_breaks_after_the_checks_is_named_by_its_worker(run_llavanext, tmp_path, media, tiny_checkpoint):
    """Its header is whole, so only decoding finds it."""
    bad = tmp_path / "media"
    bad.mkdir()
    whole = (media / "5.png").read_bytes()
    (bad / "cut.png").write_bytes(whole[: len(whole) // 2])
    lines = [sample(f"s{n}", "image", "cut.png", "what?", "a cat") for n in range(8)]
    file = write_samples(tmp_path / "data.jsonl", bad, lines)
    done = start(run_llavanext, file, tiny_checkpoint, "run", "--set", "train.batch_size=4")
    assert done.returncode == 1
    assert "cut.png" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (run_llavanext.folder / "run" / "model").exists()
