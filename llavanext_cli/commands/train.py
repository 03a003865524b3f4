"""`llavanext train`: fine-tune a checkpoint on one or several devices."""

from __future__ import annotations

import math
import shlex
from dataclasses import asdict
from enum import Enum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavanext_cli import console, options
from llavanext_cli.signals import raise_on_termination
from llavanext_cli.units import format_memory, format_size

if TYPE_CHECKING:
    from llavanext_cli.training.ready_run import ReadyRun


class OnBad(str, Enum):
    """What to do with a sample that cannot be read."""

    fail = "fail"
    skip = "skip"


def train(
    preset: Annotated[
        str,
        typer.Argument(
            help="Name or file of a train preset: see `llavanext presets list`.",
            autocompletion=options.complete_train_preset,
        ),
    ],
    data: options.Data,
    checkpoint: options.Checkpoint,
    out: options.Out,
    devices: options.Devices = None,
    set_: options.Set = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint in OUT.")] = False,
    on_bad: Annotated[
        OnBad, typer.Option("--on-bad", help="Whether a sample that cannot be read ends the run or is skipped.")
    ] = OnBad.fail,
    nodes: Annotated[
        int, typer.Option("--nodes", min=1, help="Number of machines; start the same command on each.")
    ] = 1,
    node_rank: Annotated[int, typer.Option("--node-rank", min=0, help="Number of this node, counted from 0.")] = 0,
    master: Annotated[
        str | None,
        typer.Option("--master", metavar="ADDR:PORT", help="Address and port of node 0.", show_default=False),
    ] = None,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, max=1e6, help="Minutes to wait for all nodes.")] = 10,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print the complete MindFormers YAML, with the command as a comment; start nothing."
        ),
    ] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Print what the run needs: memory per device, steps, tokens, disk space.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compile the training step for its devices, in simulation; nothing runs.")
    ] = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Fine-tune a checkpoint: one worker for each device, progress here, the trained model in OUT/model.

    Example:

      llavanext train tiny-stage2 --data mix.jsonl --checkpoint base --out run

    Next: llavanext ask "What is it?" --image a.jpg --checkpoint run/model
    """
    from llavanext_cli.config.model_folder import check_chat_template
    from llavanext_cli.launching.msrun import Nodes, parse_master
    from llavanext_cli.machine.doctor import require_versions
    from llavanext_cli.training.job import TrainRequest
    from llavanext_cli.training.launch import run_training
    from llavanext_cli.training.preview import check_resources
    from llavanext_cli.training.ready_run import check_training
    from llavanext_cli.training.run_folder import check_out

    if dry_run and (plan or check):
        raise typer.BadParameter("cannot be combined with --plan or --check", param_hint="--dry-run")
    if plan and check and json:
        raise typer.BadParameter("use either --plan or --check, as each prints one JSON object", param_hint="--json")
    if not math.isfinite(timeout):
        raise typer.BadParameter(f"{timeout} is not a number of minutes", param_hint="--timeout")
    request = TrainRequest(
        preset,
        data,
        checkpoint,
        out,
        devices,
        overrides=tuple(set_ or ()),
        nodes=Nodes(nodes, node_rank, parse_master(master) if master else None, round(timeout * 60)),
        on_bad=on_bad.value,
        resume=resume,
        force=force,
    )
    if not (resume or plan or check or dry_run or node_rank):
        check_out(request)  # before the samples are counted
    with console.progress("Checking samples", "samples") as on_check:
        run = check_training(request, on_check, console.say)
    if other_form := check_chat_template(checkpoint):
        console.warn(other_form)
    if run.unreadable:
        console.warn(f"{run.unreadable} of {run.plan.samples} samples cannot be read and will be skipped")
    if plan:
        _show_plan(run, json)
    if check:
        _check(run, json)
    if dry_run:
        _show_run(run, json)
    if plan or check or dry_run:
        return
    if not force:
        check_resources(run)
        require_versions(run.preset.runtime.target, advice="; llavanext doctor says more, --force starts anyway")
    with console.progress("Training", "steps") as on_train:
        report = run_training(
            run, on_step=lambda line: on_train(line["step"], line["steps"], describe(line)), say=console.say
        )
    if json:
        console.out_json(report)
        return
    console.out(str(report.model))
    loss = f", loss {report.loss:.4f}" if report.loss is not None else ""
    console.say(f"Trained {report.steps} steps in {report.seconds:.0f} s{loss}. Curves: {report.curves}")
    console.next_step(f'llavanext ask "What is it?" --image IMAGE --checkpoint {shlex.quote(str(report.model))}')


def _show_run(run: ReadyRun, json: bool) -> None:
    """What would be started: a YAML file that MindFormers' own entry reads, with the command as a comment."""
    import yaml

    if json:
        console.out_json({"command": run.command, **asdict(run.plan), "config": run.expanded})
        return
    console.out("# " + shlex.join(run.command).replace("\n", "\n# "))
    console.write(yaml.safe_dump(run.expanded, sort_keys=False, allow_unicode=True))
    console.say(f"{run.plan.steps} steps over {run.plan.samples} samples; nothing was written.")


def _show_plan(run: ReadyRun, json: bool) -> None:
    from llavanext_cli.training.preview import preview_run

    preview = preview_run(run)
    if json:
        console.out_json({"plan": preview, "fits": preview.memory.fits})
        return
    memory = preview.memory
    kinds = {"gathered": "estimate", "activations": "estimate"}
    rows = [(name, format_memory(size), kinds.get(name, "exact")) for name, size in memory.parts.items()]
    pool = format_memory(memory.pool) if memory.pool else "none set"
    rows += [("total", format_memory(memory.total), ""), ("pool", pool, "runtime.memory")]
    console.table(("memory per device", "size", ""), rows)
    steps = preview.steps_per_epoch or "less than one"
    console.fields(
        {
            "samples": preview.samples,
            "steps": f"{preview.steps} ({preview.epochs:.2f} epochs of {steps} steps)",
            "tokens a step": preview.tokens_per_step,
            "tokens an epoch": preview.tokens_per_epoch,
            "trained model": f"{format_size(preview.model_bytes)} on the disk",
            "a checkpoint": f"{format_size(preview.checkpoint_bytes)}, with the optimizer's moments",
            "disk at most": f"{format_size(preview.disk_bytes)} (train.save_every, train.keep)",
        }
    )
    if preview.advice:
        console.warn(f"the run does not fit: {preview.advice}")


def _check(run: ReadyRun, json: bool) -> None:
    from llavanext_cli.simulation.simulate import CompileRequest, simulate

    job = run.job
    with raise_on_termination(), console.progress("Compiling"):
        report = simulate(CompileRequest(job.preset, job.overrides, job.devices, job.checkpoint))
    if json:
        console.out_json(report.summary())
    report.raise_fault()
    if not json:
        console.out(f"{report.preset.name}: {report.describe()}")


def describe(line: dict[str, Any]) -> str:
    """One line of metrics in words."""
    loss = "NaN" if line["loss"] is None else f"{line['loss']:.4f}"
    return f"loss {loss}  lr {line['learning_rate']:.2e}  {line['samples_per_second']:.1f} samples/s" + (
        "  step skipped: gradients not finite" if line["skipped"] else ""
    )
