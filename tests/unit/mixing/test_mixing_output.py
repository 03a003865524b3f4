"""Outputs: whole or not there, never over another's file, and no temporary file of a killed run stays for good."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.output import JSON, PAGE, OutputFile, check_output_file


@pytest.fixture(params=["links", "no links"])
def disk(request, monkeypatch):
    """A disk that knows hard links, and one that does not."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "not permitted")))


def test_a_file_appears_when_it_is_complete(tmp_path, disk):
    path = tmp_path / "a"
    with OutputFile(path) as file:
        file.write(b"content")
        assert not path.exists()
        file.commit()
    assert path.read_bytes() == b"content" and os.listdir(tmp_path) == ["a"]
    with OutputFile(tmp_path / "b") as file:
        file.write(b"content")
    assert os.listdir(tmp_path) == ["a"]


def test_what_another_command_has_made_meanwhile_stays(tmp_path, disk):
    path = tmp_path / "a"
    with pytest.raises(DataError, match="another command has made it meanwhile"), OutputFile(path) as file:
        path.write_text("mine")
        file.commit()
    assert path.read_text() == "mine" and os.listdir(tmp_path) == ["a"]
    with OutputFile(path, force=True) as file:
        file.write(b"new")
        file.commit()
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("force", [True, False])
@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n", b"mine"])
@pytest.mark.parametrize("begins", [JSON, PAGE])
def test_what_a_mix_has_not_written_stays(tmp_path, force, content, begins):
    path = tmp_path / "a"
    path.write_bytes(content)
    with pytest.raises(DataError, match="a exists, and llavanext mix has not written it") as error:
        check_output_file(path, force, begins)
    assert "--force" not in error.value.hint and path.read_bytes() == content


@pytest.mark.parametrize(
    ("content", "begins"),
    [(b'{"llavanext_mix": 1}\n', JSON), (b"[\n  {", JSON), (b"[]", JSON), (b"", JSON), (b"<!DOCTYPE html>", PAGE)],
)
def test_what_a_mix_has_written_may_be_replaced(tmp_path, content, begins):
    path = tmp_path / "a"
    path.write_bytes(content)
    check_output_file(path, True, begins)
    with pytest.raises(DataError, match="a exists") as error:
        check_output_file(path, False, begins)
    assert "--force" in error.value.hint


def test_nothing_takes_the_place_of_a_device():
    with pytest.raises(DataError, match="/dev/stdout is a device or a pipe"):
        check_output_file(Path("/dev/stdout"), True, JSON)


@pytest.mark.parametrize(
    ("number", "hint"), [(errno.ENOSPC, "free some space"), (errno.ENOENT, "choose another folder for the output")]
)
def test_room_is_asked_for_only_where_it_is_lacking(tmp_path, monkeypatch, number, hint):
    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(DataError, match="a could not be written") as error, OutputFile(tmp_path / "a"):
        pass
    assert error.value.hint.startswith(hint)


def test_a_dry_run_writes_nothing():
    with OutputFile(None) as file:
        file.write(b"content")
        file.finish()
        file.commit()
    assert file.path is None


def test_temporary_files_of_killed_runs_go_and_those_of_others_stay(tmp_path):
    code = (
        "import sys; from pathlib import Path; from llavanext_cli.mixing.output import OutputFile\n"
        "with OutputFile(Path(sys.argv[1])): print('ready', flush=True); sys.stdin.read()"
    )

    def start(name: str) -> subprocess.Popen:
        command = [sys.executable, "-c", code, str(tmp_path / name)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        return process

    killed, other, alive = start("a"), start("a.b"), start("a")
    for process in (killed, other):
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with OutputFile(tmp_path / "a"):
        pass
    left = sorted(os.listdir(tmp_path))
    alive.communicate()
    assert left == sorted([f".a.b.{other.pid}.part", f".a.{alive.pid}.part"])
