"""`llavanext train`: fine-tune a checkpoint on one or several devices."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import Enum
from typing import Annotated, Any

import typer

from llavanext_cli import console, options


class OnBad(str, Enum):
    """What becomes of a sample that cannot be read."""

    fail = "fail"
    skip = "skip"


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint in OUT.")] = False,
    on_bad: Annotated[
        OnBad, typer.Option("--on-bad", help="A sample that cannot be read ends the run, or is skipped.")
    ] = OnBad.fail,
    nodes: Annotated[int, typer.Option("--nodes", min=1, help="Machines of the run; start it on each.")] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", min=0, help="Which of the nodes this is.")] = 0,
    master: Annotated[
        str | None, typer.Option("--master", metavar="ADDR:PORT", help="Where node 0 listens.", show_default=False)
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Minutes to wait for all nodes.")] = 10,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a checkpoint: one worker for each device, progress here, the trained model in OUT/model.

    Example:

      llavanext train tiny-stage2 --data mix.jsonl --checkpoint base --out run

    Next: llavanext ask "What is it?" --image a.jpg --checkpoint run/model
    """
    from llavanext_cli.training.launch import Nodes, check_training, parse_master, run_training

    place = Nodes(nodes, node_rank, parse_master(master) if master else None, round(timeout * 60))

    with console.progress("Checking samples", "samples") as on_check:
        run = check_training(
            preset,
            data,
            checkpoint,
            out,
            devices=devices,
            overrides=tuple(set_ or ()),
            nodes=place,
            on_bad=on_bad.value,
            progress=on_check,
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
            run,
            force=force,
            resume=resume,
            say=console.say,
            on_step=lambda line: on_train(line["step"], line["steps"], describe(line)),
        )
    if json:
        console.out_json(report)
        return
    console.out(str(report.model))
    loss = f", loss {report.loss:.4f}" if report.loss is not None else ""
    console.say(f"Trained {report.steps} steps in {report.seconds:.0f} s{loss}.")
    console.say(f'Next: llavanext ask "What is it?" --image PICTURE --checkpoint {report.model}')


def describe(line: dict[str, Any]) -> str:
    """One line of metrics in words."""
    loss = "no number" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}  lr {line['learning_rate']:.2e}  {line['samples_per_second']:.1f} samples/s" + (
        "  step skipped: gradients not finite" if line["skipped"] else ""
    )
