"""A run that is ended in the middle leaves no process behind, and is resumed as if never interrupted."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.launching.processes import MARK
from llavanext_cli.training.run_checkpoints import find_run_state
from tests.integration.test_train import COMMON, losses

STEPS = 20
SETTINGS = ["--devices", "2", "--set", f"train.steps={STEPS}", "--set", "train.batch_size=2"]
SETTINGS += ["--set", "train.log_every=1", "--set", "train.save_every=6", "--set", "train.keep=1"]


@pytest.fixture(scope="module")
def command(data, tiny_checkpoint):
    """The words of a run of two workers; what is compared with what must have been started by the same."""

    def words(out: Path, *more) -> list[str]:
        start = [sys.executable, "-m", "llavanext_cli", "train", "tiny-stage2", "--data", data]
        return [*map(str, [*start, "--checkpoint", tiny_checkpoint, "--out", out, *COMMON, *SETTINGS, *more])]

    return words


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory, command):
    out = tmp_path_factory.mktemp("whole") / "run"
    done = finish(command(out, "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["model"], report["steps"]) == (str(out / "model"), STEPS)
    assert report["loss"] == pytest.approx(losses(out)[-1])
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000018"]
    return out


def start_and_wait(words: list[str], out: Path, step: int) -> subprocess.Popen:
    """Start, and wait until that step is logged."""
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    metrics = out / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if metrics.is_file() and metrics.read_text().count("\n") >= step:
            return process
        time.sleep(0.02)
    process.kill()
    pytest.fail(f"step {step} was not reached: {process.communicate()[1]}")


def marked(out: Path) -> list[str]:
    """Command lines of living processes that this run started."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if MARK.encode() in (entry / "environ").read_bytes():
                    line = (entry / "cmdline").read_bytes().decode()
                    found += [line] if str(out) in line else []
            except OSError:
                continue
    return found


def assert_same_losses(out: Path, uninterrupted: Path) -> None:
    ours, theirs = losses(out), losses(uninterrupted)
    assert len(ours) == len(theirs) == STEPS
    assert [json.loads(line)["step"] for line in (out / "metrics.jsonl").open()] == list(range(1, STEPS + 1))
    np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def finish(words: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.slow
def test_a_worker_is_killed_then_ctrl_c_then_the_end(command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start_and_wait(command(out), out, 9)
    assert marked(out)
    os.kill(int((out / "logs" / "worker_1.pid").read_text()), signal.SIGKILL)
    killed = time.monotonic()
    _, talk = process.communicate(timeout=60)
    assert time.monotonic() - killed < 30
    assert process.returncode == 1
    assert "Error: worker 1 was killed by SIGKILL and left no traceback\n" in talk
    assert "--resume" in talk
    assert marked(out) == []
    assert [path.name for path in (out / "checkpoints").glob("step-*")] == ["step-00000006"]

    changed = finish(command(out, "--resume", "--set", "train.learning_rate=1e-4"))
    assert changed.returncode == 1
    assert "train.learning_rate: 0.0015 until now, 0.0001 with this command" in changed.stderr

    talk = stop(start_and_wait(command(out, "--resume"), out, 15), signal.SIGINT, 130)
    assert "resuming after step 6 of 20" in talk
    assert marked(out) == []
    (saved,) = (out / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) >= 15
    assert f"stopped by Ctrl-C; the newest checkpoint is {saved.name}" in talk

    # A checkpoint that was damaged is skipped, here for the start of the run.
    shutil.copytree(out / "checkpoints", tmp_path / "damaged")
    state = tmp_path / "damaged" / saved.name / "training" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-4] + b"oops")
    found, damaged = find_run_state(tmp_path / "damaged")
    assert found is None
    assert ["is damaged" in what for what in damaged.values()] == [True]

    resumed = finish(command(out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_losses(out, uninterrupted)
    for file in ("model-00001-of-00001.safetensors", "llavanext_manifest.json"):
        assert (out / "model" / file).read_bytes() == (uninterrupted / "model" / file).read_bytes()

    again = finish(command(out, "--resume"))
    assert again.returncode == 1
    assert "is finished" in again.stderr


@pytest.mark.full
def test_sigterm_saves_the_step_it_is_at(command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start_and_wait(command(out), out, 9)
    talk = stop(process, signal.SIGTERM, 143)
    assert marked(out) == []
    (saved,) = (out / "checkpoints").glob("step-*")
    assert int(saved.name[5:]) >= 9
    assert saved.name in talk
    resumed = finish(command(out, "--resume"))
    assert resumed.returncode == 0, resumed.stderr
    assert_same_losses(out, uninterrupted)


@pytest.mark.full
def test_one_worker_with_the_doubled_batch_gives_the_losses_of_two(command, uninterrupted, tmp_path):
    out = tmp_path / "run"
    done = finish(command(out, "--devices", "1", "--set", "train.batch_size=4"))
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(out), losses(uninterrupted), rtol=1e-4)


@pytest.mark.full
def test_a_signal_after_the_last_step_ends_a_run_that_is_finished(command, tmp_path):
    out = tmp_path / "run"
    one = [*command(out), "--devices", "1", "--set", "train.steps=3", "--set", "train.save_every=0"]
    talk = stop(start_and_wait(one, out, 3), signal.SIGTERM, 0)
    assert (out / "model" / "config.json").is_file()
    assert "Trained 3 steps" in talk


def stop(process: subprocess.Popen, number: int, code: int) -> str:
    """Send the signal; what the command says until it ends, within 10 seconds and with that code."""
    process.send_signal(number)
    begun = time.monotonic()
    _, talk = process.communicate(timeout=60)
    assert time.monotonic() - begun < 10
    assert process.returncode == code, talk
    return talk
