"""`llavanext ask`: questions about images and videos: one, a conversation, or a whole file or folder of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llavanext_cli import console, options, signals
from llavanext_cli.errors import LlavaNextError, RuntimeMissingError

if TYPE_CHECKING:
    from llavanext_cli.inference.request import AskRequest
    from llavanext_cli.inference.session import Answer

BATCH_SIZE = 8
UNUSED = {
    "one question": ("--out", "--batch-size"),
    "--batch": ("--image", "--video", "--time-instruction", "--allow-url", "--show"),
    "--chat": (
        *("QUESTION", "--batch", "--out", "--batch-size", "--time-instruction", "--allow-url"),
        *("--show", "--force", "--json"),
    ),
}
"""Options that have no effect in a mode, and are refused."""


def ask(
    checkpoint: options.Checkpoint,
    question: Annotated[str | None, typer.Argument(help="What to ask; - reads it from stdin.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="FILE", help="An image; - reads it from stdin. May be repeated."),
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", "-V", metavar="FILE", help="A video. May be repeated.")
    ] = None,
    preset: options.AskPreset = None,
    devices: options.Devices = None,
    set_: options.Set = None,
    chat: Annotated[bool, typer.Option("--chat", help="Have a conversation; /help lists its commands.")] = False,
    batch: Annotated[
        Path | None,
        typer.Option(
            "--batch", help="A file of questions, or a folder of images and videos to ask one QUESTION about."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="File for the answers of --batch.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Questions that are answered together.", show_default=str(BATCH_SIZE)),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=1, max=10_000, help="Frames taken from each video.", show_default="the preset's"),
    ] = None,
    time_instruction: Annotated[
        bool,
        typer.Option("--time-instruction", help="Tell the model how long each video is, and the time of each frame."),
    ] = False,
    allow_url: Annotated[
        bool, typer.Option("--allow-url", help="Allow http(s) addresses of images and videos, and download them.")
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer, in tokens.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option("--temperature", min=0, help="0: always the likeliest token.")
    ] = None,
    top_p: Annotated[
        float | None,
        typer.Option(
            "--top-p", min=0, max=1, help="Draw from the likeliest tokens whose probabilities add up to this."
        ),
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="Draw from this many of the likeliest tokens; 0: all.")
    ] = None,
    repetition_penalty: Annotated[
        float | None,
        typer.Option("--repetition-penalty", min=0.1, help="Above 1: tokens used before become less likely."),
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Text that ends the answer. May be repeated.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option("--show", metavar="FILE.png", help="Save an image of what the model sees.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Ask about images and videos; the answer is printed while it is generated.

    Example:

      llavanext ask "What is it?" --image a.jpg --checkpoint run/model

    <image> and <video> in the question say where the images and videos belong; otherwise these come first.

    A conversation; then many questions, with one line for each answer:

      llavanext ask --chat --checkpoint run/model

      llavanext ask --batch questions.jsonl -o answers.jsonl -c run/model

      llavanext ask "What is it?" --batch images -o answers.jsonl -c run/model

    Several devices that share each layer:

      llavanext ask "What is it?" --image a.jpg -c run/model --devices 2

    Next: llavanext convert run/model hub --to hf
    """
    from llavanext_cli.config.model_folder import check_chat_template
    from llavanext_cli.inference.request import AskRequest

    given = {
        "QUESTION": question,
        "--image": image,
        "--video": video,
        "--batch": batch,
        "--out": out,
        "--batch-size": batch_size,
        "--time-instruction": time_instruction,
        "--allow-url": allow_url,
        "--show": show,
        "--force": force,
        "--json": json,
    }
    mode = "--chat" if chat else "--batch" if batch is not None else "one question"
    unused = [name for name in UNUSED[mode] if given[name]]
    if mode == "one question" and force and not show:
        unused.append("--force without --show")
    if unused:
        raise typer.BadParameter(f"{mode} cannot be combined with {', '.join(unused)}")
    if batch is not None and out is None:
        raise typer.BadParameter("--batch needs a file for its answers: --out FILE")
    if question == "-":
        if "-" in (image or []):
            raise LlavaNextError("stdin cannot be both question and image", hint="name a file for one of them")
        question = sys.stdin.read().strip()
    if question is not None and not question.strip():
        raise LlavaNextError("the question is empty", hint='try: llavanext ask "What is it?" --image a.jpg -c DIR')
    if mode == "one question" and question is None:
        raise LlavaNextError("the question is missing", hint='try: llavanext ask "What is it?" --image a.jpg -c DIR')
    if warning := check_chat_template(checkpoint):
        console.warn(warning)
    sampling: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    request = AskRequest(
        checkpoint,
        question,
        images=tuple(image or ()),
        videos=tuple(video or ()),
        preset=preset,
        overrides=tuple(set_ or ()),
        devices=devices,
        frames=frames,
        sampling={key: value for key, value in sampling.items() if value is not None},
        time_instruction=time_instruction,
        allow_url=allow_url,
        show=show,
        batch=batch,
        out=out,
        batch_size=batch_size or BATCH_SIZE,
        force=force,
        verbose=console.is_verbose(),
    )
    with signals.route_sigint(), signals.raise_on_termination():
        if chat:
            _chat(request)
        elif batch is not None:
            _batch(request, json)
        else:
            _one(request, json)


