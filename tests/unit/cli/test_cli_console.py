"""The one writer: what goes to which stream, as plain text and on a terminal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import subprocess
import sys
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import pytest

from llavanext_cli import console
from llavanext_cli.errors import DataError


@dataclass
class Report:
    path: Path
    counts: dict[str, int]


class Colour(Enum):
    RED = "red"


def test_data_and_messages_go_to_their_streams(capsys):
    console.out("data [b]x[/b]")
    console.write("more")
    console.say("message [b]x[/b]")
    console.warn("careful")
    console.next_step("llavanext ask")
    seen = capsys.readouterr()
    assert seen.out == "data [b]x[/b]\nmore"
    assert seen.err == "message [b]x[/b]\nWarning: careful\nNext: llavanext ask\n"


def test_control_characters_of_data_are_escaped(capsys):
    """A path or an id may hold a whole line that looks like ours, or hide one."""
    evil = "a\x1b[2J\rb\x9b1m\u202e"
    escaped = "a\\x1b[2J\\rb\\x9b1m\\u202e"
    console.error(DataError(evil + "\nError: x", evil, [evil + "\nfake"]))
    console.warn(evil)
    console.next_step(evil)
    console.say(evil + "\n\tmore")
    console.table(["id"], [[evil + "\n"]])
    console.fields({"id": evil})
    seen = capsys.readouterr()
    assert seen.err == (
        f"Error: {escaped}\\nError: x\n  {escaped}\\nfake\nHint: {escaped}\n"
        f"Warning: {escaped}\nNext: {escaped}\n{escaped}\n\tmore\n"
    )
    assert seen.out == f"id\n{escaped}\\n\nid  {escaped}\n"


def test_a_message_that_cannot_be_written_does_not_end_the_work(capsys, monkeypatch):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stderr", full)
        with console.progress("Work") as report:
            report(1, 1)
        console.say("message")
        console.out("data")
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert capsys.readouterr().out == "data\n"


def test_long_lines_are_not_wrapped(capsys):
    console.out("x" * 500)
    console.say("y " * 300)
    seen = capsys.readouterr()
    assert seen.out == "x" * 500 + "\n"
    assert seen.err.count("\n") == 1


def test_json_is_one_line_of_anything_a_report_holds(capsys):
    console.out_json({"report": Report(Path("a/é.jpg"), {"n": 1}), "colour": Colour.RED, "names": {"b", "a"}})
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert "é" in line
    assert json.loads(line) == {
        "report": {"path": "a/é.jpg", "counts": {"n": 1}},
        "colour": "red",
        "names": ["a", "b"],
    }
    with pytest.raises(TypeError, match="object cannot be written as JSON"):
        console.out_json({"x": object()})


def test_a_table_is_aligned_with_numbers_to_the_right(capsys):
    console.table(["name", "count", "share"], [["a", 1, 0.5], ["long name", 200, 1.0], ["b", 30, 0.123456]])
    assert capsys.readouterr().out == (
        "name       count   share\na              1     0.5\nlong name    200       1\nb             30  0.1235\n"
    )


def test_a_table_without_rows_is_its_header(capsys):
    console.table(["name", "count"], [])
    assert capsys.readouterr().out == "name  count\n"


def test_fields_are_aligned(capsys):
    console.fields({"a": None, "long": True})
    assert capsys.readouterr().out == "a     -\nlong  yes\n"


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(console, "time", clock)
    return clock


def test_progress_without_a_terminal_is_a_line_for_each_tenth(capsys, clock):
    with console.progress("Working", "samples") as report:
        for done in range(1, 101):
            clock.now += 0.5
            report(done, 100)
    seen = capsys.readouterr()
    assert seen.out == ""
    lines = seen.err.splitlines()
    assert len(lines) == 10, "the end is the last tenth, and is said once"
    assert lines[0] == "Working: 10 %, 10/100 samples, 5 s"
    assert lines[-1] == "Working: 100 %, 100/100 samples, 50 s"


def test_slow_progress_is_a_line_every_ten_seconds(capsys, clock):
    with console.progress("Working") as report:
        for done in range(1, 4):
            clock.now += 10
            report(done, 1000, f"loss {done}")
    assert capsys.readouterr().err.splitlines()[:3] == [
        "Working: 0 %, 1/1000, 10 s  loss 1",
        "Working: 0 %, 2/1000, 20 s  loss 2",
        "Working: 0 %, 3/1000, 30 s  loss 3",
    ]


def test_fast_progress_is_one_line_at_the_end(capsys, clock):
    with console.progress("Copying", "bytes") as report:
        for done in range(1, 1000):
            clock.now += 0.0001
            report(done * 5_000_000, 4_995_000_000)
    assert capsys.readouterr().err == "Copying: 100 %, 5 GB/5 GB, 0 s\n"


def test_progress_of_an_unknown_total(capsys, clock):
    with console.progress("Reading", "lines") as report:
        clock.now += 11
        report(7, 0)
    assert capsys.readouterr().err.splitlines()[0] == "Reading: 7/? lines, 11 s"


def test_progress_that_never_began_says_nothing(capsys):
    with pytest.raises(DataError), console.progress("Working"):
        raise DataError("no")
    assert capsys.readouterr().err == ""


def test_a_closed_stdout_is_reported(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(console.ReaderGoneError):
        console.out("x")


def on_terminal(code: str, **environment: str) -> str:
    """What a program writes to a terminal of its own: both streams."""
    primary, secondary = pty.openpty()
    keep = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR", "TERM")}
    environment = keep | {"TERM": "xterm-256color", "COLUMNS": "100"} | environment
    program = subprocess.Popen(
        [sys.executable, "-c", code], stdin=secondary, stdout=secondary, stderr=secondary, env=environment
    )
    os.close(secondary)
    seen = b""
    while True:
        try:
            piece = os.read(primary, 4096)
        except OSError:  # Linux reports the end of a terminal so
            break
        if not piece:
            break
        seen += piece
    os.close(primary)
    assert program.wait(timeout=60) == 0
    return seen.decode()


SHOW = """
from llavanext_cli import console
from llavanext_cli.errors import DataError
console.error(DataError("bad [x]", "try"))
console.table(["name"], [["a"]])
"""
COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-9](;[0-9]+)*m")


def test_a_terminal_gets_colours_unless_disabled():
    assert COLOUR.search(on_terminal(SHOW))
    for environment in ({"NO_COLOR": "1"}, {"TERM": "dumb"}):
        plain = on_terminal(SHOW, **environment)
        assert not COLOUR.search(plain)
        assert "bad [x]" in plain


def test_a_terminal_gets_the_last_column_of_a_table_in_lines_that_fit():
    code = 'from llavanext_cli import console; console.table(["name", "what for"], [["a", "three words here " * 4]])'
    lines = re.sub(r"\x1b\[[0-9;]*m", "", on_terminal(code, COLUMNS="40")).split("\r\n")
    assert max(map(len, lines)) <= 40
    assert lines[1].rstrip() == "a     three words here three words here"
    assert lines[2].startswith("      three words")


def test_a_terminal_gets_a_bar_with_messages_and_data_above_it():
    code = """
import time
from llavanext_cli import console
with console.progress("Work", "samples") as report, console.progress("Inner") as inner:
    for done in range(1, 21):
        report(done, 20, f"loss {done}"); inner(done, 0); time.sleep(0.02)
    console.say("a message"); console.out("a line of data")
print("after", console._state.live)
"""
    seen = on_terminal(code)
    assert "20/20 samples" in seen
    assert "loss 20" in seen
    assert "\x1b[2K" in seen  # a line that was redrawn
    assert "a message\r\n" in seen
    assert "a line of data\r\n" in seen
    assert seen.rstrip().endswith("after None")
