"""`ask --devices 2`: two workers share each layer and answer what one answers; the first one talks."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.conftest import sample, write_samples

SHORT = ["--max-new-tokens", "8", "--set", "ask.cache_tokens=512", "--set", "runtime.threads=1"]


@pytest.mark.full
def test_two_workers_answer_as_one(run_llavanext, tmp_path, media, tiny_checkpoint):
    questions = write_samples(
        tmp_path / "questions.jsonl",
        media,
        [
            sample("image", "image", "1.png", "what is it?", "a cat"),
            sample("video", "video", "clip.mp4", "what happens?", "two"),
            sample("gone", "image", "gone.png", "what?", "a cat"),
            sample("text", None, "", "how many birds are there?", "three"),
        ],
    )
    words = ["ask", "--batch", questions, "--batch-size", "2", "--checkpoint", tiny_checkpoint, *SHORT]
    for out, devices in (("one.jsonl", "1"), ("two.jsonl", "2")):
        done = run_llavanext(*words, "--out", out, "--devices", devices)
        assert done.returncode == 0, done.stderr
    one, two = ((run_llavanext.folder / name).read_text() for name in ("one.jsonl", "two.jsonl"))
    assert len({json.loads(line).get("answer") for line in one.splitlines()}) == 4
    assert two == one


@pytest.mark.full
def test_a_chat_over_two_workers(run_llavanext, media, tiny_checkpoint):
    words = ["ask", "--chat", "--image", media / "1.png", "--checkpoint", tiny_checkpoint, *SHORT]
    typed = "what is it?\n/dance\nand how many?\n"
    one, two = (run_llavanext(*words, "--devices", count, typed=typed) for count in ("1", "2"))
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout.count("\n") >= 2
    assert two.stdout == one.stdout
    assert two.stderr == one.stderr


@pytest.mark.full
def test_a_worker_that_is_killed_ends_all_with_one_line(tmp_path, tiny_checkpoint):
    temporary = tmp_path / ("long" * 30)  # too long a path for a Unix socket
    temporary.mkdir()
    words = [sys.executable, "-m", "llavanext_cli", "ask", "--chat", "--checkpoint", tiny_checkpoint, *SHORT]
    with subprocess.Popen(
        [*map(str, words), "--devices", "2"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"TMPDIR": str(temporary)},
    ) as process:
        process.stdin.write("what is it?\n")
        process.stdin.flush()
        assert process.stdout.read(1)
        (folder,) = temporary.glob("llavanext-*")
        pids = [int((folder / f"worker_{rank}.pid").read_text()) for rank in (0, 1)]
        os.kill(pids[1], signal.SIGKILL)
        process.stdin.write("and now?\n")
        process.stdin.close()
        process.stdout.read()
        errors = process.stderr.read()
        assert process.wait(timeout=60) == 3
    assert "Error: worker 1 was killed by SIGKILL" in errors
    assert "Traceback" not in errors
    state = Path(f"/proc/{pids[0]}/stat")  # a zombie waits for its parent, and does nothing
    assert not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"
    assert list(temporary.iterdir()) == []
