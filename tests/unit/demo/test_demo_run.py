"""How the demo treats its folder, and the commands that it runs when it is interrupted."""

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
    """Ctrl-C is heard, as it is not by what a script runs in its background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_is_told_once_and_given_the_time_to_clean_up(
    tmp_path, monkeypatch, number, in_the_foreground
):
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


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path):
    (tmp_path / "file").write_text("x")
    for folder, reason in ((tmp_path / "file", "it is a file"), (tmp_path / "file" / "d", "Not a directory")):
        with pytest.raises(LlavaNextError, match=f"{folder} cannot be made: {reason}") as caught:
            demo.run_demo(folder, QUICK)
        assert caught.value.hint == "choose another --dir"
    assert (tmp_path / "file").read_text() == "x"


def test_force_replaces_a_demo_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "make_data", lambda folder, *_: (folder.mkdir(), [])[1])
    monkeypatch.setattr(demo, "write_model", lambda *_: (_ for _ in ()).throw(LlavaNextError("cut off")))
    folder = tmp_path / "d"
    with pytest.raises(LlavaNextError, match="cut off"):
        demo.run_demo(folder, QUICK, 3)
    assert json.loads((folder / demo.NOTE).read_text())["seed"] == 3
    with pytest.raises(LlavaNextError, match="already holds a demo") as caught:
        demo.run_demo(folder, QUICK, 4)
    assert "--force" in caught.value.hint
    with pytest.raises(LlavaNextError, match="cut off"):
        demo.run_demo(folder, QUICK, 4, force=True)
    assert json.loads((folder / demo.NOTE).read_text())["seed"] == 4

    with demo._held(folder), pytest.raises(LlavaNextError, match="in use by another llavanext demo"):
        demo.run_demo(folder, QUICK, 5, force=True)
    assert (folder / "data").is_dir()

    (folder / demo.NOTE).unlink()
    with pytest.raises(LlavaNextError, match="already holds something"):
        demo.run_demo(folder, QUICK, force=True)
    assert (folder / "data").is_dir()
