"""`llavanext train`: fine-tune a checkpoint on one or several devices."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from typing import Annotated, Any

import typer

from llavanext_cli import console, options


def train(
    preset: Annotated[
        str,
        typer.Argument(
            help="Name or file of a train preset: see `llavanext presets list`.", autocompletion=options.complete_preset
        ),
    ],
    data: options.Data,
    checkpoint: options.Checkpoint,
    out: options.Out,
    devices: options.Devices = None,
    set_: options.Set = None,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a checkpoint: one worker for each device, progress here, the trained model in OUT/model.

    Example:

      llavanext train tiny-stage2 --data mix.jsonl --checkpoint base --out run

    Next: llavanext ask "What is it?" --image a.jpg --checkpoint run/model
    """
    from llavanext_cli.training.launch import check_training, run_training

    with console.progress("Checking samples", "samples") as on_check:
        run = check_training(
            preset, data, checkpoint, out, devices=devices, overrides=tuple(set_ or ()), progress=on_check
        )
    if dry_run:
        if json:
            console.out_json({"command": run.command, **asdict(run.plan)})
        else:
            console.out(shlex.join(run.command))
            console.say(f"{run.plan.steps} steps over {run.plan.samples} samples; nothing was written.")
        return
    with console.progress("Training", "steps") as on_train:
        report = run_training(
            run, force=force, on_step=lambda line: on_train(line["step"], line["steps"], describe(line))
        )
    if json:
        console.out_json(report)
        return
    console.out(str(report.model))
    console.say(f"Trained {report.steps} steps in {report.seconds:.0f} s, loss {report.loss:.4f}.")
    console.say(f'Next: llavanext ask "What is it?" --image PICTURE --checkpoint {report.model}')


def describe(line: dict[str, Any]) -> str:
    """One line of metrics in words."""
    return f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['samples_per_second']:.1f} samples/s" + (
        "  step skipped: gradients not finite" if line["skipped"] else ""
    )
