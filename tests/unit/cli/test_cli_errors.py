"""The command group is the only catcher: what a user sees of each kind of end, and the exit code."""

from __future__ import annotations

import errno
import importlib.machinery
import os
import pathlib
import subprocess
import sys
import textwrap
import types
from typing import Annotated

import pytest
import typer
from typer.testing import CliRunner

import llavanext_cli.app as application
from llavanext_cli import __version__, console
from llavanext_cli.errors import ConfigError, RuntimeMissingError

PROBE = """\
import sys, types
from importlib.machinery import ModuleSpec
import llavanext_cli.app as application
from llavanext_cli import console
def probe():
    "A command made for a test."
{body}
module = types.ModuleType("probe_module")
module.probe, module.__spec__ = probe, ModuleSpec("probe_module", None)
sys.modules["probe_module"] = module
application.COMMANDS = (application.Entry("probe", "probe_module", "probe", "Test"),)
application.main()
"""


@pytest.fixture
def run(monkeypatch):
    """Run one function as `llavanext probe`."""
    monkeypatch.setenv(console.VERBOSE_ENV, "0")
    monkeypatch.delenv("NO_COLOR", raising=False)

    def run(function, *arguments):
        module = types.ModuleType("probe_module")
        module.probe, module.__spec__ = function, importlib.machinery.ModuleSpec("probe_module", None)
        monkeypatch.setitem(sys.modules, "probe_module", module)
        entry = application.Entry("probe", "probe_module", "probe", "Test")
        monkeypatch.setattr(application, "COMMANDS", (entry,))
        return CliRunner().invoke(application.app, ["probe", *arguments])

    return run


