"""The formula of activations (training/memory.py) against the memory that a training worker really takes on a CPU."""

from __future__ import annotations

import subprocess
import sys

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.training.memory import activation_bytes
from llavanext_cli.weights.checkpoint import open_checkpoint

SETTINGS = ("data.frames=4", "train.steps=2", "train.epochs=9", "runtime.threads=1")
PEAK = """
import resource, subprocess, sys
done = subprocess.run(sys.argv[1:], capture_output=True, text=True)
sys.stderr.write(done.stderr)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(done.returncode)
"""


@pytest.mark.full
@pytest.mark.parametrize("length", [256, 512])
def test_more_samples_take_the_memory_that_was_expected(length, data, tiny_checkpoint, tmp_path):
    model = open_checkpoint(tiny_checkpoint).architecture
    peaks, expected_bytes = [], []
    for batch in (4, 28):
        settings = (*SETTINGS, f"data.seq_length={length}", f"train.batch_size={batch}")
        words = [word for setting in settings for word in ("--set", setting)]
        words += ["--data", data, "--checkpoint", tiny_checkpoint, "--out", tmp_path / str(batch)]
        command = [sys.executable, "-m", "llavanext_cli", "train", "tiny-stage2", *words]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *map(str, command)], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
        expected_bytes.append(activation_bytes(load_preset("tiny-stage2", settings), model))
    measured, expected = peaks[1] - peaks[0], expected_bytes[1] - expected_bytes[0]
    print(f"{length} tokens, 24 more samples: {measured / 1e6:.0f} MB measured, {expected / 1e6:.0f} MB expected")
    assert 0.5 < measured / expected < 1.5
