"""`llavanext ask`: questions about pictures and clips, one or a whole file of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llavanext_cli import console, options
from llavanext_cli.errors import LlavaNextError


def ask(
    checkpoint: options.Checkpoint,
    question: Annotated[str | None, typer.Argument(help="What to ask; - reads it from stdin.")] = None,
    image: Annotated[list[Path] | None, typer.Option("--image", "-i", help="A picture; may be repeated.")] = None,
    video: Annotated[list[Path] | None, typer.Option("--video", "-V", help="A clip; may be repeated.")] = None,
    preset: options.Preset = None,
    set_: options.Set = None,
    batch: Annotated[Path | None, typer.Option("--batch", help="A file of questions, as mix writes samples.")] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where --batch writes its answers.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered at once.")] = 8,
    frames: Annotated[
        int | None, typer.Option("--frames", min=1, help="Frames taken from a clip.", show_default="the preset's")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="0: always the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Share of probability kept.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Likeliest tokens kept; 0: all.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", min=0.1, help="Above 1: used tokens become less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="The same seed gives the same answer.")] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Ask about pictures and clips; the answer is written as it comes.

    Example:

      llavanext ask "What is it?" --image a.jpg --checkpoint run/model

    A file of questions, one answer a line:

      llavanext ask --batch questions.jsonl --out answers.jsonl --checkpoint run/model

    Next: llavanext convert run/model hub --to hf
    """
    changes = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    common = {"preset_name": preset, "overrides": tuple(set_ or ()), "frames": frames, "changes": changes}
    if batch is not None:
        if out is None or question or image or video:
            raise LlavaNextError("--batch takes its questions from a file", hint="give --batch FILE --out FILE")
        from llavanext_cli.inference.batch import run_batch

        with console.progress("asking", "questions") as progress:
            report = run_batch(
                batch,
                out,
                checkpoint,
                batch_size=batch_size,
                force=force,
                progress=progress,
                verbose=console.is_verbose(),
                **common,
            )
        if json:
            console.out_json(report)
        else:
            before = f", {report.kept} were answered before" if report.kept else ""
            console.say(f"{report.answered} answers, {report.failed} failed{before}: {report.out}")
        return
    if question is None:
        raise LlavaNextError("no question", hint='try: llavanext ask "What is it?" --image a.jpg --checkpoint DIR')
    from llavanext_cli.inference.ask import run_ask

    answer = run_ask(
        sys.stdin.read().strip() if question == "-" else question,
        image or [],
        video or [],
        checkpoint,
        on_text=None if json else console.write,
        verbose=console.is_verbose(),
        **common,
    )
    if json:
        console.out_json(answer)
    else:
        console.out()
        speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
        console.say(
            f"{answer.prompt_tokens} tokens in ({answer.tiles} tiles, {answer.frames} frames), "
            f"{len(answer.tokens)} out; "
            f"first after {answer.seconds_to_first:.1f} s{speed}"
        )
