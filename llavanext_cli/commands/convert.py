"""`llavanext convert`: weights in and out."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from llavanext_cli import console, options
from llavanext_cli.signals import raise_on_termination
from llavanext_cli.units import format_size, parse_size

if TYPE_CHECKING:
    from llavanext_cli.weights.convert import ConvertReport
    from llavanext_cli.weights.request import ConvertRequest


def convert(
    source: Annotated[
        Path | None, typer.Argument(metavar="SRC", help="Folder of weights to read.", show_default=False)
    ] = None,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="Folder to write.", show_default=False)
    ] = None,
    to: Annotated[
        Literal["mindspore", "hf"],
        typer.Option(help="mindspore: a folder for train and ask. hf: one for transformers."),
    ] = "mindspore",
    from_vision: Annotated[bool, typer.Option("--from-vision", help="SRC holds a CLIP vision tower alone.")] = False,
    from_language: Annotated[
        bool, typer.Option("--from-language", help="SRC holds a Vicuna or Llama model alone.")
    ] = False,
    vision: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a CLIP model, to build a base model together with --language, without SRC.",
            show_default=False,
        ),
    ] = None,
    language: Annotated[
        Path | None,
        typer.Option(
            help="Folder of a Vicuna or Llama model, to build a base model together with --vision.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Seed of the random weights of such a base model.", show_default="0")
    ] = None,
    base_checkpoint: Annotated[
        Path | None,
        typer.Option(
            "--like",
            help="The checkpoint that a run began with, when SRC holds the slices of its ranks.",
            show_default=False,
        ),
    ] = None,
    weight_format: Annotated[
        Literal["safetensors", "ckpt"], typer.Option("--format", help="ckpt is for MindSpore's own loaders.")
    ] = "safetensors",
    dtype: Annotated[
        Literal["keep", "float32", "float16", "bfloat16"], typer.Option(help="Type of the weights.")
    ] = "keep",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="Maximum size of one file of weights.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and compare digests.")] = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    r"""Convert a Hugging Face folder into a checkpoint folder, or back.

    Bytes are copied, not loaded: memory stays small for any model. Every tensor is accounted for, or nothing
    is written.

    Example:
      llavanext convert LLaVA-NeXT-Video-7B-hf checkpoints/base
      llavanext convert runs/stage3/model LLaVA-NeXT-mine-hf --to hf
      llavanext convert --vision clip-vit-large-patch14-336 \
        --language vicuna-7b-v1.5 checkpoints/scratch

    Next: llavanext train video-7b-stage2 --checkpoint checkpoints/base --data DATA.jsonl --out runs/stage2
    """
    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.request import ConvertRequest

    together = vision is not None or language is not None
    if together and destination is not None:
        raise typer.BadParameter("--vision and --language take the place of SRC: name only the folder to write")
    if together:
        source, destination = None, source
    if from_vision and from_language:
        raise typer.BadParameter("use either --from-vision or --from-language, not both")
    if seed is not None and not together:
        raise typer.BadParameter("--seed needs --vision and --language: only a new base model has random weights")
    if destination is None:
        usage = "--vision DIR --language DIR DST" if together else "SRC DST"
        raise typer.BadParameter(f"an argument is missing: llavanext convert {usage}")
    try:
        shard_bytes = parse_size(shard_size)
    except ValueError as fault:
        raise typer.BadParameter(str(fault), param_hint="'--shard-size'") from fault
    request = ConvertRequest(
        source,
        destination,
        to=to,
        part="vision" if from_vision else "language" if from_language else None,
        vision=vision,
        language=language,
        base_checkpoint=base_checkpoint,
        seed=seed or 0,
        weight_format=weight_format,
        dtype=dtype,
        shard_bytes=shard_bytes,
        force=force,
        dry_run=dry_run,
        verify=verify,
    )
    _check_usage(request, together)
    with raise_on_termination(), console.progress("Converting", "bytes") as progress:
        report = run_convert(request, progress)
    if json:
        console.out_json(report)
    else:
        _print_report(request, report)


def _check_usage(request: ConvertRequest, together: bool) -> None:
    """Refuse options that cannot be combined, or that need each other."""
    if together and (request.vision is None or request.language is None):
        raise typer.BadParameter("--vision and --language must be given together")
    if together and (request.part or request.base_checkpoint):
        raise typer.BadParameter(
            "--vision and --language cannot be combined with --from-vision, --from-language or --like"
        )
    if request.part and request.base_checkpoint:
        raise typer.BadParameter("--like cannot be combined with --from-vision or --from-language")
    if request.to == "hf" and (together or request.part or request.weight_format == "ckpt"):
        raise typer.BadParameter(
            "--to hf converts one whole checkpoint folder to safetensors: omit --vision, "
            "--language, --from-vision, --from-language and --format ckpt"
        )


def _print_report(request: ConvertRequest, report: ConvertReport) -> None:
    for line in report.plan:
        console.out(line)
    for line in report.dropped:
        console.say(f"Left out: {line}")
    for line in report.facts:
        console.say(line[0].upper() + line[1:])
    for line in report.notes:
        console.warn(line)
    done = "would be written" if report.dry_run else "written and verified" if report.verified else "written"
    size = format_size(report.nbytes)
    console.say(f"{report.tensors} tensors, {size}, {done} to {report.destination} in {report.seconds:.1f} s")
    if request.dry_run or request.to == "hf" or request.weight_format == "ckpt" or request.part:
        return
    checkpoint = shlex.quote(str(request.destination))
    console.next_step(
        f"llavanext train video-7b-stage2 --checkpoint {checkpoint} --data DATA.jsonl --out RUN"
        if request.vision  # its projector is random
        else f"llavanext ask 'What is this?' --image IMAGE --checkpoint {checkpoint}"
    )
