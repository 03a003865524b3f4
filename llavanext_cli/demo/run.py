"""Run the demo: make the data, then the product's own commands, each in a process of its own as a user would."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from llavanext_cli import INNER_ENV
from llavanext_cli.demo.data import Sizes, make_data
from llavanext_cli.demo.model import write_model
from llavanext_cli.demo.report import Row, Scored, build_rows, read_answers, report_to_dict
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.launching.processes import end_with_parent
from llavanext_cli.machine.cores import usable_cores
from llavanext_cli.signals import raise_on_termination

BATCH = 16
NOTE = "demo.json"
"""Written first: a folder that holds it is a demo's, whole or not, and may be replaced."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo found: rows of accuracies, all answers, the commands it ran, and seconds in all."""

    rows: list[Row]
    answers: list[Scored]
    commands: list[str]
    seconds: float
    file: Path


def plan_commands(sizes: Sizes) -> list[list[str]]:
    """The command lines, relative to the demo's folder."""
    return [
        ["mix", "data/stage2.yaml", "--out", "stage2.jsonl"],
        ["mix", "data/stage3.yaml", "--out", "stage3.jsonl"],
        ["mix", "data/test.yaml", "--out", "test.jsonl"],
        ["convert", "models/random", "models/base"],
        _train("stage2", "models/base", sizes.steps_stage2),
        _train("stage3", "runs/stage2/model", sizes.steps_stage3),
        _ask("runs/stage3/model"),
    ]


def _train(stage: str, checkpoint: str, steps: int) -> list[str]:
    """One worker a core, two at most: together they are nearly twice as fast as one with two threads."""
    workers = min(2, usable_cores())
    words = ["train", f"tiny-{stage}", "--data", f"{stage}.jsonl", "--checkpoint", checkpoint, "--out", f"runs/{stage}"]
    settings = ["--set", f"train.batch_size={BATCH // workers}", "--set", f"train.steps={steps}"]
    return [*words, "--devices", str(workers), *settings]


def _ask(checkpoint: str) -> list[str]:
    words = ["ask", "--batch", "test.jsonl", "--out", "answers.jsonl", "--checkpoint", checkpoint]
    return [*words, "--preset", "tiny-ask", "--batch-size", str(BATCH)]


def run_demo(
    folder: Path,
    sizes: Sizes,
    seed: int = 0,
    *,
    force: bool = False,
    on_command: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoReport:
    """Make the data and run every command.

    Args:
        folder: for everything; must not exist, or be empty.
        sizes: how much of everything.
        seed: of data and weights.
        force: replace an earlier demo.
        on_command: called with each command line before it runs; its progress goes to this process's stderr.
        progress: called while data are made.

    Raises:
        LlavaNextError: the folder holds something or cannot be made, or a command failed.
    """
    started = time.monotonic()
    _make_folder(folder, force)
    with _held(folder):
        (folder / NOTE).write_text(json.dumps({"seed": seed, "sizes": asdict(sizes)}) + "\n", encoding="utf-8")
        commands = _run_all(folder, sizes, seed, on_command, progress)
        answers = read_answers(folder / "answers.jsonl", folder / "data" / "kinds.json")
        rows = build_rows(answers)
        seconds = time.monotonic() - started
        file = folder / "report.json"
        file.write_text(json.dumps(report_to_dict(rows, commands, seconds), indent=2) + "\n", encoding="utf-8")
    return DemoReport(rows, answers, commands, seconds, file)


def _run_all(
    folder: Path,
    sizes: Sizes,
    seed: int,
    on_command: Callable[[str], None] | None,
    progress: Callable[[int, int], None] | None,
) -> list[str]:
    """Make the data, run every command; the command lines."""
    sentences = make_data(folder / "data", sizes, seed, progress)
    write_model(folder / "models" / "random", sentences, seed)
    commands = []
    for words in plan_commands(sizes):
        line = shlex.join(["llavanext", *words])
        commands.append(line)
        if on_command:
            on_command(line)
        run_command(words, folder)
    return commands


def _make_folder(folder: Path, force: bool) -> None:
    """An empty folder for the demo. `force` replaces an earlier demo, and nothing that is none."""
    try:
        if folder.is_dir() and any(folder.iterdir()):
            if not (folder / NOTE).is_file():
                raise LlavaNextError(f"{folder} already holds something", hint="choose another --dir")
            if not force:
                hint = "choose another --dir, or replace it with --force"
                raise LlavaNextError(f"{folder} already holds a demo", hint=hint)
            with _held(folder):
                shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as fault:
        reason = "it is a file" if isinstance(fault, FileExistsError) else fault.strerror
        raise LlavaNextError(f"{folder} cannot be made: {reason}", hint="choose another --dir") from fault


@contextlib.contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a demo's folder by its note, so that no other demo replaces it under way.

    Raises:
        LlavaNextError: another demo holds it.
    """
    with (folder / NOTE).open("a") as note:
        try:
            fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as fault:
            hint = "wait until it has ended, or choose another --dir"
            raise LlavaNextError(f"{folder} is in use by another llavanext demo", hint=hint) from fault
        except OSError:  # a disk without locks
            pass
        yield


def run_command(words: list[str], folder: Path) -> None:
    """Run one `llavanext` command in `folder`.

    Raises:
        LlavaNextError: it failed; it has said why on stderr.
        KeyboardInterrupt, SystemExit: Ctrl-C, or this process was told to end; the command has ended too, and with it
            its workers.
    """
    command = [sys.executable, "-m", "llavanext_cli", *words]
    with raise_on_termination():
        # A session of its own: Ctrl-C reaches the command once, through us, and it is given the time to clean up.
        process = subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, INNER_ENV: "1"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=end_with_parent,
        )
        try:
            code = process.wait()
        except (KeyboardInterrupt, SystemExit) as ended:
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a script, and there too
            process.send_signal(signal.SIGTERM if ignored or isinstance(ended, SystemExit) else signal.SIGINT)
            process.wait()
            raise
        finally:
            process.kill()  # of no effect on one that has ended; a second Ctrl-C does not wait
    if code:
        hint = f"run it by itself in {folder}"
        raise LlavaNextError(f"`llavanext {shlex.join(words)}` ended with code {code}", hint=hint)
