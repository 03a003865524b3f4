"""`llavanext ask`: questions about pictures and clips: one, a conversation, or a whole file or folder of them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from llavanext_cli import console, options, signals
from llavanext_cli.errors import LlavaNextError, RuntimeMissingError

BATCH_SIZE = 8
UNREAD = {
    "one question": ("--out", "--batch-size"),
    "--batch": ("--image", "--video", "--time-instruction", "--allow-url", "--show"),
    "--chat": (
        *("QUESTION", "--batch", "--out", "--batch-size", "--time-instruction", "--allow-url"),
        *("--show", "--force", "--json"),
    ),
}
"""Options that a way of asking has no use for."""


def ask(
    checkpoint: options.Checkpoint,
    question: Annotated[str | None, typer.Argument(help="What to ask; - reads it from stdin.")] = None,
    image: Annotated[
        list[str] | None,
        typer.Option("--image", "-i", metavar="FILE", help="A picture, - is stdin; may be repeated."),
    ] = None,
    video: Annotated[
        list[str] | None, typer.Option("--video", "-V", metavar="FILE", help="A clip; may be repeated.")
    ] = None,
    preset: options.AskPreset = None,
    devices: options.Devices = None,
    set_: options.Set = None,
    chat: Annotated[bool, typer.Option("--chat", help="Hold a conversation; /help lists what it understands.")] = False,
    batch: Annotated[
        Path | None, typer.Option("--batch", help="A file of questions, or a folder of media and one question.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", "-o", help="Where --batch writes its answers.")] = None,
    batch_size: Annotated[
        int | None,
        typer.Option("--batch-size", min=1, help="Questions answered at once.", show_default=str(BATCH_SIZE)),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option("--frames", min=1, max=10_000, help="Frames taken from a clip.", show_default="the preset's"),
    ] = None,
    time_instruction: Annotated[
        bool, typer.Option("--time-instruction", help="Tell the model how long a clip lasts and when its frames are.")
    ] = False,
    allow_url: Annotated[bool, typer.Option("--allow-url", help="Media may be http(s) addresses.")] = False,
    max_new_tokens: Annotated[int | None, typer.Option("--max-new-tokens", min=1, help="Longest answer.")] = None,
    temperature: Annotated[float | None, typer.Option("--temperature", min=0, help="0: always the likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0, max=1, help="Share of probability kept.")] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=0, help="Likeliest tokens kept; 0: all.")] = None,
    repetition_penalty: Annotated[
        float | None, typer.Option("--repetition-penalty", min=0.1, help="Above 1: used tokens become less likely.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="The same seed gives the same answer.")] = None,
    stop: Annotated[
        list[str] | None, typer.Option("--stop", metavar="TEXT", help="Ends the answer; may be repeated.")
    ] = None,
    show: Annotated[
        Path | None, typer.Option("--show", metavar="FILE.png", help="Save a picture of what the model sees.")
    ] = None,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Ask about pictures and clips; the answer is written as it comes.

    Example:

      llavanext ask "What is it?" --image a.jpg --checkpoint run/model

    <image> and <video> in the question say where the media belong; without them they come first.

    A conversation, and many questions, one answer a line:

      llavanext ask --chat --checkpoint run/model

      llavanext ask --batch questions.jsonl -o answers.jsonl -c run/model

      llavanext ask "What is it?" --batch pictures -o answers.jsonl -c run/model

    Devices that share each layer, and one answer:

      llavanext ask "What is it?" --image a.jpg -c run/model --devices 2

    Next: llavanext convert run/model hub --to hf
    """
    from llavanext_cli.config.chat_template import check_chat_template

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
    way = "--chat" if chat else "--batch" if batch is not None else "one question"
    useless = [name for name in UNREAD[way] if given[name]]
    if way == "one question" and force and not show:
        useless.append("--force without --show")
    if useless:
        raise typer.BadParameter(f"{way} does not read {', '.join(useless)}")
    changes: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    if other_form := check_chat_template(checkpoint):
        console.warn(other_form)
    common = {
        "preset_name": preset,
        "overrides": tuple(set_ or ()),
        "devices": devices,
        "frames": frames,
        "changes": changes,
        "verbose": console.is_verbose(),
    }
    if question == "-":
        if "-" in (image or []):
            raise LlavaNextError("stdin cannot be both question and picture", hint="name a file for one of them")
        question = sys.stdin.read().strip()
    if question is not None and not question.strip():
        raise LlavaNextError("the question is empty", hint="say what is wanted of the answer")
    if chat:
        _chat(checkpoint, image or [], video or [], common)
    elif batch is not None:
        if out is None:
            raise typer.BadParameter("--batch needs a file for its answers: --out FILE")
        _batch(batch, out, checkpoint, question, batch_size or BATCH_SIZE, force, json, common)
    elif question is None:
        raise LlavaNextError("no question", hint='try: llavanext ask "What is it?" --image a.jpg --checkpoint DIR')
    else:
        if show is not None:
            _check_show(show, [*(image or []), *(video or [])], force)
        more = {"time_instruction": time_instruction, "allow_url": allow_url, "show": show}
        _one(question, image or [], video or [], checkpoint, json, common | more)


