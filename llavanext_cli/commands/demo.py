"""`llavanext demo`: all steps on a CPU, from drawn data to a model that answers."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavanext_cli import console, options
from llavanext_cli.errors import LlavaNextError

if TYPE_CHECKING:
    from llavanext_cli.demo.run import DemoReport

EXAMPLES = 2
"""Answers of each kind that are printed."""


def demo(
    folder: Annotated[Path, typer.Option("--dir", help="Folder for everything; it must be new or empty.")] = Path(
        "llavanext-demo"
    ),
    quick: Annotated[
        bool, typer.Option("--quick", help="Use little data: this only shows that everything runs.")
    ] = False,
    seed: options.Seed = 0,
    force: Annotated[bool, typer.Option("--force", "-f", help="Replace an earlier demo.")] = False,
    json: options.Json = False,
) -> None:
    """Train a tiny model from scratch on generated images and videos, then ask it about new ones.

    It runs mix, convert, train (stages 2 and 3) and ask as you would, in less than ten minutes on two cores, and prints
    the model's answers beside the right ones.

    Example:

      llavanext demo --dir demo

    Next: llavanext ask "Where is the sign?" --image demo/data/test/image-0003.png --checkpoint demo/runs/stage3/model
    """
    from llavanext_cli.demo.data import QUICK, Sizes
    from llavanext_cli.demo.report import find_shortfalls, report_to_dict
    from llavanext_cli.demo.run import run_demo

    with ExitStack() as drawing:

        def on_command(line: str) -> None:
            drawing.close()  # the commands show their own progress
            console.say(f"$ {line}")

        progress = drawing.enter_context(console.progress("Drawing images and videos"))
        sizes = QUICK if quick else Sizes()
        report = run_demo(folder, sizes, seed, force=force, on_command=on_command, progress=progress)
    if json:
        console.out_json(report_to_dict(report.rows, report.commands, report.seconds))
    else:
        _print(report, folder, quick)
    if not quick and (faults := find_shortfalls(report.rows)):
        raise LlavaNextError(
            "the model learned less than it should have", hint="please report this with report.json", details=faults
        )


def _print(report: DemoReport, folder: Path, quick: bool) -> None:
    examples = [s for row in report.rows for s in [a for a in report.answers if a.kind == row.kind][:EXAMPLES]]
    console.table(
        ["medium", "question", "expected", "answer"],
        [[s.medium, s.question, s.expected, s.answer] for s in examples],
    )
    console.out()
    console.table(
        ["kind", "asked", "right", "accuracy", "best constant answer"],
        [[row.kind, row.asked, row.right, f"{row.accuracy:.3f}", f"{row.constant:.3f}"] for row in report.rows],
    )
    console.out()
    console.out(f"The commands that ran in {folder}:")
    for line in report.commands:
        console.out(f"  {line}")
    console.say(f"{report.seconds:.0f} s; the figures are in {report.file}")
    if quick:
        console.say("With --quick a model learns almost nothing: the figures only show that everything runs.")
    asked = next((answer for answer in report.answers if answer.kind == "position"), None)
    if asked:
        image = folder / "data" / "test" / f"{asked.medium.removesuffix('-position')}.png"
        words = ["llavanext", "ask", asked.question, "--image", str(image)]
        console.next_step(shlex.join([*words, "--checkpoint", str(folder / "runs" / "stage3" / "model")]))
