"""Every command that the README and the presets show is one that the app takes; those that need nothing are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llavanext_cli.app import app
from llavanext_cli.config.presets import preset_files

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("README.*.md"))]
RUNNABLE = ("presets list", "presets show", "presets diff", "fetch --list", "doctor --offline")


def shown(text: str) -> list[str]:
    """The lines of code blocks that start llavanext, continued lines joined, comments and `A &&` cut off."""
    blocks = re.findall(r"^```(?:\w*)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [part.strip() for line in lines for part in line.split("#")[0].split("&&")]
    return [command for command in commands if command.startswith("llavanext ")]


SHOWN = [(page.name, command) for page in PAGES for command in shown(page.read_text(encoding="utf-8"))]
HEADERS = [(name, path.read_text(encoding="utf-8").splitlines()[0]) for name, path in preset_files().items()]


def examples() -> list[tuple[str, str]]:
    """(command, example) for each line of a help text that starts with llavanext."""
    found, waiting = [], [("llavanext", get_command(app))]
    while waiting:
        name, command = waiting.pop()
        lines = [line.strip() for line in (command.help or "").splitlines()]
        found += [(name, line) for line in lines if line.startswith("llavanext ")]
        waiting += [(f"{name} {below}", child) for below, child in getattr(command, "commands", {}).items()]
    return found


EXAMPLES = examples()


def check(command: str) -> None:
    """Parse a command as the shell and the app would, down to its own options; nothing is run.

    Raises:
        an error of typer's click: the app does not take it.
    """
    words = shlex.split(command)[1:]
    group = get_command(app)
    context = group.make_context("llavanext", [*words[:1], "--help"], resilient_parsing=True)
    while hasattr(group, "get_command"):
        word = words.pop(0)
        group, name = group.get_command(context, word), word
        assert group is not None, f"no such command: {name}"
    group.make_context(name, words)


def test_the_readme_shows_every_command():
    assert {command.split()[1] for page, command in SHOWN if page == "README.md"} >= {
        "demo", "fetch", "mix", "convert", "train", "ask", "presets", "doctor",
    }  # fmt: skip


@pytest.mark.parametrize(("page", "command"), SHOWN)
def test_the_app_takes_it(page, command):
    check(command)


@pytest.mark.parametrize(("name", "header"), HEADERS)
def test_a_preset_opens_with_its_command(name, header):
    assert header.startswith("# llavanext ") and name in shlex.split(header)
    check(header.removeprefix("# "))


@pytest.mark.parametrize(("name", "example"), EXAMPLES)
def test_a_help_text_shows_its_command(name, example):
    assert f"{example} ".startswith(f"{name} ")
    check(example)


def test_every_help_text_has_an_example():
    assert len({name for name, _ in EXAMPLES}) == 1 + 8 + 5  # llavanext, its commands, those below presets


@pytest.mark.parametrize("command", sorted({c for _, c in SHOWN if c.removeprefix("llavanext ").startswith(RUNNABLE)}))
def test_it_runs(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, shlex.split(command)[1:])
    assert done.exit_code == 0 and done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_wrong_command_is_noticed():
    for command in ("llavanext trian tiny-stage2", "llavanext train tiny-stage2 --dta x", "llavanext presets lst"):
        with pytest.raises(BaseException, match=r"No such|no such"):
            check(command)
