"""The files of completions/ are what the app generates, and complete in the real shells."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "completions"
SHELLS = ("bash", "zsh", "fish")
TRIES = {
    "llavanext train video-7b-": ["video-7b-stage2", "video-7b-stage3"],
    "llavanext presets show tiny-a": ["tiny-ask"],
    "llavanext fetch v1.6": ["v1.6-vicuna-7b"],
    "llavanext ask --preset t": ["tiny-ask"],
    "llavanext train tiny-stage2 --set train.weight": ["train.weight_decay="],
    "llavanext pre": ["presets"],
    "llavanext convert --veri": ["--verify"],
}


def needs(shell: str) -> str:
    path = shutil.which(shell)
    if path is None:
        pytest.skip(f"{shell} is not installed: apt-get install {shell}")
    return path


@pytest.fixture
def environ(tmp_path) -> dict[str, str]:
    """Our executable first on PATH, an empty home."""
    folder = Path(sys.executable).parent
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", "HOME": str(tmp_path), "TERM": "dumb"}


@pytest.mark.parametrize("shell", SHELLS)
def test_the_files_are_what_the_app_generates(shell, environ):
    command = [str(Path(sys.executable).with_name("llavanext"))]
    done = subprocess.run(
        command, env={**environ, "_LLAVANEXT_COMPLETE": f"source_{shell}"}, capture_output=True, text=True, check=True
    )
    assert (FOLDER / f"llavanext.{shell}").read_text().strip() == done.stdout.strip()


@pytest.mark.parametrize(("line", "expected"), TRIES.items())
def test_bash(line, expected, environ):
    script = f"""
        source {FOLDER}/llavanext.bash
        COMP_WORDS=({line}); COMP_CWORD=$(( ${{#COMP_WORDS[@]}} - 1 ))
        _llavanext_completion llavanext
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    done = subprocess.run([needs("bash"), "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.split() == expected and done.stderr == ""


@pytest.mark.parametrize(("line", "expected"), TRIES.items())
def test_fish(line, expected, environ):
    script = f"source {FOLDER}/llavanext.fish; complete -C '{line}'"
    done = subprocess.run([needs("fish"), "-c", script], env=environ, capture_output=True, text=True, check=True)
    assert [entry.split("\t")[0] for entry in done.stdout.splitlines()] == expected


@pytest.mark.parametrize(("line", "expected"), [(line, words) for line, words in TRIES.items() if len(words) == 1])
def test_zsh(line, expected, environ, tmp_path):
    """Typed at a prompt, TAB pressed, the completed line printed back by a widget."""
    (tmp_path / ".zshrc").write_text(
        "PS1='ready> '; autoload -Uz compinit; compinit -u -D\n"
        f"source {FOLDER}/llavanext.zsh\n"
        "show-line() { [[ -n $BUFFER ]] && print -r -- $BUFFER > $HOME/line; BUFFER=''; zle accept-line }\n"
        "zle -N show-line; bindkey '^T' show-line\n"
    )
    zsh = needs("zsh")
    child, screen = pty.fork()
    if child == 0:
        os.execve(zsh, ["zsh", "-i"], {**environ, "ZDOTDIR": str(tmp_path)})
    try:
        wait_for(screen, b"ready> ")
        os.write(screen, line.encode() + b"\t")
        result = tmp_path / "line"
        deadline = time.monotonic() + 60
        while not (result.exists() and result.read_text().endswith("\n")) and time.monotonic() < deadline:
            os.write(screen, b"\x14")  # queued behind the completion
            drain(screen, 0.5)
        assert result.read_text().strip() == f"{line.rsplit(' ', 1)[0]} {expected[0]}"
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(screen)


def wait_for(screen: int, text: bytes, seconds: float = 30) -> None:
    seen, deadline = b"", time.monotonic() + seconds
    while text not in seen:
        assert time.monotonic() < deadline, f"the shell shows {seen!r}"
        seen += drain(screen, 0.2)


def drain(screen: int, seconds: float) -> bytes:
    """What the terminal shows within `seconds`."""
    seen = b""
    while select.select([screen], [], [], seconds)[0]:
        try:
            seen += os.read(screen, 4096)
        except OSError:
            break
    return seen
