"""The command line: a table of commands, the global options, and the one place that catches our errors.

A command's module is imported when that command is named, or when `llavanext --help` lists all of them; it imports its
worker inside the function. So help stays fast, and nothing heavy is loaded before it is needed. For the same reason
help is plain text: typer's boxes would load rich and its Markdown parser, and take twice the time.
"""

from __future__ import annotations

import errno
import inspect
import io
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperGroup
from typer.main import get_command
from typer.models import TyperPath

from llavanext_cli import __version__, console
from llavanext_cli.errors import EXIT_INTERRUPTED, LlavaNextError

SETTINGS: dict[str, Any] = {"help_option_names": ["-h", "--help"], "max_content_width": 110}
GLOBAL_OPTIONS = ("verbose", "no_color")


OS_ERROR_HINTS = {
    errno.ENOSPC: "make room, or choose a place on another disk",
    errno.EDQUOT: "make room, or choose a place on another disk",
    errno.EROFS: "choose a place that is not read-only",
    errno.EACCES: "choose a place where you may read and write",
    errno.EPERM: "choose a place where you may read and write",
    errno.EIO: "the disk or network drive is failing: copy the files to another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files: ulimit -n 65536",
}
"""Operating system errors that any read or write can meet, and what to do. Other ones are bugs of ours."""

METAVARS = {"int": "N", "int range": "N", "float range": "X", "path": "PATH", "str": "NAME"}
"""How help shows the value of an option, by the name of its type, unless the option has its own metavar."""


class Entry(NamedTuple):
    """One row of the table: `attribute` of `module` is a command's function, or a `typer.Typer` of subcommands."""

    name: str
    module: str
    attribute: str
    panel: str


COMMANDS = (
    Entry("demo", "llavanext_cli.commands.demo", "demo", "Start here"),
    Entry("fetch", "llavanext_cli.commands.fetch", "fetch", "Prepare"),
    Entry("mix", "llavanext_cli.commands.mix", "mix", "Prepare"),
    Entry("convert", "llavanext_cli.commands.convert", "convert", "Prepare"),
    Entry("train", "llavanext_cli.commands.train", "train", "Train and ask"),
    Entry("ask", "llavanext_cli.commands.ask", "ask", "Train and ask"),
    Entry("score", "llavanext_cli.commands.score", "score", "Train and ask"),
    Entry("presets", "llavanext_cli.commands.presets", "presets", "Settings and health"),
    Entry("doctor", "llavanext_cli.commands.doctor", "doctor", "Settings and health"),
)
LONGEST = max(len(entry.name) for entry in COMMANDS)


def load_command(entry: Entry) -> Any:
    """Import a command and build it.

    Returns:
        The command object of typer's own click.
    """
    target = getattr(import_module(entry.module), entry.attribute)
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False, pretty_exceptions_enable=False)
        target.command(entry.name)(function)
    command = get_command(target)
    command.name, command.rich_help_panel = entry.name, entry.panel
    return command


def _finish(command: Any, shared_parameters: list[Any]) -> None:
    """Give a command, and those below it, `-h`, plain help, and the global options after the name as well as before."""
    command.context_settings = SETTINGS | command.context_settings
    command.rich_markup_mode = None
    command.help = keep_lines(command.help or "")
    # Whole in the list of commands, where click would cut it at the width of one line.
    command.short_help = " ".join(command.help.partition("\n\n")[0].split())
    if isinstance(command, TyperGroup):
        for child in command.commands.values():
            _finish(child, shared_parameters)
    else:
        command.params = [*command.params, *shared_parameters]
        for parameter in command.params:
            if isinstance(parameter.type, TyperPath):
                parameter.type = FilledPath()
            if parameter.metavar is None and parameter.param_type_name == "argument":
                parameter.metavar = parameter.name.upper()
            elif parameter.metavar is None and not parameter.is_flag:
                parameter.metavar = METAVARS.get(parameter.type.name)


def keep_lines(text: str) -> str:
    """Mark paragraphs of a help text that have indented lines, so that click does not join their lines."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if "\n " in p and not p.startswith("\b") else p for p in paragraphs)


class FilledPath(TyperPath):
    """A path that is not empty: `--out "$RUN"` with RUN unset must not mean the current folder."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":
            self.fail("a path must not be empty", param, ctx)
        return super().convert(value, param, ctx)


