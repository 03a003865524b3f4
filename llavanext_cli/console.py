"""The one writer: data to stdout, messages and progress to stderr. Commands call it; lower layers never do.

    out(text)            a line of data                    say(text)      a message
    out_json(value)      one JSON object on one line       warn(text)     a message that begins with "Warning:"
    write(text)          a piece of a streamed answer      error(fault)   an error with its details and hint
    table(header, rows)  aligned columns                   progress(...)  a bar on a terminal, lines elsewhere

Colours appear on a terminal only, and never under NO_COLOR or `--no-color`. Text is never read as markup, so square
brackets in a path or an answer survive. Control characters in messages and tables are written as `\\x1b`, because
names and ids come from data. rich is imported only when it draws something.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
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

PLAIN_SECONDS = 10.0
"""Without a terminal, progress is a line every ten seconds ..."""
PLAIN_TENTH_SECONDS = 1.0
"""... or at each tenth of the work, if at least a second has passed."""

WIDE = 80
"""Columns of a terminal from which on progress has a bar; below, only its text."""

CONTROL = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""Characters of an answer that are not sent to a terminal: they move the cursor, ring, or change colours."""

_CONTROLS = (*range(32), *range(127, 160), *range(0x2028, 0x202F), *range(0x2066, 0x206A))
ESCAPES = {code: repr(chr(code))[1:-1] for code in _CONTROLS}
"""How control characters are written in one line of text: they could hide, recolour or fake other lines."""
LINE_ESCAPES = {code: text for code, text in ESCAPES.items() if chr(code) not in "\t\n"}
"""The same for messages of several lines."""

VERBOSE_ENV = "LLAVANEXT_VERBOSE"
"""Set to 1 by `-v`, so that worker processes know."""


class ReaderGoneError(Exception):
    """The reader of our output stopped, as `| head` does. The command group ends the program quietly."""


@dataclasses.dataclass
class _State:
    no_color: bool = False
    live: RichProgress | None = None  # the bars on the screen, shared by all open `progress` blocks
    live_users: int = 0


_state = _State()
_lock = threading.RLock()


def configure(*, verbose: bool | None = None, no_color: bool | None = None) -> None:
    """Set by the global options; None leaves a setting unchanged."""
    if verbose is not None:
        os.environ[VERBOSE_ENV] = "1" if verbose else "0"
    if no_color is not None:
        _state.no_color = no_color


def is_verbose() -> bool:
    """Whether `-v` was given to this command, or to the command that started this worker."""
    return os.environ.get(VERBOSE_ENV, "0") not in ("", "0")


def is_terminal(stream: IO[str]) -> bool:
    """Whether `stream` is a terminal that can redraw a line."""
    return stream.isatty() and os.environ.get("TERM") != "dumb"


# ---------------------------------------------------------------------------------------------------------------- data


def can_write(text: str) -> bool:
    """Whether the encoding of stdout has all of these characters; missing ones are written as question marks."""
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        return False
    return True


def out(text: str = "") -> None:
    """Write one line of data to stdout."""
    write(text + "\n")


def write(text: str) -> None:
    """Write data to stdout at once, such as a piece of a streamed answer. A terminal gets no control characters.

    Raises:
        ReaderGoneError: stdout is a pipe whose reader has stopped.
    """
    with _lock:
        if sys.stdout.isatty():
            text = text.translate(CONTROL)
        try:
            if _state.live is not None and is_terminal(sys.stdout):
                # Both streams are one screen: the console of the bar keeps the bar below the text.
                _state.live.console.out(text, end="", highlight=False)
                return
            sys.stdout.write(text)
            sys.stdout.flush()
        except BrokenPipeError as gone:
            raise ReaderGoneError from gone


