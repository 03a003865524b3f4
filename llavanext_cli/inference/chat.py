"""A conversation: turns and media that grow, and lines that begin with a slash.

What is asked is always the whole conversation; the session finds out how much of it its cache holds, so only the new
turn is computed. Taking a turn back or beginning anew needs nothing special.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.ask import check_media, placed
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.processing.processor import Media, Processor
from llavanext_cli.processing.prompt import check_placeholders
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, EncodedSample, Medium, Sample, Turn

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.inference.session import Answer, Session

HELP = """\
/image FILE            a picture for the next question
/video FILE            a clip for the next question
/undo                  take the last question and its answer back
/clear                 begin a new conversation
/save FILE             write the conversation as JSON
/set NAME VALUE        temperature, top_k, top_p, repetition_penalty, seed or
                       max_new_tokens
/help                  this list
/quit                  leave; so does Ctrl-D"""
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens")


@dataclass(frozen=True)
class Loaded:
    """One picture or clip with what was read from it."""

    medium: Medium
    media: Media


class Chat:
    """One conversation with one session.

    Attributes:
        turns: what was said; the questions hold their placeholders.
        loaded: the media of the turns, in order.
        before: how many of them there were before each question.
        staged: media for the next question.
        sampling: how the next answer is drawn.
    """

    def __init__(self, session: Session, processor: Processor, preset: Preset, sampling: Sampling):
        self.session, self.processor, self.preset, self.sampling = session, processor, preset, sampling
        self.turns: tuple[Turn, ...] = ()
        self.loaded: tuple[Loaded, ...] = ()
        self.before: tuple[int, ...] = ()
        self.staged: tuple[Loaded, ...] = ()

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask with what was said before. A question that cannot be asked changes nothing.

        Raises:
            DataError: placeholders and media do not match, or the conversation has outgrown the cache.
        """
        kinds = [one.medium.kind for one in self.staged]
        loaded = (*self.loaded, *[self.staged[at] for at in placed(question, kinds)])
        names = [IMAGE_PLACEHOLDER if kind == "image" else VIDEO_PLACEHOLDER for kind in kinds]
        ways = [(*self.turns, Turn("user", text)) for text in (question, "\n".join([*names, question]))]
        media = tuple(one.medium for one in loaded)
        # as it was typed if its placeholders fit, or if nothing does: then encoding says why
        turns = next((way for way in ways if check_placeholders(Sample("", "", media, way)) is None), ways[0])
        encoded = self.encode(turns, loaded)
        try:
            self.session.check_room(encoded)
        except DataError as fault:
            hint = "/clear begins a new conversation, /undo takes a medium or a turn back; --frames makes clips shorter"
            raise DataError(fault.what, hint) from fault
        answer = self.session.answer([encoded], self.sampling, (lambda row, text: on_text(text)) if on_text else None)
        self.before += (len(self.loaded),)
        self.turns, self.loaded, self.staged = (*turns, Turn("assistant", answer[0].text)), loaded, ()
        return answer[0]

    def encode(self, turns: tuple[Turn, ...], loaded: tuple[Loaded, ...]) -> EncodedSample:
        sample = Sample("", "", tuple(one.medium for one in loaded), turns)
        return self.processor.encode_question(sample, {}, join_media([one.media for one in loaded], self.processor))

    def run_command(self, line: str) -> str:
        """Do what a line with a slash says.

        Returns:
            A line or more for the user.

        Raises:
            LlavaNextError: no such command, or it cannot be done.
        """
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise DataError(f"{line}: {error}", "put a path with spaces into quotes") from error
        commands = {
            "/image": (self.add_image, 1),
            "/video": (self.add_video, 1),
            "/undo": (self.undo, 0),
            "/clear": (self.clear, 0),
            "/save": (self.save, 1),
            "/set": (self.set, 2),
            "/help": (lambda: HELP, 0),
        }
        if name not in commands:
            raise DataError(f"{name}: no such command", "/help lists them")
        function, count = commands[name]
        if len(words) != count:
            raise DataError(f"{name} takes {count or 'no'} word{'' if count == 1 else 's'}", "/help shows how")
        return function(*words)

    def add_image(self, path: str) -> str:
        return self.add("image", path)

    def add_video(self, path: str) -> str:
        return self.add("video", path)

    def add(self, kind: str, path: str) -> str:
        """Read a picture or clip for the next question."""
        medium = Medium(kind, str(Path(path).expanduser().absolute()))
        sample = Sample("", "", (medium,), ())
        check_media(sample, self.preset)
        media = self.processor.load_media(sample)
        self.staged = (*self.staged, Loaded(medium, media))
        what = f"{len(media.tiles)} tiles" if kind == "image" else f"{len(media.frames)} frames"
        return f"{path}: {what}, goes with the next question"

    def undo(self) -> str:
        """Take the last question back, with its answer and media; staged media first."""
        if self.staged:
            self.staged = self.staged[:-1]
            return "the last medium is taken back"
        if not self.turns:
            raise DataError("nothing was asked yet", "type a question; /help lists the commands")
        self.turns, self.loaded, self.before = self.turns[:-2], self.loaded[: self.before[-1]], self.before[:-1]
        return f"taken back; questions left: {len(self.turns) // 2}"

    def clear(self) -> str:
        self.turns, self.loaded, self.before, self.staged = (), (), (), ()
        return "a new conversation"

    def save(self, path: str) -> str:
        """Write the conversation as one JSON sample, which `ask --batch` and `train` read; never over a file."""
        sample = Sample("chat", "", tuple(one.medium for one in self.loaded), self.turns)
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:
                file.write(msgspec.json.encode(sample).decode() + "\n")
        except FileExistsError as error:
            raise DataError(f"{path}: is there already", "name another file") from error
        except OSError as error:
            raise DataError(f"{path}: {error.strerror or error}", "name another file") from error
        return f"saved: {path}"

    def set(self, name: str, value: str) -> str:
        """Change one field of the sampling."""
        if name not in SETTINGS:
            raise DataError(f"{name}: no such setting", f"settings: {', '.join(SETTINGS)}")
        kind = {field.name: field.type for field in fields(Sampling)}[name]
        try:
            number: Any = int(value) if kind == "int" else float(value)
            self.sampling = replace(self.sampling, **{name: number})
        except (ValueError, LlavaNextError) as error:
            raise DataError(f"{name} cannot be {value}", getattr(error, "what", "a number is wanted")) from error
        return f"{name} is {number}"


def join_media(media: list[Media], processor: Processor) -> Media:
    """The media of several files as those of one sample."""
    side = processor.arch.vision.image_size
    nothing = np.zeros((0, 3, side, side), np.uint8)
    return Media(
        tuple(plan for one in media for plan in one.plans),
        np.concatenate([nothing, *[one.tiles for one in media]]),
        np.concatenate([nothing, *[one.frames for one in media]]),
    )
