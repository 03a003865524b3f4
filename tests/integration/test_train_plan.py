"""`train --plan` and `--check`: what is said before anything runs, and what is not started."""

from __future__ import annotations

import json

import pytest

SMALL = ("--set", "data.seq_length=256", "--set", "data.frames=4", "--set", "train.batch_size=2")
ASCEND = ("video-7b-stage2", "--set", "data.frames=4", "--set", "train.recompute=1")


def words(preset: tuple[str, ...], data, checkpoint, *more) -> tuple:
    name, *settings = preset
    return ("train", name, "--data", data, "--checkpoint", checkpoint, "--out", "run", *settings, *more)


def test_plan_says_what_a_run_takes_and_writes_nothing(run_llavanext, data, tiny_checkpoint):
    done = run_llavanext(*words(ASCEND, data, tiny_checkpoint, "--plan", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    plan, memory = report["plan"], report["plan"]["memory"]
    assert report["fits"]
    assert plan["global_batch"] == 8
    assert plan["tokens_per_step"] == 8 * 4096
    assert plan["tokens_per_epoch"] == plan["steps_per_epoch"] * 8 * 4096
    weights = sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))
    assert plan["model_bytes"] == pytest.approx(weights, rel=0.05)
    assert plan["checkpoint_bytes"] == 3 * plan["model_bytes"]
    assert plan["disk_bytes"] == (3 + 2) * plan["checkpoint_bytes"], "train.keep, the next one, and its slices"
    assert plan["model_bytes"] / 8 < memory["weights"] == memory["gradients"] == memory["optimizer"] / 2
    assert memory["pool"] == 57 << 30
    assert not list(run_llavanext.folder.iterdir())

    shown = run_llavanext(*words(ASCEND, data, tiny_checkpoint, "--plan"))
    assert "optimizer" in shown.stdout
    assert "57 GB" in shown.stdout


def test_a_run_that_cannot_fit_is_not_started(run_llavanext, data, tiny_checkpoint):
    small = (*ASCEND, "--set", "runtime.memory=0.01GB")
    done = run_llavanext(*words(small, data, tiny_checkpoint))
    assert done.returncode == 1
    assert "each device would need" in done.stderr
    assert "activations" in done.stderr
    assert "--force" in done.stderr
    assert not list(run_llavanext.folder.iterdir())
    planned = run_llavanext(*words(small, data, tiny_checkpoint, "--plan"))
    assert planned.returncode == 0
    assert "does not fit" in planned.stderr


@pytest.mark.slow
def test_check_compiles_the_checkpoints_own_model(run_llavanext, data, tiny_checkpoint):
    small = ("tiny-stage2", *SMALL)
    done = run_llavanext(*words(small, data, tiny_checkpoint, "--check", "--json"))
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["compiled"]
    assert report["target"] == "CPU"
    (rank,) = report["ranks"]
    weights = sum(file.stat().st_size for file in tiny_checkpoint.glob("*.safetensors"))
    assert rank["parameter_bytes"] == pytest.approx(weights, rel=0.05)
    assert rank["optimizer_bytes"] == 2 * rank["parameter_bytes"]
    assert not list(run_llavanext.folder.iterdir())
