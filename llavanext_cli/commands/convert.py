"""`llavanext convert`: weights in and out."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llavanext_cli import console, options
from llavanext_cli.errors import CheckpointError
from llavanext_cli.signals import raise_on_termination
from llavanext_cli.units import format_size

PARTS_PANEL = "From parts"
FILES_PANEL = "What is written"


class To(str, Enum):
    mindspore = "mindspore"
    hf = "hf"


class Format(str, Enum):
    safetensors = "safetensors"
    ckpt = "ckpt"


class Dtype(str, Enum):
    keep = "keep"
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


Folder = Annotated[Path | None, typer.Argument(metavar="SRC", help="Folder of weights to read.", show_default=False)]


def convert(
    source: Folder = None,
    destination: Annotated[
        Path | None, typer.Argument(metavar="DST", help="Folder to make.", show_default=False)
    ] = None,
    to: Annotated[
        To, typer.Option(help="mindspore: a folder for train and ask. hf: one for transformers.")
    ] = To.mindspore,
    from_vision: Annotated[
        bool, typer.Option("--from-vision", help="SRC is CLIP alone.", rich_help_panel=PARTS_PANEL)
    ] = False,
    from_language: Annotated[
        bool, typer.Option("--from-language", help="SRC is Vicuna or Llama alone.", rich_help_panel=PARTS_PANEL)
    ] = False,
    vision: Annotated[
        Path | None,
        typer.Option(
            help="CLIP, for a base model together with --language; no SRC then.",
            rich_help_panel=PARTS_PANEL,
            show_default=False,
        ),
    ] = None,
    language: Annotated[
        Path | None,
        typer.Option(help="Vicuna or Llama, for a base model.", rich_help_panel=PARTS_PANEL, show_default=False),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of the weights that such a base model begins with.",
            rich_help_panel=PARTS_PANEL,
            show_default="0",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            help="SRC holds the slices of several ranks; this is the checkpoint that their run began with.",
            rich_help_panel=PARTS_PANEL,
            show_default=False,
        ),
    ] = None,
    weight_format: Annotated[
        Format, typer.Option("--format", help="ckpt is for MindSpore's own loaders.", rich_help_panel=FILES_PANEL)
    ] = Format.safetensors,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights.", rich_help_panel=FILES_PANEL)] = Dtype.keep,
    shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Greatest size of one file of weights.", rich_help_panel=FILES_PANEL)
    ] = "5GB",
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
    from llavanext_cli.weights.folder import parse_size

    together = vision is not None or language is not None
    if from_vision and from_language:
        raise typer.BadParameter("--from-vision and --from-language exclude each other")
    if seed is not None and not together:
        raise typer.BadParameter("--seed is for a base model of --vision and --language, which has new weights")
    _check_usage(source, destination, together, vision, language, from_vision or from_language, like, to, weight_format)

    try:
        shard_bytes = parse_size(shard_size)
    except CheckpointError as fault:
        raise typer.BadParameter(f"{fault.what}: {fault.hint}", param_hint="'--shard-size'") from fault

    from llavanext_cli.weights.convert import run_convert

    destination = source if together else destination
    with raise_on_termination(), console.progress("Converting", "bytes") as progress:
        report = run_convert(
            None if together else source,
            destination,
            to=to.value,
            part="vision" if from_vision else "language" if from_language else None,
            vision=vision,
            language=language,
            like=like,
            seed=seed or 0,
            weight_format=weight_format.value,
            dtype=dtype.value,
            shard_bytes=shard_bytes,
            force=force,
            dry_run=dry_run,
            verify=verify,
            progress=progress,
        )
    if json:
        console.out_json(report)
        return
    for line in report.plan:
        console.out(line)
    for line in report.dropped:
        console.say(f"Left out: {line}")
    for line in report.facts:
        console.say(line[0].upper() + line[1:])
    for line in report.notes:
        console.warn(line)
    done = "would be written" if dry_run else "written and verified" if report.verified else "written"
    console.say(
        f"{report.tensors} tensors, {format_size(report.nbytes)}, {done} to {destination} in {report.seconds:.1f} s"
    )
    if to is To.mindspore and weight_format is Format.safetensors and not (dry_run or from_vision or from_language):
        checkpoint = shlex.quote(str(destination))
        console.next_step(
            f"llavanext train video-7b-stage2 --checkpoint {checkpoint} --data DATA.jsonl --out RUN"
            if together  # its projector is random
            else f"llavanext ask 'What is this?' --image PICTURE --checkpoint {checkpoint}"
        )


def _check_usage(
    source: Path | None,
    destination: Path | None,
    together: bool,
    vision: Path | None,
    language: Path | None,
    part: bool,
    like: Path | None,
    to: To,
    weight_format: Format,
) -> None:
    """Options that exclude or need each other; a wrong combination is a usage error."""
    if together and (vision is None or language is None):
        raise typer.BadParameter("--vision and --language belong together")
    if together and (destination is not None or part or like is not None):
        raise typer.BadParameter("with --vision and --language there is no SRC: name the folder to make, and no more")
    if together and source is None:
        raise typer.BadParameter("the folder to make is missing: llavanext convert --vision DIR --language DIR DST")
    if not together and (source is None or destination is None):
        what = "the folder to make" if source is not None else "the folder to read"
        raise typer.BadParameter(f"{what} is missing: llavanext convert SRC DST")
    if part and like is not None:
        raise typer.BadParameter("--like is for the slices of a whole model")
    if to is To.hf and (together or part or weight_format is Format.ckpt):
        raise typer.BadParameter("--to hf takes one of our folders, and writes safetensors")
