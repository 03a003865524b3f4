"""The one writer: data to stdout, talk and progress to stderr. Commands call it; lower layers never do.

    out(text)           a line of data                    say(text)      a line of talk
    out_json(value)     one JSON object on one line       warn(text)     a line that begins with "Warning:"
    write(text)         a piece of a streamed answer      error(fault)   an error with its details and hint
    table(header, rows) aligned columns                   progress(label) a bar on a terminal, lines elsewhere

Nothing is coloured unless it goes to a terminal, and never under NO_COLOR or `--no-color`. Text is written as it is:
no markup, no wrapping (but for the last column of a table on a terminal), so that square brackets in a path or an
answer survive. Only control characters are spelt out, as `\\x1b`, in talk and tables: names and ids come from data.
rich is imported only for a terminal.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import PurePath
from typing import IO, TYPE_CHECKING, Any

from llavanext_cli import INNER_ENV
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.units import format_seconds, format_size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

PLAIN_LINES = 10
"""Without a terminal, progress is a line for each tenth of the work ..."""
PLAIN_SECONDS = 10.0
"""... or each ten seconds, whichever comes first, but ..."""
PLAIN_LEAST_SECONDS = 1.0
"""... never more than one line a second."""

LEAST_COLUMN = 20
"""Characters that must be left for the last column of a table, or its text is not wrapped."""

WIDE = 80
"""Columns of a terminal from which on progress has a bar; below, only its words and numbers."""

CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""What an answer must not send to a terminal: characters that move the cursor, ring, or recolour."""

_CONTROLS = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROLS}
"""How control characters are spelt where a text is one line: they could hide, recolour or fake other lines."""
LINE_ESCAPES = {code: text for code, text in ESCAPES.items() if chr(code) not in "\t\n"}
"""The same for talk of several lines."""

VERBOSE_ENV = "LLAVANEXT_VERBOSE"
"""Set to 1 by `-v`, so that worker processes know."""


class ReaderGoneError(Exception):
    """Whoever read our output stopped, as `| head` does. The command group ends the program quietly."""


@dataclasses.dataclass
class _State:
    no_color: bool = False
    live: RichProgress | None = None
    live_users: int = 0


_state = _State()
_lock = threading.RLock()


def configure(*, verbose: bool | None = None, no_color: bool | None = None) -> None:
    """Set by the global options; None leaves a setting as it is."""
    if verbose is not None:
        os.environ[VERBOSE_ENV] = "1" if verbose else "0"
    if no_color is not None:
        _state.no_color = no_color


def is_verbose() -> bool:
    """Whether `-v` was given here or to the command that started this worker."""
    return os.environ.get(VERBOSE_ENV, "0") not in ("", "0")


def is_terminal(stream: IO[str] | None = None) -> bool:
    """Whether stderr (or `stream`) is a terminal that can redraw a line."""
    stream = stream or sys.stderr
    return stream.isatty() and os.environ.get("TERM") != "dumb"


# ---------------------------------------------------------------------------------------------------------------- data


def can_write(text: str) -> bool:
    """Whether stdout's encoding has all of these characters; those that it lacks are written as question marks."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def out(text: str = "") -> None:
    """Write one line of data to stdout."""
    write(text + "\n")


def write(text: str) -> None:
    """Write data to stdout at once: the pieces of a streamed answer. A terminal gets no control characters.

    Raises:
        ReaderGoneError: stdout is a pipe that nobody reads any more.
    """
    with _lock:
        if sys.stdout.isatty():
            text = text.translate(CONTROL)
        try:
            if _state.live is not None and is_terminal(sys.stdout):
                # Both streams are the same screen: going through the bar's console keeps the bar below the text.
                _state.live.console.out(text, end="", highlight=False)
                return
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError as gone:
            raise ReaderGoneError from gone


def out_json(value: Any) -> None:
    """Write one JSON object (a dict, a dataclass, or a nesting of them) on one line; a stream calls it repeatedly."""
    out(json.dumps(value, ensure_ascii=False, default=_plain))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write rows as aligned columns to stdout; columns in which every value is a number are set to the right.

    On a terminal the last column is wrapped to what is left of its width.
    """
    rows = list(rows)
    cells = [[_cell(value) for value in row] for row in rows]
    right = [bool(rows) and all(_is_number(row[column]) for row in rows) for column in range(len(header))]
    widths = [max(len(line[column]) for line in [list(header), *cells]) for column in range(len(header))]

    indent = sum(width + 2 for width in widths[:-1])
    room = shutil.get_terminal_size().columns - indent
    wraps = is_terminal(sys.stdout) and room >= LEAST_COLUMN and not right[-1]

    def join(line: Sequence[str]) -> str:
        last = f"\n{' ' * indent}".join(textwrap.wrap(line[-1], room) or [""]) if wraps else line[-1]
        padded = (
            text.rjust(width) if to_right else text.ljust(width)
            for text, width, to_right in zip([*line[:-1], last], widths, right, strict=True)
        )
        return "  ".join(padded).rstrip()

    _styled(sys.stdout, (join(header), "bold"))
    for line in cells:
        out(join(line))