def run_alone(body: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    """The same in a process of its own."""
    code = PROBE.format(body=textwrap.indent(textwrap.dedent(body), "    "))
    options = {"capture_output": True, "text": True, "timeout": 60} | options
    return subprocess.run([sys.executable, "-c", code, "probe", *arguments], **options)


def test_an_error_is_one_line_its_details_and_a_hint(run):
    def probe():
        raise ConfigError("2 faults in [a].yaml", "Change them.", ["line 1: x", "line 2: [y]"])

    result = run(probe)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr == "Error: 2 faults in [a].yaml\n  line 1: x\n  line 2: [y]\nHint: Change them.\n"


def test_an_error_without_a_hint_has_no_hint_line(run):
    def probe():
        raise ConfigError("wrong")

    assert run(probe).stderr == "Error: wrong\n"


def test_what_is_missing_on_the_machine_has_its_own_exit_code(run):
    def probe():
        raise RuntimeMissingError("no NPU", "`llavanext doctor`")

    assert run(probe).exit_code == 3


def test_the_cause_shows_with_verbose_only(run):
    def probe():
        try:
            raise OSError("disk on fire")
        except OSError as cause:
            raise ConfigError("cannot be read") from cause

    assert "disk on fire" not in run(probe).stderr
    verbose = run(probe, "-v")
    assert verbose.exit_code == 1
    assert verbose.stderr.startswith("Error: cannot be read\nTraceback (most recent call last):\n")
    assert verbose.stderr.endswith("OSError: disk on fire\n")


def test_an_interruption_while_modules_are_loaded():
    code = (
        "import sys\n"
        "class Finder:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'typer': raise KeyboardInterrupt\n"
        "sys.meta_path.insert(0, Finder())\n"
        "from llavanext_cli.__main__ import main\n"
        "main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_an_interruption(run):
    def probe():
        raise KeyboardInterrupt

    result = run(probe)
    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "Interrupted.\n")


def test_a_bug_keeps_its_traceback(run):
    def probe():
        raise ValueError("a bug")

    result = run(probe)
    assert isinstance(result.exception, ValueError)
    done = run_alone('raise ValueError("a bug")')
    assert done.returncode == 1
    assert "Traceback (most recent call last):" in done.stderr
    assert done.stderr.endswith("ValueError: a bug\n")
    assert "Error:" not in done.stderr.replace("ValueError:", "")


def test_a_reader_that_goes_away_is_no_error():
    body = "for number in range(100000): console.out(str(number))"
    code = PROBE.format(body="    " + body)
    program = subprocess.Popen(
        [sys.executable, "-c", code, "probe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert program.stdout.readline() == "0\n"
    program.stdout.close()
    assert program.stderr.read() == ""
    assert program.wait(timeout=60) == 0


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ask", "--help"]])
def test_help_and_version_of_which_nobody_reads_anything(words):
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-m", "llavanext_cli", *words], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["ask", "--help"]])
def test_help_and_version_on_a_full_disk(words):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "llavanext_cli", *words], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.startswith("Error: No space left on device\nHint: make room")


def test_a_current_folder_that_was_removed(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    code = (
        f"import os; os.chdir({str(gone)!r}); os.rmdir({str(gone)!r}); from llavanext_cli.__main__ import main; "
        "import sys; sys.argv[1:] = ['doctor', '--offline']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[0] == "Error: the current folder was removed"


def test_a_broken_pipe_to_a_worker_is_a_bug_and_not_silence():
    done = run_alone('raise BrokenPipeError(32, "Broken pipe")')
    assert done.returncode == 1
    assert "RuntimeError: a pipe to another process broke" in done.stderr


def test_an_unknown_command_names_the_nearest_one():
    result = CliRunner().invoke(application.app, ["preset"])
    assert result.exit_code == 2
    assert result.stderr.endswith("Error: No such command 'preset'. Did you mean 'presets'?\n")


def test_an_unknown_option_names_the_nearest_one():
    result = CliRunner().invoke(application.app, ["presets", "show", "tiny-ask", "--ful"])
    assert result.exit_code == 2
    assert "No such option: --ful" in result.stderr
    assert "--full" in result.stderr


def test_the_version():
    result = CliRunner().invoke(application.app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, f"llavanext {__version__}\n")


def test_no_arguments_show_the_help():
    result = CliRunner().invoke(application.app, [])
    assert "Usage: " in result.output
    assert "presets" in result.output


def test_verbose_reaches_the_processes_that_are_started():
    body = """
    import subprocess, sys
    code = "from llavanext_cli import console; print(console.is_verbose())"
    console.out(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip())
    """
    assert run_alone(body, "-v").stdout == "True\n"
    assert run_alone(body).stdout == "False\n"


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams_are_nowhere_to_write_and_no_traceback(tmp_path, closed):
    program = PROBE.format(body='    console.out("data")\n    console.say("message")')
    words = ["bash", "-c", f'"$@" {closed}', "bash", sys.executable, "-c", program, "probe"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout == ("" if ">&-" in closed.split() else "data\n")
    assert done.stderr == ("" if "2>&-" in closed.split() else "message\n")


@pytest.mark.parametrize("arguments", [["presets", "list"], ["presets", "check"], ["presets", "show", "tiny-ask"]])
def test_nothing_is_written_to_the_working_folder(tmp_path, arguments):
    command = [sys.executable, "-m", "llavanext_cli", *arguments]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_an_ascii_terminal_gets_words_and_no_traceback():
    command = [sys.executable, "-m", "llavanext_cli", "doctor", "--offline"]
    done = subprocess.run(command, env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True)
    assert done.stdout.startswith("ok Python ") and done.stdout.isascii() and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("number", "hint"),
    [(errno.ENOSPC, "make room"), (errno.EACCES, "choose a place where"), (errno.EROFS, "choose a place that")],
)
def test_a_full_or_forbidden_disk_is_one_line_and_not_a_traceback(run, number, hint):
    def probe():
        raise OSError(number, os.strerror(number), "runs/a.json")

    result = run(probe)
    assert result.exit_code == 1
    assert result.stderr.startswith(f"Error: runs/a.json: {os.strerror(number)}\nHint: {hint}")
    assert "Traceback" not in result.stderr


def test_another_fault_of_the_system_is_a_bug(run):
    def probe():
        raise FileNotFoundError(errno.ENOENT, "no such file", "x")

    assert isinstance(run(probe).exception, FileNotFoundError)


def test_an_empty_path_is_not_the_current_folder(run):
    def probe(folder: Annotated[pathlib.Path, typer.Option("--dir")] = pathlib.Path("d")):
        console.out(str(folder))

    result = run(probe, "--dir", "")
    assert result.exit_code == 2
    assert "Invalid value for '--dir': a path must not be empty" in result.stderr
    assert run(probe).stdout == "d\n"
    assert run(probe, "--dir", ".").stdout == ".\n"
