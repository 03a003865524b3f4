"""`llavanext convert`: weights in and out."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from llavanext_cli import console, options


class To(str, Enum):
    mindspore = "mindspore"
    hf = "hf"


def convert(
    source: Annotated[Path, typer.Argument(help="Folder of weights to read.", show_default=False)],
    destination: Annotated[Path, typer.Argument(help="Folder to make.", show_default=False)],
    to: Annotated[
        To, typer.Option(help="mindspore: a folder for train and ask. hf: one for transformers.", case_sensitive=False)
    ] = To.mindspore,
    shard_size: Annotated[str, typer.Option(help="Greatest size of one file of weights.")] = "5GB",
    verify: Annotated[bool, typer.Option("--verify", help="Read the result back and compare digests.")] = False,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Convert a Hugging Face folder into a checkpoint folder, or back.

    Bytes are copied, not loaded: memory stays small for any model. Every tensor is accounted for, or nothing
    is written.

    Example:
      llavanext convert LLaVA-NeXT-Video-7B-hf checkpoints/base

    Next: llavanext train video-7b-stage2 --checkpoint checkpoints/base --data DATA.jsonl --out runs/stage2
    """
    from llavanext_cli.weights.convert import run_convert
    from llavanext_cli.weights.folder import format_size, parse_size

    with console.progress("Converting", "bytes") as progress:
        report = run_convert(
            source,
            destination,
            to=to.value,
            shard_bytes=parse_size(shard_size),
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
        console.say(f"dropped {line}")
    for line in report.notes:
        console.warn(line)
    done = "would be written" if dry_run else "written and verified" if report.verified else "written"
    console.say(
        f"{report.tensors} tensors, {format_size(report.nbytes)}, {done} to {destination} in {report.seconds:.1f} s"
    )
    if to is To.mindspore and not dry_run:
        console.next_step(f"llavanext ask --checkpoint {destination} --image PICTURE 'What is this?'")
