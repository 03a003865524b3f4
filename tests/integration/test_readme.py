"""Every command that the README shows is one that the app takes; those that need nothing are run."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from llavanext_cli.app import app

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