def _check_show(show: Path, media: list[str], force: bool) -> None:
    """Refuse what would show nothing, or overwrite what is asked about."""
    if not media:
        raise LlavaNextError("--show has nothing to show", hint="ask about a picture or a clip: --image, --video")
    if show.is_dir():
        raise LlavaNextError(f"{show} is a folder", hint="name a picture in it: --show sheet.png")
    if show.exists():
        if not show.is_file():  # renaming a file over /dev/null would take it from the whole machine
            raise LlavaNextError(f"{show} is a device or a pipe, not a file", hint="name a file: --show sheet.png")
        if any(Path(name).exists() and show.samefile(name) for name in media):
            raise LlavaNextError(f"{show} is what the question is about", hint="name another file for --show")
        if not force:
            raise LlavaNextError(f"{show} exists", hint="name another file, or give --force to replace it")


@signals.route_sigint()
@signals.raise_on_termination()
def _one(question: str, images: list[str], videos: list[str], checkpoint: Path, json: bool, common: dict) -> None:
    from llavanext_cli.inference.ask import run_ask

    answer = run_ask(question, images, videos, checkpoint, on_text=None if json else console.write, **common)
    if json:
        console.out_json(answer)
    else:
        console.out()
        console.say(describe(answer))
    if common["show"]:
        console.say(f"What the model saw: {common['show']}")


def describe(answer: Any) -> str:
    """One line about what an answer took."""
    speed = f", {answer.tokens_per_second:.1f} tokens/s" if answer.tokens_per_second else ""
    known = f" ({answer.cached_tokens} known)" if answer.cached_tokens else ""
    return (
        f"{answer.prompt_tokens} tokens in{known}, {answer.tiles} tiles, {answer.frames} frames; "
        f"{len(answer.tokens)} out; first after {answer.seconds_to_first:.1f} s{speed}"
    )


@signals.route_sigint()
@signals.raise_on_termination()
def _batch(
    batch: Path,
    out: Path,
    checkpoint: Path,
    question: str | None,
    batch_size: int,
    force: bool,
    json: bool,
    common: dict,
) -> None:
    from llavanext_cli.inference.batch import run_batch

    with console.progress("Asking", "questions") as progress:
        report = run_batch(
            batch, out, checkpoint, question=question, batch_size=batch_size, force=force, progress=progress, **common
        )
    if json:
        console.out_json(report)
    if report.failed and not report.answered + report.kept:
        raise LlavaNextError("none of the inputs could be asked", f"each line of {report.out} says why")
    if json:
        return
    before = f", {report.kept} answered before" if report.kept else ""
    other = f", {report.skipped} left out (no picture, no clip)" if report.skipped else ""
    console.say(f"{report.answered} answered, {report.failed} failed{before}{other}: {report.out}")


@signals.route_sigint()
@signals.raise_on_termination()
def _chat(checkpoint: Path, images: list[str], videos: list[str], common: dict) -> None:
    from llavanext_cli.inference.ask import open_chat

    with open_chat(checkpoint, **common) as talk:
        for add, names in ((talk.add_image, images), (talk.add_video, videos)):
            for name in names:
                console.say(add(name))
        on_terminal = sys.stdin.isatty()
        if on_terminal:
            import readline  # noqa: F401 - gives `input` the terminal's own editing and history

            console.say("Ask, or /help. Ctrl-D leaves.")
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
                console.say("Interrupted: the question is taken back.")
            except RuntimeMissingError:
                raise  # the model is gone, and so is the conversation
            except LlavaNextError as fault:
                console.error(fault)


def _read_line(on_terminal: bool) -> str | None:
    """The next line, None at the end. Ctrl-C drops what was typed so far."""
    while True:
        try:
            return (input("> ") if on_terminal else input()).strip()
        except EOFError:
            if on_terminal:
                console.say()
            return None
        except KeyboardInterrupt:
            console.say()
