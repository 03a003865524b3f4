"""Run the demo: make the data, then the product's own commands, each in a process of its own as a user would."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.demo.data import Sizes, make_data
from llavanext_cli.demo.model import write_model
from llavanext_cli.demo.report import Row, Scored, build_rows, read_answers, report_to_dict
from llavanext_cli.errors import LlavaNextError

BATCH = 16


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
    workers = min(2, len(os.sched_getaffinity(0)))
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
    on_command: Callable[[str], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DemoReport:
    """Make the data and run every command.

    Args:
        folder: for everything; must not exist, or be empty.
        sizes: how much of everything.
        seed: of data and weights.
        on_command: called with each command line before it runs; its progress goes to this process's stderr.
        progress: called while data are made.

    Raises:
        LlavaNextError: the folder holds something, or a command failed.
    """
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise LlavaNextError(f"{folder} already holds something", hint="choose another --dir")
    started = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    sentences = make_data(folder / "data", sizes, seed, progress)
    write_model(folder / "models" / "random", sentences, seed)
    commands = []
    for words in plan_commands(sizes):
        line = shlex.join(["llavanext", *words])
        commands.append(line)
        if on_command:
            on_command(line)
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
        LlavaNextError: it failed; it has said why on stderr.
    """
    command = [sys.executable, "-m", "llavanext_cli", *words]
    done = subprocess.run(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=False)
    if done.returncode:
        hint = f"run it by itself in {folder}"
        raise LlavaNextError(f"`llavanext {shlex.join(words)}` ended with code {done.returncode}", hint=hint)