class LazyCommands(Mapping):
    """name → command, each built when it is first needed."""

    def __init__(self, entries: tuple[Entry, ...], shared_parameters: list[Any]):
        self._entries = {entry.name: entry for entry in entries}
        self._shared = shared_parameters
        self._built: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._built:
            command = load_command(self._entries[name])
            _finish(command, self._shared)
            self._built[name] = command
        return self._built[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


class Llavanext(TyperGroup):
    """The top group: commands from the table, errors turned into messages and exit codes.

    The mapping is here and not in `main()`, so that typer's test runner sees what a user sees.
    """

    def __init__(self, **attributes: Any):
        super().__init__(**attributes | {"help": keep_lines(attributes.get("help") or "")})
        shared = [parameter for parameter in self.params if parameter.name in GLOBAL_OPTIONS]
        self.commands = LazyCommands(COMMANDS, shared)

    def list_commands(self, ctx: Any) -> list[str]:
        return list(self.commands)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        """One section of the help for each panel of the table."""
        panels: dict[str, list[tuple[str, str]]] = {}
        for name, command in self.commands.items():
            summary = command.get_short_help_str(limit=formatter.width)
            panels.setdefault(command.rich_help_panel, []).append((name.ljust(LONGEST), summary))
        for panel, rows in panels.items():
            with formatter.section(panel):
                formatter.write_dl(rows)

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with report_errors():  # `--help` and `--version` write while the context is made
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with report_errors():
            _check_current_folder()
            return super().invoke(ctx)


def _check_current_folder() -> None:
    """Without it every relative path, and many libraries, fail with messages that do not say why."""
    try:
        os.getcwd()
    except FileNotFoundError as gone:
        raise LlavaNextError("the current folder was removed", "cd to a folder that exists") from gone


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn errors that a user can act on into a message and an exit code."""
    try:
        yield
    except LlavaNextError as fault:
        raise _reported(fault) from fault
    except KeyboardInterrupt as interrupt:
        console.interrupted()
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt
    except console.ReaderGoneError as gone:
        _discard_stdout()
        raise typer.Exit(0) from gone
    except BrokenPipeError as broken:
        if _is_reader_gone():  # during `--help`, which typer writes
            _discard_stdout()
            raise typer.Exit(0) from broken
        # A pipe to a worker process. typer would exit with 1 and no message.
        raise RuntimeError("a pipe to another process broke") from broken
    except OSError as fault:
        if fault.errno not in OS_ERROR_HINTS:
            raise
        place = f"{fault.filename2 or fault.filename}: " if fault.filename else ""
        error = LlavaNextError(f"{place}{os.strerror(fault.errno)}", OS_ERROR_HINTS[fault.errno])
        error.__cause__ = fault
        raise _reported(error) from fault


def _reported(fault: LlavaNextError) -> typer.Exit:
    """Write an error; the returned exit has its code."""
    console.error(fault)
    if console.is_verbose() and fault.__cause__ is not None:
        import traceback

        console.say("".join(traceback.format_exception(fault.__cause__)).rstrip())
    return typer.Exit(fault.exit_code)


def _is_reader_gone() -> bool:
    """Whether stdout is a pipe or a socket whose reader has stopped."""
    import select

    poll = select.poll()
    poll.register(sys.stdout, 0)  # poll always reports errors
    return bool(poll.poll(0))


def _discard_stdout() -> None:
    """Send the rest of the buffer to /dev/null, or Python complains at its exit."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a real file
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the program ends


def _set_verbose(value: bool) -> bool:
    if value:
        console.configure(verbose=True)
    return value


def _set_no_color(value: bool) -> bool:
    if value:
        console.configure(no_color=True)
        os.environ["NO_COLOR"] = "1"  # rich and the processes that we start read it
    return value


def _print_version(value: bool) -> None:
    if value:
        console.out(f"llavanext {__version__}")
        raise typer.Exit


app = typer.Typer(
    cls=Llavanext,
    no_args_is_help=True,
    context_settings=SETTINGS,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


@app.callback()
def llavanext(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_print_version, is_eager=True)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option(
            "--verbose",
            "-v",
            help="Show warnings of MindSpore and MindFormers, and the cause of an error.",
            callback=_set_verbose,
            expose_value=False,
        ),
    ] = False,
    no_color: Annotated[
        bool,
        typer.Option(
            "--no-color",
            help="No colours; the variable NO_COLOR does the same.",
            callback=_set_no_color,
            expose_value=False,
        ),
    ] = False,
) -> None:
    """Fine-tune LLaVA-NeXT-Video and ask it about images and videos, on MindSpore: Ascend or CPU.

    The main job in five steps: fetch, mix, convert, train, ask.

    Example:
      llavanext demo --dir demo

    Next: llavanext COMMAND --help shows an example of each command.
    """


def main() -> None:
    """Entry point of the `llavanext` executable."""
    # A service, or `>&-`, may have closed them; Python then has None here.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - lives until the program ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer in Chinese must not fail on an ASCII terminal
    app()
