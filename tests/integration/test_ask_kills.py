"""`ask --batch` itself, model and all, killed at twenty random moments; the runner alone is in test_inference_batch."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.integration.conftest import sample, write_samples

KILLS, COUNT = 20, 60


def size_of(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


@pytest.mark.full
@pytest.mark.timeout(1800)
def test_twenty_kills_change_no_answer(run_llavanext, tmp_path, media, tiny_checkpoint, capsys):
    kinds = [("image", "0.png"), ("image", "3.png"), (None, ""), ("video", "clip.mp4"), ("image", "gone.png")]
    lines = [sample(f"q{n}", *kinds[n % 5], "what is it? " * (1 + n % 3), "a cat") for n in range(COUNT)]
    questions = write_samples(tmp_path / "questions.jsonl", media, lines)
    words = ["ask", "--batch", questions, "--checkpoint", tiny_checkpoint, "--batch-size", "2"]
    words += ["--max-new-tokens", "16", "--set", "ask.cache_tokens=512"]
    whole, killed = (run_llavanext.folder / name for name in ("whole.jsonl", "killed.jsonl"))
    assert run_llavanext(*words, "--out", whole).returncode == 0
    command = [sys.executable, "-m", "llavanext_cli", *map(str, words), "--out", str(killed)]
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path.parent / "cache")}
    rng = random.Random(0)
    kills, moments = 0, []
    while kills < KILLS:
        before = size_of(killed)
        with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
            # most moments lie in the work, which begins with the first new line, some in starting up
            in_work = rng.random() < 0.8
            while in_work and process.poll() is None and size_of(killed) == before:
                time.sleep(0.005)
            try:
                process.wait(timeout=rng.uniform(0, 2 if in_work else 8))
            except subprocess.TimeoutExpired:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
        moments.append(killed.read_bytes().count(b"\n") if killed.exists() else 0)
        if moments[-1] == COUNT:
            assert killed.read_bytes() == whole.read_bytes()
            killed.unlink()
    assert len(set(moments)) >= 4, f"the kills never hit work in progress: {moments}"
    done = run_llavanext(*words, "--out", killed)
    assert done.returncode == 0, done.stderr
    assert killed.read_bytes() == whole.read_bytes()
    assert [json.loads(line)["index"] for line in whole.read_text().splitlines()] == list(range(COUNT))
    with capsys.disabled():
        print(f"\nanswers after each kill: {moments}")
