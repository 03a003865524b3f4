"""The demo's folder, and how it ends the command that it runs when it is interrupted."""

import json
import os
import signal
import stat
import sys
import threading
import time

import pytest

from llavanext_cli.demo import run as demo
from llavanext_cli.demo.data import QUICK
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.files import claim

WORKER = """\
#!{python}
import signal, time, pathlib
def end(number, frame):
    time.sleep(1)  # longer than subprocess.run would wait before it kills
    pathlib.Path("cleaned").write_text(signal.Signals(number).name)
    raise SystemExit(130)
signal.signal(signal.SIGINT, end)
signal.signal(signal.SIGTERM, end)
pathlib.Path("ready").touch()
time.sleep(60)
"""


@pytest.fixture
def in_the_foreground():
    """Ctrl-C works, as it does not for what a script starts in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_gets_one_signal_and_time_to_clean_up(tmp_path, monkeypatch, number, in_the_foreground):
    before = signal.getsignal(signal.SIGTERM)
    script = tmp_path / "python"
    script.write_text(WORKER.format(python=sys.executable))
    script.chmod(script.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setattr(demo.sys, "executable", str(script))

    def interrupt():
        while not (tmp_path / "ready").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        demo.run_command(["train"], tmp_path)
    assert (tmp_path / "cleaned").read_text() == number.name
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_folder_that_cannot_be_used_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").touch()
    for folder, reason in (
        ("file", "is a file, not a folder"),
        ("file/d", "file is not a folder"),
        ("notes", "exists and is not a demo"),
    ):
        with pytest.raises(LlavaNextError, match=reason) as caught:
            demo.run_demo(tmp_path / folder, QUICK, force=True)
        assert caught.value.hint == "choose another --dir"
    assert (tmp_path / "file").read_text() == "x" and (tmp_path / "notes" / "a.txt").exists()


def test_force_replaces_a_demo_unless_it_still_runs(tmp_path, monkeypatch):
    def stop(*_):
        raise LlavaNextError("cut off", "start again")

    monkeypatch.setattr(demo, "make_data", lambda folder, *_: folder.mkdir())
    monkeypatch.setattr(demo, "write_model", stop)
    folder = tmp_path / "d"

    def seed() -> int:
        return json.loads((folder / demo.NOTE).read_text())["seed"]

    with pytest.raises(LlavaNextError, match="cut off"):
        demo.run_demo(folder, QUICK, 3)
    with pytest.raises(LlavaNextError, match="already holds a demo") as caught:
        demo.run_demo(folder, QUICK, 4)
    assert "--force" in caught.value.hint and seed() == 3
    with claim(folder), pytest.raises(LlavaNextError, match="in use by another llavanext command"):
        demo.run_demo(folder, QUICK, 4, force=True)
    assert seed() == 3
    with pytest.raises(LlavaNextError, match="cut off"):
        demo.run_demo(folder, QUICK, 4, force=True)
    assert seed() == 4
