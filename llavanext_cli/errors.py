"""The one error family: one line that says what is wrong, and a hint that says what to do.

Whatever a user can cause raises a `LlavaNextError`; the command group in `app.py` is the only place that catches it.
Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Sequence

EXIT_USER = 1  # and 2 for usage, which is typer's
EXIT_RUNTIME = 3
EXIT_INTERRUPTED = 130


class LlavaNextError(Exception):
    """An error that the user can act on.

    Args:
        what: one line that says what is wrong, with the file, key or id.
        hint: what to do next, or a command to run. May be empty.
        details: further lines, one for each fault that was collected.
    """

    exit_code = EXIT_USER

    def __init__(self, what: str, hint: str = "", details: Sequence[str] = ()):
        super().__init__(what)
        self.what = what
        self.hint = hint
        self.details = tuple(details)

    def __str__(self) -> str:
        return "\n".join([self.what, *(f"  {line}" for line in self.details)])


class ConfigError(LlavaNextError):
    """A preset, a mix file or a `--set` option is wrong."""


class DataError(LlavaNextError):
    """A data file, an image or a video cannot be used."""


class CheckpointError(LlavaNextError):
    """A checkpoint folder is incomplete or does not fit the model."""


class FetchError(LlavaNextError):
    """A download failed, or delivered something else than was asked for."""


class RuntimeMissingError(LlavaNextError):
    """A package, a device or a driver that the command needs is missing."""

    exit_code = EXIT_RUNTIME


class TrainingError(LlavaNextError):
    """A training run ended before its last step."""


class RunStoppedError(LlavaNextError):
    """A training run was ended by Ctrl-C (exit code 130) or SIGTERM (143), and can be resumed."""

    def __init__(self, what: str, hint: str, exit_code: int):
        super().__init__(what, hint)
        self.exit_code = exit_code
