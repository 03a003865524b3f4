"""`llavanext train`: fine-tune a checkpoint on one or several devices."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from llavanext_cli import console, options


def train(
    preset: Annotated[str, typer.Argument(help="Name or file of a train preset: see `llavanext presets list`.")],
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
    from llavanext_cli.training.launch import run_training

    with console.progress("checking samples") as on_check, console.progress("training") as on_train:

        def on_step(line: dict[str, Any]) -> None:
            on_train(line["step"], line["steps"], describe(line))

        report = run_training(
            preset,
            data,
            checkpoint,
            out,
            devices=devices,
            overrides=tuple(set_ or ()),
            dry_run=dry_run,
            force=force,
            on_check=on_check,
            on_step=on_step,
        )
    if json:
        console.out_json(report)
    elif report.dry_run:
        console.out(" ".join(report.command))
        console.say(f"{report.steps} steps over {report.samples} samples; nothing was written")
    else:
        console.out(str(report.model))
        console.say(f"trained {report.steps} steps in {report.seconds:.0f} s, loss {report.loss:.4f}")
        console.say(f'Next: llavanext ask "What is it?" --image PICTURE --checkpoint {report.model}')


def describe(line: dict[str, Any]) -> str:
    """One line of metrics in words."""
    return f"loss {line['loss']:.4f}  lr {line['learning_rate']:.2e}  {line['samples_per_second']:.1f} samples/s" + (
        "  step skipped: gradients not finite" if line["skipped"] else ""
    )