def _one(request: AskRequest, json: bool) -> None:
    from llavanext_cli.inference.ask import run_ask

    answer = run_ask(request, on_text=None if json else console.write)
    if json:
        console.out_json(answer)
    else:
        console.out()
        console.say(describe(answer))
    if request.show:
        console.say(f"What the model saw: {request.show}")


def describe(answer: Answer) -> str:
    """One line about what an answer took."""
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    cached = f" ({answer.cached_tokens} cached)" if answer.cached_tokens else ""
    return (
        f"{answer.prompt_tokens} tokens in{cached}, {answer.tiles} tiles, {answer.frames} frames; "
        f"{len(answer.tokens)} out; first after {answer.seconds_to_first:.1f} s{speed}"
    )


def _batch(request: AskRequest, json: bool) -> None:
    from llavanext_cli.inference.batch import run_batch

    with console.progress("Asking", "questions") as progress:
        report = run_batch(request, progress)
    if json:
        console.out_json(report)
    if report.failed and not report.answered + report.kept:
        raise LlavaNextError("all questions failed", f"see {report.out}: each line says why")
    if not json:
        before = f", {report.kept} answered before" if report.kept else ""
        other = f", {report.skipped} files skipped (neither image nor video)" if report.skipped else ""
        console.say(f"{report.answered} answered, {report.failed} failed{before}{other}: {report.out}")


def _chat(request: AskRequest) -> None:
    from llavanext_cli.inference.chat import open_chat

    with open_chat(request) as talk:
        for add, names in ((talk.add_image, request.images), (talk.add_video, request.videos)):
            for name in names:
                console.say(add(name))
        on_terminal = sys.stdin.isatty()
        if on_terminal:
            import readline  # noqa: F401 - gives `input` the terminal's own editing and history

            console.say("Ask, or type /help. Ctrl-D leaves.")
        while (line := _read_line(on_terminal)) is not None:
            if line in ("/quit", "/exit"):
                break
            if not line:
                continue
            try:
                if line.startswith("/"):
                    console.say(talk.run_command(line))
                    continue
                answer = talk.ask(line, console.write)
                console.out()
                if on_terminal:
                    console.say(describe(answer))
            except KeyboardInterrupt:
                console.out()
                console.say("Interrupted: the question is removed.")
            except RuntimeMissingError:
                raise  # the model is gone, and with it the conversation
            except LlavaNextError as fault:
                console.error(fault)


def _read_line(on_terminal: bool) -> str | None:
    """The next line; None at the end. Ctrl-C discards the line typed so far."""
    while True:
        try:
            return (input("> ") if on_terminal else input()).strip()
        except EOFError:
            if on_terminal:
                console.say()
            return None
        except KeyboardInterrupt:
            console.say()
