"""`llavanext train` as a user runs it: workers, losses, what is written and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from safetensors.numpy import load_file

from tests.integration.conftest import sample, write_samples

COMMON = ["--set", "data.seq_length=256", "--set", "data.tiles=5", "--set", "data.frames=4"]


def start(run, data, checkpoint, out, *more):
    """Twenty-step training commands differ in little."""
    return run("train", "tiny-stage2", "--data", data, "--checkpoint", checkpoint, "--out", out, *COMMON, *more)


def losses(out: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory, data, tiny_checkpoint):
    """A run of 20 steps of 4 samples on one worker: its folder and its finished process."""
    import subprocess
    import sys

    work = tmp_path_factory.mktemp("one")
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", tiny_checkpoint, "--out", "run", *COMMON]
    words += ["--set", "train.steps=20", "--set", "train.batch_size=4", "--set", "train.log_every=1", "--json"]
    words += ["--set", "train.save_every=8", "--set", "train.keep=1"]
    command = [sys.executable, "-m", "llavanext_cli", *map(str, words)]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return work / "run", done


@pytest.mark.full
def test_two_workers_give_the_losses_of_one_with_the_doubled_batch(one_worker, run_llavanext, data, tiny_checkpoint):
    settings = [
        "--devices",
        "2",
        "--set",
        "train.steps=20",
        "--set",
        "train.batch_size=2",
        "--set",
        "train.log_every=1",
    ]
    done = start(run_llavanext, data, tiny_checkpoint, "two", *settings)
    assert done.returncode == 0, done.stderr
    ours, theirs = losses(run_llavanext.folder / "two"), losses(one_worker[0])
    assert len(ours) == len(theirs) == 20
    np.testing.assert_allclose(ours, theirs, rtol=1e-4)


def test_the_loss_falls_and_every_part_learns(one_worker, tiny_checkpoint):
    run, _ = one_worker
    curve = losses(run)
    assert np.mean(curve[-4:]) < 0.95 * np.mean(curve[:4])
    before = load_file(next(tiny_checkpoint.glob("*.safetensors")))
    after = load_file(next((run / "model").glob("*.safetensors")))
    assert before.keys() == after.keys()
    for name in ("vision_tower.embeddings.class_embedding", "projector.linear_1.weight", "image_newline"):
        assert np.abs(before[name] - after[name]).max() > 0, name


def test_the_run_folder_holds_what_it_says(one_worker):
    run, done = one_worker
    report = json.loads(done.stdout)
    assert Path(report["model"]) == run / "model"
    assert report["steps"] == 20
    assert report["loss"] == pytest.approx(losses(run)[-1])
    names = {path.name for path in run.iterdir()}
    files = {"job.json", "mindformers.yaml", "metrics.jsonl", "train_report.html"}
    assert names == files | {"checkpoints", "model", "logs"}
    assert "20 of 20" in (run / "train_report.html").read_text()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000016"]
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert {"step", "loss", "learning_rate", "gradient_norm", "samples_per_second", "seconds"} <= line.keys()


def test_nothing_is_written_to_the_working_folder_and_libraries_are_silent(one_worker):
    run, done = one_worker
    assert [path.name for path in run.parent.iterdir()] == ["run"]
    assert "WARNING" not in done.stderr + done.stdout
    assert "mindformers" not in done.stderr


@pytest.mark.full
def test_a_frozen_part_stays_the_same_to_the_bit(run_llavanext, data, tiny_checkpoint):
    settings = ["--set", "train.trainable=[projector,newline]", "--set", "train.steps=3", "--set", "train.batch_size=4"]
    done = start(run_llavanext, data, tiny_checkpoint, "run", *settings)
    assert done.returncode == 0, done.stderr
    before = load_file(next(tiny_checkpoint.glob("*.safetensors")))
    after = load_file(next((run_llavanext.folder / "run" / "model").glob("*.safetensors")))
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    assert changed == {name for name in before if name.startswith(("projector.", "image_newline"))}


def refused(run, expected: str, *words, files: int = 0) -> None:
    """The command fails with one clear line and a hint, no traceback, exit code 1, and leaves nothing behind."""
    done = run(*words)
    assert done.returncode == 1, done.stderr
    assert expected in done.stderr
    assert "Hint: " in done.stderr
    assert "Traceback" not in done.stderr
    assert len(list(run.folder.iterdir())) == files


def test_no_such_preset(run_llavanext, data, tiny_checkpoint):
    words = ["train", "tiny-stage9", "--data", data, "--checkpoint", tiny_checkpoint, "--out", "run"]
    refused(run_llavanext, "tiny-stage9", *words)


def test_no_such_checkpoint(run_llavanext, data):
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", "nowhere", "--out", "run"]
    refused(run_llavanext, "nowhere: no such folder", *words)


def test_a_preset_for_asking(run_llavanext, data, tiny_checkpoint):
    words = ["train", "tiny-ask", "--data", data, "--checkpoint", tiny_checkpoint, "--out", "run"]
    refused(run_llavanext, "is a preset for asking", *words)


def test_samples_that_are_too_long(run_llavanext, tmp_path, media, tiny_checkpoint):
    lines = [sample(f"s{n}", "image", "0.png", "what?", "a cat and a bird " * (30 * (n % 2))) for n in range(16)]
    file = write_samples(tmp_path / "data.jsonl", media, lines)
    words = ["train", "tiny-stage2", "--data", file, "--checkpoint", tiny_checkpoint, "--out", "run", *COMMON]
    refused(run_llavanext, "8 of 16 samples have too many tokens", *words)


def test_a_broken_line_of_data_is_named(run_llavanext, tmp_path, media, tiny_checkpoint):
    good = sample("a", "image", "0.png", "what?", "a cat")
    file = write_samples(tmp_path / "bad.jsonl", media, [good, good])
    file.write_text(file.read_text() + '{"id": "broken", \n')
    words = ["train", "tiny-stage2", "--data", file, "--checkpoint", tiny_checkpoint, "--out", "run", *COMMON]
    refused(run_llavanext, "line 4", *words)


def test_a_missing_picture(run_llavanext, tmp_path, media, tiny_checkpoint):
    lines = [sample(f"s{n}", "image", "gone.png", "what?", "a cat") for n in range(16)]
    file = write_samples(tmp_path / "data.jsonl", media, lines)
    words = ["train", "tiny-stage2", "--data", file, "--checkpoint", tiny_checkpoint, "--out", "run", *COMMON]
    refused(run_llavanext, "gone.png", *words)


def test_a_missing_weight_stops_the_run_with_its_name(run_llavanext, tmp_path, data, tiny_checkpoint):
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    manifest = json.loads((broken / "llavanext_manifest.json").read_text())
    del manifest["tensors"]["image_newline"]
    (broken / "llavanext_manifest.json").write_text(json.dumps(manifest))
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", broken, "--out", "run", *COMMON]
    refused(run_llavanext, "image_newline", *words)


def test_an_out_that_holds_something_is_left_alone_even_by_force(run_llavanext, data, tiny_checkpoint):
    (run_llavanext.folder / "run").mkdir()
    (run_llavanext.folder / "run" / "precious.txt").write_text("mine")
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", tiny_checkpoint, "--out", "run", *COMMON]
    words += ["--set", "train.batch_size=4", "--force"]
    refused(run_llavanext, "exists and is not a training run", *words, files=1)
    assert (run_llavanext.folder / "run" / "precious.txt").read_text() == "mine"


def test_an_earlier_run_is_replaced_by_force_only(one_worker, run_llavanext, data, tiny_checkpoint):
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", tiny_checkpoint, "--out", one_worker[0], *COMMON]
    refused(run_llavanext, "already holds a training run", *words, "--set", "train.batch_size=4")
    assert (one_worker[0] / "model" / "config.json").is_file()


def test_dry_run_prints_command_and_configuration_and_writes_nothing(run_llavanext, data, tiny_checkpoint):
    words = ["--dry-run", "--devices", "2", "--set", "train.batch_size=4"]
    done = start(run_llavanext, data, tiny_checkpoint, "run", *words)
    assert done.returncode == 0, done.stderr
    command, _ = done.stdout.split("\n", 1)
    assert command.startswith("# ") and "msrun --worker_num=2" in command
    config = yaml.safe_load(done.stdout)
    assert config["parallel_config"]["data_parallel"] == 2
    assert config["lr_schedule"]["total_steps"] == 24, "4 epochs of 48 samples, 8 a step"
    assert list(run_llavanext.folder.iterdir()) == []

    done = start(run_llavanext, data, tiny_checkpoint, "run", *words, "--json")
    report = json.loads(done.stdout)
    assert report["config"] == config and report["steps"] == 24
    assert "--worker_num=2" in report["command"]


@pytest.mark.slow
def test_a_picture_that_breaks_after_the_checks_is_named_by_its_worker(run_llavanext, tmp_path, media, tiny_checkpoint):
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
