"""What goes wrong before and during a run: its message, its exit code, and that nothing is lost."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.machine import doctor
from llavanext_cli.training.plan import SampleOrder
from llavanext_cli.training.run_checkpoints import open_run_state
from tests.integration.conftest import sample, write_samples
from tests.integration.test_train import COMMON, losses, start


def refused(*words: object, code: int = 1) -> str:
    """What the command says, which must be an error of one line and a hint, before anything was written."""
    done = CliRunner().invoke(app, [str(word) for word in words])
    assert done.exit_code == code, (done.exception, done.stderr)
    lines = done.stderr.splitlines()
    assert sum(line.startswith("Error: ") for line in lines) == sum(line.startswith("Hint: ") for line in lines) == 1
    assert done.stdout == ""
    return done.stderr


@pytest.fixture
def command(data, tiny_checkpoint, tmp_path):
    """Words of a run into tmp_path/run."""

    def words(*more: object, data: Path = data, checkpoint: Path = tiny_checkpoint) -> list[object]:
        out = ["--data", data, "--checkpoint", checkpoint, "--out", tmp_path / "run"]
        return ["train", "tiny-stage2", *out, *COMMON, "--set", "train.batch_size=4", *more]

    yield words
    assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------------------- before it starts


def test_media_that_are_gone_since_mix_are_counted_though_their_sizes_are_known(command, media, tmp_path):
    lines = [sample(f"s{n}", "image", "0.png", "what?", "a cat") for n in range(16)]
    for line in lines[:12]:
        line["media"][0] |= {"path": "gone.png", "size": [28, 28]}
    lines[15] = sample("s15", "video", "gone.mp4", "what?", "a cat")
    said = refused(*command(data=write_samples(tmp_path / "data.jsonl", media, lines)))
    assert "Error: 13 of 16 samples name an image or video that does not exist\n" in said
    assert f"  sample s0: {media / 'gone.png'}\n" in said
    assert "  ... and 3 more\n" in said
    assert "--on-bad skip" in said


def test_a_missing_weight_stops_the_run_with_its_name(command, tiny_checkpoint, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_checkpoint, broken)
    manifest = json.loads((broken / "llavanext_manifest.json").read_text())
    del manifest["tensors"]["image_newline"]
    (broken / "llavanext_manifest.json").write_text(json.dumps(manifest))
    assert "image_newline" in refused(*command(checkpoint=broken))


def test_an_occupied_port(command):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        master = f"127.0.0.1:{taken.getsockname()[1]}"
        said = refused(*command("--devices", 2, "--nodes", 2, "--node-rank", 0, "--master", master))
    assert f"Error: node 0 cannot listen at {master}: Address already in use\n" in said
    assert "Hint: give --master a free port" in said


def test_a_mindspore_that_does_not_match(command, monkeypatch):
    """Doctor's own line, before a worker is started."""
    installed = {"mindspore": "2.7.0", "mindformers": "1.9.0"}
    monkeypatch.setattr(doctor, "package_version", lambda name: installed[name])
    said = refused(*command(), code=3)
    (line,) = [line for line in doctor.check_packages(installed, doctor.load_version_map()) if line.state == "fault"]
    assert f"Error: match: {line.found}\nHint: {line.advice}; llavanext doctor says more" in said
    assert line.found == "MindFormers 1.9.0 with MindSpore 2.7.0"


def test_a_cann_that_does_not_match(tmp_path):
    home = tmp_path / "cann"
    (home / "x86_64-linux").mkdir(parents=True)
    (home / "version.cfg").write_text("runtime_running_version=[8.0.0:8.0.0]\n")
    info = "package_name=Ascend-cann-toolkit\nversion=8.0.0\n"
    for machine in ("x86_64-linux", "aarch64-linux"):
        (home / machine).mkdir(exist_ok=True)
        (home / machine / "ascend_toolkit_install.info").write_text(info)
    environ = {"ASCEND_HOME_PATH": str(home), "LD_LIBRARY_PATH": f"{home}/lib64", "ASCEND_OPP_PATH": f"{home}/opp"}
    with pytest.raises(doctor.RuntimeMissingError, match=r"CANN: 8\.0\.0 in ") as fault:
        doctor.require_versions("Ascend", environ=environ, root=tmp_path)
    doctor.require_cann(environ=environ, root=tmp_path)  # whatever its version
    with pytest.raises(doctor.RuntimeMissingError, match="CANN: not found"):
        doctor.require_cann(environ={}, root=tmp_path)
    assert "this MindSpore needs CANN 9.0.0" in fault.value.hint
    with pytest.raises(doctor.RuntimeMissingError, match="CANN: not found"):
        doctor.require_versions("Ascend", environ={}, root=tmp_path)
    doctor.require_versions("CPU", environ={}, root=tmp_path)


# --------------------------------------------------------------------------------------------------------- on its way


