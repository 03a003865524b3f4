"""Run the demo: draw the data, then run the product's own commands, each in a process of its own as a user would."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from llavanext_cli import INNER_ENV
from llavanext_cli.demo.data import Sizes, make_data
from llavanext_cli.demo.model import write_model
from llavanext_cli.demo.report import Row, Scored, build_rows, read_answers, report_to_dict
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.files import check_target, claim
from llavanext_cli.launching.processes import end_with_parent
from llavanext_cli.machine.cores import usable_cores
from llavanext_cli.signals import raise_on_termination

BATCH = 16
NOTE = "demo.json"
"""Written first: a folder that holds it is a demo, complete or not, and may be replaced."""


@dataclass(frozen=True)
class DemoReport:
    """What the demo found: rows of accuracies, all answers, the commands that it ran, and seconds in all."""

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
    """One worker for each core, at most two: they are nearly twice as fast as one worker with two threads."""
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
    """Draw the data and run every command.

    Args:
        folder: for everything; must not exist, or be empty.
        seed: of data and weights.
        force: replace an earlier demo.
        on_command: called with each command line before it runs; its progress goes to this process's stderr.
        progress: called while data are drawn.

    Raises:
        LlavaNextError: the folder cannot be used, or a command failed.
    """
    started = time.monotonic()
    check_target(
        folder,
        kind="a demo",
        is_ours=lambda path: (path / NOTE).is_file(),
        force=force,
        folder=True,
        option="--dir",
    )
    with claim(folder):
        if folder.exists():
            shutil.rmtree(folder)
        folder.mkdir()
        (folder / NOTE).write_text(json.dumps({"seed": seed, "sizes": asdict(sizes)}) + "\n", encoding="utf-8")
        sentences = make_data(folder / "data", sizes, seed, progress)
        write_model(folder / "models" / "random", sentences, seed)
        commands = []
        for words in plan_commands(sizes):
            commands.append(shlex.join(["llavanext", *words]))
            if on_command:
                on_command(commands[-1])
            run_command(words, folder)
        answers = read_answers(folder / "answers.jsonl", folder / "data" / "kinds.json")
        rows = build_rows(answers)
        seconds = time.monotonic() - started
        file = folder / "report.json"
        file.write_text(json.dumps(report_to_dict(rows, commands, seconds), indent=2) + "\n", encoding="utf-8")
    return DemoReport(rows, answers, commands, seconds, file)


def run_command(words: list[str], folder: Path) -> None:
    """Run one `llavanext` command in `folder`.

    Raises:
        LlavaNextError: it failed, and has written why to stderr.
        KeyboardInterrupt, SystemExit: after Ctrl-C or SIGTERM; the command and its workers have ended too.
    """
    command = [sys.executable, "-m", "llavanext_cli", *words]
    with raise_on_termination():
        # A session of its own: Ctrl-C reaches the command once, through us, and it gets the time to clean up.
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
            ignored = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # in the background of a script
            process.send_signal(signal.SIGTERM if ignored or isinstance(ended, SystemExit) else signal.SIGINT)
            process.wait()
            raise
        finally:
            process.kill()  # a second Ctrl-C does not wait; no effect on a process that has ended
    if code:
        hint = f"run it by itself in {folder}"
        raise LlavaNextError(f"`llavanext {shlex.join(words)}` ended with code {code}", hint=hint)
