"""`train --set train.method=lora`: what is trained, what is written, how a run is resumed, and what two workers do."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llavanext_cli.config.presets import load_preset
from llavanext_cli.weights.adapter import adapted_weights
from llavanext_cli.weights.checkpoint import open_checkpoint
from tests.integration.test_train import COMMON, losses, weights

STEPS, SAVED = 12, 6
TRAINED = ("projector", "newline", "language")
SETTINGS = [
    "train.method=lora",
    "train.lora.rank=4",
    "train.lora.alpha=12",
    f"train.trainable=[{','.join(TRAINED)}]",
    "train.learning_rate=1e-2",
    "train.learning_rates.projector=3e-3",
    f"train.steps={STEPS}",
    f"train.save_every={SAVED}",
    "train.log_every=1",
]
LORA = load_preset("tiny-stage2", SETTINGS).train.lora


def command(data: Path, checkpoint: Path, out: Path, *more: str, batch: int = 4) -> list[str]:
    words = ["train", "tiny-stage2", "--data", data, "--checkpoint", checkpoint, "--out", out, *COMMON]
    for setting in (*SETTINGS, f"train.batch_size={batch}"):
        words += ["--set", setting]
    return [*map(str, [sys.executable, "-m", "llavanext_cli", *words, *more])]


@pytest.fixture(scope="module")
def lora_run(tmp_path_factory, data, tiny_checkpoint) -> Path:
    out = tmp_path_factory.mktemp("lora") / "run"
    done = subprocess.run(command(data, tiny_checkpoint, out), capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    return out


def test_the_loss_falls_and_what_is_frozen_stays_the_same_to_the_bit(lora_run, tiny_checkpoint):
    curve = losses(lora_run)
    assert len(curve) == STEPS
    assert np.mean(curve[-3:]) < 0.95 * np.mean(curve[:3])
    before, after = weights(tiny_checkpoint), weights(lora_run / "model")
    assert before.keys() == after.keys(), "the model is a plain one"
    changed = {name for name in before if before[name].tobytes() != after[name].tobytes()}
    architecture = open_checkpoint(tiny_checkpoint).architecture
    targets = adapted_weights(architecture, LORA).keys()
    assert len(targets) == 7 * architecture.text.num_hidden_layers
    assert changed == targets | {name for name in before if name.startswith(("projector.", "image_newline"))}


def test_a_checkpoint_holds_the_merged_model_and_the_matrices(lora_run, tiny_checkpoint):
    folder = lora_run / "checkpoints" / f"step-{SAVED:08d}"
    before, after, state = weights(tiny_checkpoint), weights(folder), load_file(folder / "training/state.safetensors")
    for name in adapted_weights(open_checkpoint(tiny_checkpoint).architecture, LORA):
        a, b = (state[name.replace(".weight", end)] for end in (".lora_a", ".lora_b"))
        assert a.shape == (4, before[name].shape[1])
        assert np.abs(b).max() > 0
        np.testing.assert_allclose(after[name], before[name] + 3 * b @ a, rtol=1e-6, atol=1e-7)
    learning = {name.partition(".")[2] for name in state if name.startswith("adam_m.")}
    assert not [
        name for name in learning if name.startswith(("vision_tower.", "language_model.")) and "lora" not in name
    ]
    assert any(name.startswith("projector.") for name in learning)


@pytest.mark.full
def test_a_run_resumes_from_the_matrices_and_not_from_the_merged_weights(lora_run, data, tiny_checkpoint, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(lora_run, out)
    shutil.rmtree(out / "model")
    other = tmp_path / "other"
    shutil.copytree(lora_run / "model", other)
    refused = subprocess.run(command(data, other, out, "--resume"), capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "base weights" in refused.stderr
    resumed = subprocess.run(command(data, tiny_checkpoint, out, "--resume"), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert f"resuming after step {SAVED} of {STEPS}" in resumed.stderr
    np.testing.assert_allclose(losses(out), losses(lora_run), rtol=1e-6)
    for file in ("model-00001-of-00001.safetensors", "llavanext_manifest.json"):
        assert (out / "model" / file).read_bytes() == (lora_run / "model" / file).read_bytes()


@pytest.mark.full
def test_two_workers_give_the_losses_of_one(lora_run, data, tiny_checkpoint, tmp_path):
    words = command(data, tiny_checkpoint, tmp_path / "two", "--devices", "2", batch=2)
    done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    np.testing.assert_allclose(losses(tmp_path / "two"), losses(lora_run), rtol=1e-4)