def out_json(value: Any) -> None:
    """Write one JSON object (a dict, a dataclass, or a nesting of them) on one line."""
    out(json.dumps(value, ensure_ascii=False, default=_plain))


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write aligned columns to stdout; a column of numbers is aligned to the right.

    On a terminal, the last column is wrapped to the width that is left.
    """
    from rich.table import Table
    from rich.text import Text

    rows = list(rows)
    on_terminal = is_terminal(sys.stdout)
    grid = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for number, name in enumerate(header):
        is_numeric = bool(rows) and all(_is_number(row[number]) for row in rows)
        is_last = number == len(header) - 1
        grid.add_column(
            Text(name),
            justify="right" if is_numeric else "left",
            no_wrap=not (is_last and on_terminal),
            overflow="fold",
        )
    for row in rows:
        grid.add_row(*(Text(_cell(value)) for value in row))
    if on_terminal:
        with _lock:
            (_state.live.console if _state.live is not None else _rich(sys.stdout)).print(grid)
        return
    screen = _rich(sys.stdout, width=1 << 20)
    with screen.capture() as captured:
        screen.print(grid)
    write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def fields(values: Mapping[str, Any]) -> None:
    """Write lines of `name  value` to stdout, with aligned values."""
    width = max((len(name) for name in values), default=0)
    for name, value in values.items():
        out(f"{name.ljust(width)}  {_cell(value)}")


# ------------------------------------------------------------------------------------------------------------ messages


def say(text: str = "") -> None:
    """Write a message to stderr."""
    _styled((text.translate(LINE_ESCAPES), ""))


def warn(text: str) -> None:
    """Write a warning to stderr."""
    _styled(("Warning:", "bold yellow"), (f" {text.translate(ESCAPES)}", ""))


def next_step(command: str) -> None:
    """Say which command comes next."""
    if INNER_ENV not in os.environ:
        _styled(("Next:", "bold green"), (f" {command.translate(ESCAPES)}", ""))


def interrupted() -> None:
    """Say that Ctrl-C has ended the command."""
    if INNER_ENV not in os.environ:
        say("Interrupted.")


def error(fault: LlavaNextError) -> None:
    """Write what is wrong, one line for each detail, and the hint."""
    _styled(("Error:", "bold red"), (f" {fault.what.translate(ESCAPES)}", ""))
    for line in fault.details:
        _styled((f"  {line.translate(ESCAPES)}", ""))
    if fault.hint:
        _styled(("Hint:", "bold cyan"), (f" {fault.hint.translate(ESCAPES)}", ""))


# ------------------------------------------------------------------------------------------------------------ progress


class Progress:
    """The callback that `progress` yields: `report(done, total)`, from any thread. A total of 0 means unknown."""

    def __init__(self, label: str, unit: str):
        self.label, self.unit = label.translate(ESCAPES), unit
        self._started = self._last_line = time.monotonic()
        self._done, self._total, self._note = 0, 0, ""
        self._shown = (0, 0)  # what the last plain line said
        self._task: TaskID | None = None

    def __call__(self, done: int, total: int, note: str = "") -> None:
        """Report how far the work is.

        Args:
            done, total: in the unit given to `progress`.
            note: a few words after the numbers, such as the loss; kept until the next note.
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
        waited = now - self._last_line
        tenths = 10 * (self._done - self._shown[0]) // self._total if self._total else 0
        is_due = waited >= PLAIN_SECONDS or (waited >= PLAIN_TENTH_SECONDS and tenths >= 1)
        if not (is_due or (last and self._shown != (self._done, self._total))):
            return
        self._shown, self._last_line = (self._done, self._total), now
        percent = f"{100 * self._done / self._total:.0f} %, " if self._total else ""
        note = f"  {self._note}" if self._note else ""
        say(f"{self.label}: {percent}{self._count()}, {format_seconds(now - self._started)}{note}")


@contextmanager
def progress(label: str, unit: str = "") -> Iterator[Progress]:
    """Show the progress of one long step on stderr; several may be open at once.

    Args:
        label: the step ("Converting").
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
        # Our own writers use the console of the bar, so stdout must not be redirected into it.
        _state.live = Progress(*columns, console=screen, redirect_stdout=False, redirect_stderr=False)
        _state.live.start()
    _state.live_users += 1


def _close_live() -> None:
    _state.live_users -= 1
    if _state.live_users == 0:
        _state.live.stop()
        _state.live = None


# ------------------------------------------------------------------------------------------------------------- helpers


def _rich(stream: IO[str], width: int | None = None) -> Console:
    from rich.console import Console

    return Console(
        file=stream, width=width, no_color=_state.no_color or None, highlight=False, markup=False, emoji=False
    )


def _styled(*parts: tuple[str, str]) -> None:
    """Write one line of (text, style) parts to stderr; styles show on a terminal only."""
    if is_terminal(sys.stderr):
        from rich.text import Text

        with _lock:
            screen = _state.live.console if _state.live is not None else _rich(sys.stderr)
            screen.print(Text.assemble(*parts), soft_wrap=True)
        return
    try:
        sys.stderr.write("".join(text for text, _ in parts) + "\n")
        sys.stderr.flush()
    except BrokenPipeError as gone:
        raise ReaderGoneError from gone
    except OSError:  # the disk behind `2>` is full: a message that cannot be written must not end the work
        pass


def _plain(value: Any) -> Any:
    """Convert what `json` cannot write by itself."""
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
