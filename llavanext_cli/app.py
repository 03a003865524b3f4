"""The command line: a table of commands, the global options, and the one place that catches our errors.

A command's module is imported when that command is named, or when `llavanext --help` lists all of them; it imports its
own workers inside the function. So help stays fast, and nothing heavy is loaded before it is needed. For the same
reason help is plain text: typer's boxes would load rich and its Markdown parser, and take twice the time.
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
    errno.EROFS: "choose a place that can be written",
    errno.EACCES: "choose a place that you may read and write, or ask for the right to",
    errno.EPERM: "choose a place that you may read and write, or ask for the right to",
    errno.EIO: "the disk or the network drive fails: copy the files to another one",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EMFILE: "allow more open files: ulimit -n 65536",
}
"""Faults of a disk or of rights, which can turn up at any read or write, and what to do. Others are bugs of ours."""

METAVARS = {"int": "N", "int range": "N", "float range": "X", "path": "PATH", "str": "NAME"}
"""What stands for an option's value in help, by the name of its type; an option's own metavar comes first."""


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
    # Whole in the list of commands, where click would cut it at the width of a line.
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
    """Mark the paragraphs of a help text that hold indented lines, so that their lines are not run together."""
    paragraphs = inspect.cleandoc(text).split("\n\n")
    return "\n\n".join(f"\b\n{p}" if "\n " in p and not p.startswith("\b") else p for p in paragraphs)


class FilledPath(TyperPath):
    """A path that is not empty: `--out "$RUN"` with RUN unset must not mean the working folder."""

    def convert(self, value: Any, param: Any, ctx: Any) -> Any:
        if value == "":
            self.fail("it is empty, and a path is needed", param, ctx)
        return super().convert(value, param, ctx)


class LazyCommands(Mapping):
    """name → command, each built when it is first looked at."""

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
            _check_working_folder()
            return super().invoke(ctx)


def _check_working_folder() -> None:
    """Every relative path, and many a library, would fail in words that nobody can place."""
    try:
        os.getcwd()
    except FileNotFoundError as gone:
        raise LlavaNextError("the working folder was removed", "cd to a folder that is there") from gone


@contextmanager
def report_errors() -> Iterator[None]:
    """Errors of users and of their machines become a message and an exit code."""
    try:
        yield
    except LlavaNextError as fault:
        raise _told(fault) from fault
    except KeyboardInterrupt as interrupt:
        console.interrupted()
        raise typer.Exit(EXIT_INTERRUPTED) from interrupt
    except console.ReaderGoneError as gone:
        _discard_stdout()
        raise typer.Exit(0) from gone
    except BrokenPipeError as broken:
        if _is_reader_gone():  # in the middle of `--help`, which is not written by us
            _discard_stdout()
            raise typer.Exit(0) from broken
        # A pipe to some worker. typer would end with 1 and say nothing.
        raise RuntimeError("a pipe to another process broke") from broken
    except OSError as fault:
        if fault.errno not in OS_ERROR_HINTS:
            raise
        place = f"{fault.filename2 or fault.filename}: " if fault.filename else ""
        told = LlavaNextError(f"{place}{os.strerror(fault.errno)}", OS_ERROR_HINTS[fault.errno])
        told.__cause__ = fault
        raise _told(told) from fault


def _told(fault: LlavaNextError) -> typer.Exit:
    """Write an error; the returned exit carries its code."""
    console.error(fault)
    if console.is_verbose() and fault.__cause__ is not None:
        import traceback

        console.say("".join(traceback.format_exception(fault.__cause__)).rstrip())
    return typer.Exit(fault.exit_code)


def _is_reader_gone() -> bool:
    """Whether stdout is a pipe or a socket that nobody reads any more."""
    import select

    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported without being asked for
    return bool(poll.poll(0))


def _discard_stdout() -> None:
    """Give what is left in the buffer somewhere to go, or Python complains while it shuts down."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):  # not a real file: nothing is left to complain about
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives until the program ends


def _set_verbose(value: bool) -> bool:
    if value:
        console.configure(verbose=True)
    return value


def _set_no_color(value: bool) -> bool:
    if value:
        console.configure(no_color=True)
        os.environ["NO_COLOR"] = "1"  # rich, and what we start, read it
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
    """Fine-tune LLaVA-NeXT-Video and ask it about pictures and clips, on MindSpore: Ascend or CPU.

    The main job in five steps: fetch, mix, convert, train, ask.

    Example:
      llavanext demo --dir demo

    Next: llavanext COMMAND --help shows an example of each command that runs.
    """


def main() -> None:
    """Entry point of the `llavanext` executable."""
    # A service, or `>&-`, may have closed them: Python then has None, and there is nowhere to write or read.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - lives until the program ends
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    sys.stdin = sys.stdin or open(os.devnull)  # noqa: SIM115 - `<&-`: nothing is typed
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # an answer in Chinese on an ASCII terminal is no reason to stop
    app()