@pytest.mark.full
def test_a_loss_that_is_no_number_stops_the_run_and_names_the_samples(run_llavanext, data, tiny_checkpoint):
    """A rate a billion times too high. The checkpoint from before is kept; spoilt ones do not push it out."""
    settings = ["train.learning_rate=1e30", "train.steps=40", "train.batch_size=4", "train.warmup_ratio=0.25"]
    settings += ["train.save_every=1", "train.keep=1", "train.log_every=1", "train.schedule=constant"]
    done = start(run_llavanext, data, tiny_checkpoint, "run", *(word for s in settings for word in ("--set", s)))
    run = run_llavanext.folder / "run"
    assert done.returncode == 1, done.stderr
    found = re.search(
        r"Error: worker 0 failed: the loss was NaN or infinite for 3 steps, up to step (\d+)\n", done.stderr
    )
    assert found, done.stderr
    last = int(found[1])
    assert losses(run)[-2:] == [None] * 2  # the step that ends the run may not be logged
    order = [SampleOrder(48, shuffle=True, seed=0)[place] for place in range(160)]
    for step in range(last - 2, last + 1):
        names = ", ".join(f"s{number}" for number in order[4 * (step - 1) : 4 * step])
        assert f"step {step} had the samples {names}\n" in done.stderr
    assert "Hint: lower train.learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    (kept,) = (run / "checkpoints").iterdir()
    state = open_run_state(kept)
    assert state.step == last - 3 and math.isfinite(losses(run)[state.step - 1])
    assert not (run / "model").exists()


@pytest.mark.full
def test_samples_that_cannot_be_read_are_skipped_alike_on_every_rank(run_llavanext, media, tiny_checkpoint, tmp_path):
    """Three kinds of them; the first batch holds nothing else. Two workers learn what one does."""
    bad = tmp_path / "media"
    shutil.copytree(media, bad)
    whole = (media / "5.png").read_bytes()
    (bad / "cut.png").write_bytes(whole[: len(whole) // 2])
    (bad / "text.mp4").write_text("not a clip")
    lines = [sample(f"s{n}", "image", f"{n % 6}.png", "what is it?", "a cat " * (1 + n % 4)) for n in range(24)]
    order = [SampleOrder(24, shuffle=True, seed=0)[place] for place in range(48)]
    broken = dict.fromkeys(order[:4], "cut.png") | {order[9]: "gone.png"}
    for number, name in broken.items():
        lines[number] = sample(f"s{number}", "image", name, "what?", "a cat")
    broken[order[14]] = "text.mp4"
    lines[order[14]] = sample(f"s{order[14]}", "video", "text.mp4", "what?", "a cat")
    file = write_samples(tmp_path / "data.jsonl", bad, lines)
    settings = ["--set", "train.epochs=2", "--set", "train.log_every=1", "--on-bad", "skip", "--json"]
    curves = []
    for devices in (1, 2):
        batch = ["--devices", devices, "--set", f"train.batch_size={4 // devices}"]
        done = start(run_llavanext, file, tiny_checkpoint, f"run{devices}", *settings, *batch)
        assert done.returncode == 0, done.stderr
        run = run_llavanext.folder / f"run{devices}"
        skipped = [json.loads(line) for line in (run / "skipped.jsonl").read_text().splitlines()]
        assert Counter(line["id"] for line in skipped) == {f"s{number}": 2 for number in broken}, "two epochs"
        assert all(broken[int(line["id"][1:])] in line["reason"] for line in skipped)
        assert json.loads(done.stdout)["skipped"] == 12
        assert "samples that could not be read were skipped 12 times: see " in done.stderr
        curves.append(losses(run))
    assert curves[0][0] == 0, "a step that had nothing to learn from"
    assert None not in curves[0] and len(curves[0]) == 12
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-4)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes: `mount(megabytes)` gives its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(megabytes: float) -> Path:
        size = f"size={round(megabytes * 1024)}k"
        command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(folder)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command")
        if done.returncode:
            pytest.skip(f"this user cannot mount a small disk: {done.stderr.strip()}")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.full
def test_a_disk_that_fills_up_keeps_the_last_good_checkpoint_and_goes_on_when_there_is_room(
    run_llavanext, data, tiny_checkpoint, small_disk
):
    weights = sum(path.stat().st_size for path in tiny_checkpoint.glob("*.safetensors")) / 2**20
    disk = small_disk(64.3 + 2.5 * weights)  # 64 MiB are always spared; room for one checkpoint, not two
    settings = ["train.steps=12", "train.batch_size=4", "train.save_every=4", "train.keep=3", "train.log_every=1"]
    words = [word for setting in settings for word in ("--set", setting)]
    done = start(run_llavanext, data, tiny_checkpoint, disk / "run", *words)
    assert done.returncode == 1, done.stderr
    assert "no checkpoint at step 8: " in done.stderr
    assert " free on this disk; the earlier ones are kept, training continues\n" in done.stderr
    assert re.search(r"Error: worker 0 failed: .* free on this disk\nHint: .*--resume", done.stderr), done.stderr
    assert "Traceback" not in done.stderr
    assert [path.name for path in (disk / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    assert open_run_state(disk / "run" / "checkpoints" / "step-00000004").step == 4
    assert not list((disk / "run").glob(".*")) and not (disk / "run" / "model").exists()

    subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
    again = start(run_llavanext, data, tiny_checkpoint, disk / "run", *words, "--resume")
    assert again.returncode == 0, again.stderr
    assert "resuming after step 4 of 12" in again.stderr
    assert len(losses(disk / "run")) == 12