def fields(values: Mapping[str, Any]) -> None:
    """Write `name  value` lines to stdout, the values aligned."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        out(f"{name.ljust(width)}  {_cell(value)}")


# ---------------------------------------------------------------------------------------------------------------- talk


def say(text: str = "") -> None:
    """Write one line of talk to stderr."""
    _styled(sys.stderr, (text.translate(LINE_ESCAPES), ""))


def warn(text: str) -> None:
    """Write a warning to stderr."""
    _styled(sys.stderr, ("Warning:", "bold yellow"), (f" {text.translate(ESCAPES)}", ""))


def next_step(command: str) -> None:
    """Tell which command comes next."""
    if INNER_ENV in os.environ:
        return
    _styled(sys.stderr, ("Next:", "bold green"), (f" {command.translate(ESCAPES)}", ""))


def interrupted() -> None:
    """Tell that Ctrl-C was heard."""
    if INNER_ENV not in os.environ:
        say("Interrupted.")


def error(fault: LlavaNextError) -> None:
    """Write what is wrong, one line for each collected detail, and the hint."""
    _styled(sys.stderr, ("Error:", "bold red"), (f" {fault.what.translate(ESCAPES)}", ""))
    for line in fault.details:
        _styled(sys.stderr, (f"  {line.translate(ESCAPES)}", ""))
    if fault.hint:
        _styled(sys.stderr, ("Hint:", "bold cyan"), (f" {fault.hint.translate(ESCAPES)}", ""))


# ------------------------------------------------------------------------------------------------------------ progress


class Progress:
    """The callback that `progress` yields: `report(done, total)`, from any thread. A total of 0 means not known."""

    def __init__(self, label: str, unit: str):
        self.label, self.unit = label.translate(ESCAPES), unit
        self._started = self._last_line = time.monotonic()
        self._last_tenth = 0
        self._shown = (0, 0)
        self._done, self._total, self._note = 0, 0, ""
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Say how far the work is.

        Args:
            done, total: in the unit given to `progress`.
            note: a few words shown behind the numbers, such as the loss; kept until the next one.
        """
        with _lock:
            self._done, self._total, self._note = done, total, note.translate(ESCAPES) or self._note
            if _state.live is not None and self._task is not None:
                _state.live.update(
                    self._task, completed=done, total=total or None, count=self._count(), note=self._note
                )
            elif self._task is None:
                self._plain_line()

    def _count(self) -> str:
        if self.unit == "bytes":
            return f"{format_size(self._done)}/{format_size(self._total) if self._total else '?'}"
        return f"{self._done}/{self._total or '?'} {self.unit}".rstrip()

    def _plain_line(self, last: bool = False) -> None:
        now = time.monotonic()
        tenth = PLAIN_LINES * self._done // self._total if self._total else 0
        waited = now - self._last_line
        due = waited >= PLAIN_SECONDS or (waited >= PLAIN_LEAST_SECONDS and tenth > self._last_tenth)
        if not (due or (last and self._shown != (self._done, self._total))):
            return
        self._shown = (self._done, self._total)
        self._last_line, self._last_tenth = now, tenth
        percent = f"{100 * self._done / self._total:.0f} %, " if self._total else ""
        note = f"  {self._note}" if self._note else ""
        say(f"{self.label}: {percent}{self._count()}, {format_seconds(now - self._started)}{note}")


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Progress]:
    """Show the progress of one long step on stderr; several may be open at once.

    Args:
        label: what is being done ("Converting").
        unit: what is counted ("samples"); "bytes" is shown as kB, MB, GB.

    Yields:
        A callback `(done, total, note="")`.
    """
    report = Progress(label, unit)
    on_terminal = is_terminal(sys.stderr)
    if on_terminal:
        with _lock:
            _open_live()
            report._task = _state.live.add_task(report.label, total=None, count="", note="")
    try:
        yield report
    finally:
        with _lock:
            if on_terminal:
                _close_live()
            elif report._done:
                report._plain_line(last=True)


def _open_live() -> None:
    if _state.live is None:
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        screen = _rich(sys.stderr)
        columns = [
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=28),
            TextColumn("{task.fields[count]}", markup=False),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[note]}", markup=False),
        ]
        if screen.width < WIDE:
            columns = [TextColumn("{task.description} {task.fields[count]} {task.fields[note]}", markup=False)]
        # Our own writers go through the bar's console, so stdout must not be redirected into it.
        _state.live = Progress(
            *columns,
            console=screen,
            redirect_stdout=False,
            redirect_stderr=False,
        )
        _state.live.start()
    _state.live_users += 1


def _close_live() -> None:
    _state.live_users -= 1
    if _state.live_users == 0:
        _state.live.stop()
        _state.live = None


# ------------------------------------------------------------------------------------------------------------- helpers


def _rich(stream: IO[str]) -> Console:
    from rich.console import Console

    return Console(file=stream, no_color=_state.no_color or None, highlight=False, markup=False, emoji=False)


def _styled(stream: IO[str], *parts: tuple[str, str]) -> None:
    """Write one line made of (text, style) parts; the styles show on a terminal only."""
    line = "".join(text for text, _ in parts)
    if not is_terminal(stream):
        if stream is sys.stdout:
            out(line)
            return
        try:
            stream.write(line + "\n")
            stream.flush()
        except BrokenPipeError as gone:
            raise ReaderGoneError from gone
        except OSError:  # the disk behind `2>` is full: talk that cannot be written is no reason to end the work
            pass
        return
    from rich.text import Text

    with _lock:
        screen = _state.live.console if _state.live is not None else _rich(stream)
        screen.print(Text.assemble(*parts), soft_wrap=True)


def _plain(value: Any) -> Any:
    """What `json` cannot write by itself."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "item"):  # a NumPy number
        return value.item()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).translate(ESCAPES)
