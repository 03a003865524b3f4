"""`ask` that is ended from outside, at moments of which MindSpore would make a crash: it says so and leaves nothing."""

import os
import signal
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "moment", "code", "message"),
    [
        (signal.SIGINT, "loading", 130, "Interrupted.\n"),
        (signal.SIGINT, "answering", 130, "Interrupted.\n"),
        (signal.SIGTERM, "answering", 143, ""),
    ],
)
def test_a_question_is_interrupted(tmp_path, tmp_path_factory, tiny_checkpoint, number, moment, code, message):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    kept = {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"), "TMPDIR": str(scratch)}
    command = [sys.executable, "-m", "llavanext_cli", "ask", "what is it?", "--checkpoint", str(tiny_checkpoint)]
    command += ["--max-new-tokens", "400", "--set", "ask.cache_tokens=512", "--temperature", "2", "--seed", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, cwd=tmp_path, env=os.environ | kept, **pipes) as process:
        if moment == "answering":
            assert process.stdout.read(1)
        else:
            deadline = time.monotonic() + 60
            while not list(scratch.iterdir()) and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(1)  # in the midst of MindSpore's modules
        process.send_signal(number)
        _, fault = process.communicate(timeout=60)
    assert (process.returncode, fault.decode()) == (code, message)
    assert list(scratch.iterdir()) == []
