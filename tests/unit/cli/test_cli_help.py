"""Help of every command: fast, nothing heavy loaded, an example that parses, the next step."""

from __future__ import annotations

import re
import resource
import shlex
import subprocess
import sys

import pytest
import typer
from typer.main import get_command

from llavanext_cli.app import COMMANDS, app, keep_lines
from llavanext_cli.config.shipped import preset_files

HEAVY = (
    "numpy",
    "PIL",
    "mindspore",
    "mindformers",
    "transformers",
    "torch",
    "sentencepiece",
    "safetensors",
    "huggingface_hub",
    "av",
    "decord",
    "rich",
    "yaml",
)
SECONDS = 0.4


def command_paths() -> list[tuple[str, ...]]:
    """("mix",), ("presets", "list"), ...: every command, and () for the program itself."""
    paths: list[tuple[str, ...]] = [()]

    def walk(command, path):
        for name, child in getattr(command, "commands", {}).items():
            paths.append((*path, name))
            walk(child, (*path, name))

    walk(get_command(app), ())
    return paths


PATHS = command_paths()
IDS = [" ".join(path) or "llavanext" for path in PATHS]


def find(path):
    command = get_command(app)
    for name in path:
        command = command.commands[name]
    return command


def test_the_commands_were_found():
    assert {("presets",), ("presets", "list"), ("presets", "show"), ("presets", "copy"), ("presets", "check")} <= set(
        PATHS
    )
    assert [path[0] for path in PATHS if len(path) == 1] == [entry.name for entry in COMMANDS]


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_help_loads_nothing_heavy_and_is_fast(path):
    code = (
        "import sys; sys.argv = ['llavanext', *sys.argv[1:]]\n"
        "from llavanext_cli.app import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        f"print(sorted(set({HEAVY!r}) & set(sys.modules)), file=sys.stderr)"
    )
    fastest = float("inf")
    for _ in range(5):
        # Processor time of the child: what the command costs, however busy the machine is.
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code, *path, "--help"], capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        fastest = min(fastest, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.stderr == "[]\n"
        assert done.stdout.startswith(f"Usage: {' '.join(['llavanext', *path])} ")
        if fastest < SECONDS:
            break
    assert fastest < SECONDS


def example_of(help_text: str) -> list[str]:
    """Command lines that stand indented after "Example:"; a backslash continues one on the next line."""
    _, found, rest = help_text.partition("Example:")
    assert found, "help needs an example"
    lines = rest.replace("\\\n", " ").splitlines()
    commands = [line.strip() for line in lines if line.startswith("  llavanext ")]
    assert commands, "the example needs an indented line that begins with llavanext"
    return commands


def parse(line: str) -> None:
    """Parse a command line as the app would, without running it; a wrong option raises."""
    command, arguments = get_command(app), shlex.split(line)[1:]
    while arguments and arguments[0] in getattr(command, "commands", {}):
        command = command.commands[arguments.pop(0)]
    assert not hasattr(command, "commands"), f"{line}: no such command"
    try:
        command.make_context(command.name, arguments)
    except typer.Exit:
        pytest.fail(f"{line} ends before it runs")


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_help_has_a_sentence_an_example_and_the_next_step(path):
    text = find(path).help.replace("\b\n", "")
    first = " ".join(text.split("\n\n")[0].split())
    assert re.fullmatch(r"[A-Z].*\.", first), first
    for line in example_of(text):
        assert f"{line} ".startswith(" ".join(["llavanext", *path, ""]))
        parse(line)
    assert re.search(r"^Next: \S", text, re.MULTILINE)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_every_option_says_what_it_is(path):
    for parameter in find(path).params:
        assert parameter.help, f"{parameter.name} has no help"


@pytest.mark.parametrize("name", sorted(preset_files()))
def test_the_command_line_of_a_preset_parses(name):
    header = preset_files()[name].read_text().splitlines()[0]
    assert name in shlex.split(header)
    parse(header.removeprefix("# "))


def test_global_options_stand_before_and_after_the_command():
    for arguments in (["-v", "presets", "list"], ["presets", "list", "-v"]):
        done = subprocess.run([sys.executable, "-m", "llavanext_cli", *arguments], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "tiny-ask" in done.stdout


def test_lines_of_an_example_are_kept_and_others_are_not():
    text = "One\nsentence.\n\nExample:\n  llavanext a\n  llavanext b"
    assert keep_lines(text) == "One\nsentence.\n\n\b\nExample:\n  llavanext a\n  llavanext b"
    assert keep_lines(keep_lines(text)) == keep_lines(text)


@pytest.mark.parametrize("group", [(), ("presets",)])
def test_a_list_of_commands_has_every_summary_whole(group):
    from typer.testing import CliRunner

    shown = " ".join(CliRunner().invoke(app, [*group, "--help"]).stdout.split())
    for name, command in find(group).commands.items():
        summary = " ".join(command.help.partition("\n\n")[0].split())
        assert summary.endswith(".")
        assert f"{name} {summary}" in shown


def test_each_panel_of_the_commands_stands_once():
    panels = list(dict.fromkeys(entry.panel for entry in COMMANDS))
    assert not any(one != other and one.startswith(other) for one in panels for other in panels)


def test_arguments_are_written_in_capitals():
    for path in PATHS:
        for parameter in find(path).params:
            if parameter.param_type_name == "argument":
                assert parameter.metavar and parameter.metavar != parameter.name, (path, parameter.name)


@pytest.mark.parametrize("path", PATHS, ids=IDS)
def test_help_fits_80_columns_and_names_values_by_what_they_are(path):
    from typer.testing import CliRunner

    shown = CliRunner().invoke(app, [*path, "--help"], env={"COLUMNS": "80"}).stdout
    print(f"\n$ llavanext {' '.join([*path, '--help'])}\n{shown}")  # with -s, the transcript of every command's help
    assert max(map(len, shown.splitlines())) <= 80
    assert not re.search(r"<(int|float|str|path)\b", shown)
