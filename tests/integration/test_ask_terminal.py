"""`ask` in a real terminal: tmux draws it, 40 columns wide, and gives back what a person sees."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import sample, write_samples

SHORT = ["--set", "ask.cache_tokens=512", "--set", "runtime.threads=1"]
ESCAPE = "\x1b["

needs_tmux = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed: no terminal to look at")


class Screen:
    """A terminal of tmux's with a shell in it."""

    def __init__(self, folder: Path, environment: dict[str, str], width: int = 40):
        self.socket = folder / "tmux"
        self.tmux("new-session", "-d", "-x", width, "-y", 50, "-c", folder, "sh", environment=environment)
        self.tmux("set", "-g", "status", "off")

    def tmux(self, *words: object, environment: dict[str, str] | None = None) -> str:
        command = ["tmux", "-S", str(self.socket), "-f", "/dev/null", *map(str, words)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def type(self, line: str) -> None:
        self.tmux("send-keys", "-l", line)
        self.press("Enter")

    def press(self, key: str) -> None:
        self.tmux("send-keys", key)

    def text(self, colours: bool = False) -> str:
        """What stands there; a line that is wider than the screen is two, as people see it."""
        return self.tmux("capture-pane", "-p", *(["-e"] if colours else [])).rstrip()

    def wait(self, ready: Callable[[str], object], seconds: float = 120) -> list[str]:
        """Wait for the screen to be as wanted; the different screens on the way to it."""
        seen = [""]
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (text := self.text()) != seen[-1]:
                seen.append(text)
            if ready(text):
                return seen
            time.sleep(0.01)
        raise AssertionError(f"never came:\n{seen[-1]}")


@pytest.fixture
def screen(tmp_path, tmp_path_factory) -> Iterator[Callable[..., Screen]]:
    opened: list[Screen] = []

    def start(**variables: str) -> Screen:
        environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path_factory.getbasetemp() / "cache"), "PS1": "$ "}
        for name in ("NO_COLOR", "COLUMNS", "LINES"):  # pytest-xdist sets the width of another terminal
            environment.pop(name, None)
        opened.append(Screen(tmp_path, environment | variables))
        return opened[-1]

    yield start
    for one in opened:
        one.tmux("kill-server")


def command(*words: object) -> str:
    return shlex.join([sys.executable, "-m", "llavanext_cli", "ask", *map(str, words)])


def joined(text: str) -> str:
    return text.replace("\n", "")


@needs_tmux
@pytest.mark.slow
def test_a_chat(screen, run_llavanext, media, tiny_checkpoint, tmp_path):
    words = ["--chat", "--checkpoint", tiny_checkpoint, "--max-new-tokens", 60, *SHORT]
    piped = run_llavanext("ask", *words, typed="what is it?\n")
    answer = piped.stdout.strip()
    assert answer and ESCAPE not in piped.stdout + piped.stderr

    there = screen(TERM="screen")
    there.type("clear; " + command(*words) + "; echo code $?")
    there.wait(lambda text: text.endswith("\n>"))
    assert "Ask, or type /help. Ctrl-D leaves." in there.text()
    there.type("what is it?")
    seen = there.wait(lambda text: "tokens/s" in joined(text) and text.endswith("\n>"))
    shown = re.sub(r"[\x00-\x20\x7f-\x9f]", "", answer)  # control characters are kept from a terminal
    assert shown in re.sub(r"\s", "", seen[-1])
    growing = [text for text in seen if "what is it?" in text and "tokens/s" not in joined(text)]
    assert len(growing) >= 3, "the answer did not come in pieces"
    for text in growing:
        begun = re.sub(r"\s", "", text.partition("what is it?")[2])
        assert shown.startswith(begun)
    assert all(len(line) <= 40 for line in seen[-1].splitlines())

    there.type("/dance")
    there.wait(lambda text: "Hint: /help lists all" in text and text.endswith("\n>"))
    coloured = there.text(colours=True)
    assert re.search(r"\x1b\[[0-9;]*31[0-9;]*mError:", coloured) or re.search(r"\x1b\[1m\x1b\[31mError:", coloured)
    there.press("Up")  # the terminal's own history
    there.wait(lambda text: text.endswith("> /dance"))
    there.press("C-c")  # drops what was typed, also after MindSpore has computed
    there.wait(lambda text: text.endswith("> /dance\n>"))
    there.press("C-d")
    there.wait(lambda text: "\ncode 0" in text)
    assert "Traceback" not in there.text()


@needs_tmux
@pytest.mark.full
def test_a_batch(screen, media, tiny_checkpoint, tmp_path):
    lines = [sample(f"q{n}", "image", f"{n % 6}.png", "what is it?", "a cat") for n in range(60)]
    questions = write_samples(tmp_path / "questions.jsonl", media, lines)
    words = ["--batch", questions, "--out", "answers.jsonl", "--checkpoint", tiny_checkpoint, "--batch-size", 2]
    there = screen(TERM="screen-256color")
    there.type("clear; " + command(*words, "--max-new-tokens", 8, *SHORT) + "; echo code $?")
    seen = there.wait(lambda text: "\ncode 0" in text)
    last = seen[-1]
    counts = {found[1] for text in seen if (found := re.search(r"^Asking (\d+)/60 questions", text, re.MULTILINE))}
    assert len(counts) >= 3, "progress did not move"
    assert [line.split()[:3] for line in last.splitlines() if "sking" in line] == [["Asking", "60/60", "questions"]]
    assert "60 answered, 0 failed" in joined(last)
    assert (tmp_path / "answers.jsonl").read_text().count("\n") == 60


@needs_tmux
@pytest.mark.parametrize("variables", [{}, {"NO_COLOR": "1"}])
def test_an_error(screen, tiny_checkpoint, variables):
    there = screen(TERM="screen-256color", **variables)
    words = ["what?", "--image", "gone.png", "--checkpoint", tiny_checkpoint]
    there.type("clear; " + command(*words) + "; echo code $?")
    there.wait(lambda text: "\ncode 1" in text)
    text = there.text(colours=True)
    assert "Error:" in text and "Hint:" in text
    assert bool(re.search(r"\x1b\[[0-9;]*3[1-7]", text)) is not bool(variables)


@pytest.mark.full
def test_a_reader_that_goes_away(run_llavanext, tiny_checkpoint, tmp_path):
    """`llavanext ask … | head -1`: a quiet end."""
    words = [sys.executable, "-m", "llavanext_cli", "ask", "--chat", "--checkpoint", tiny_checkpoint]
    words += ["--max-new-tokens", "8", *SHORT]
    typed = "what is it?\n" * 5
    with subprocess.Popen(
        list(map(str, words)),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
    ) as process:
        process.stdin.write(typed)
        process.stdin.close()
        assert process.stdout.readline().strip()
        process.stdout.close()
        errors = process.stderr.read()
        assert process.wait(timeout=120) == 0
    assert errors == ""


@pytest.mark.full
def test_json_is_alone_on_stdout(run_llavanext, media, tiny_checkpoint):
    words = ["ask", "what is it?", "--video", media / "clip.mp4", "--checkpoint", tiny_checkpoint, "--json"]
    done = run_llavanext(*words, "--max-new-tokens", "6", *SHORT)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["prompt_tokens"] > answer["media_tokens"] > 0
    assert answer["frames"] == 8 and answer["tiles"] == 0
    assert answer["seconds_to_first"] > 0 and answer["tokens_per_second"] > 0
    assert done.stderr == ""
