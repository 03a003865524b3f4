"""A conversation: questions with their media, and commands that begin with a slash.

Each question is asked with the whole conversation before it. The session finds out how much of that its cache holds,
so only the new turn is computed, also after turns were removed.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.prepare import open_session, prepare
from llavanext_cli.inference.questions import check_media, media_order
from llavanext_cli.inference.request import AskRequest
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.inference.session import check_room
from llavanext_cli.inference.step import CHAT_STEP
from llavanext_cli.processing.processor import Media, Processor
from llavanext_cli.processing.prompt import check_placeholders
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, EncodedSample, Medium, Sample, Turn

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.inference.session import Answer, Session

HELP = """\
/image FILE            add an image to the next question
/video FILE            add a video to the next question
/undo                  remove the last question and its answer
/clear                 start a new conversation
/save FILE             write the conversation as JSON
/set NAME VALUE        temperature, top_k, top_p, repetition_penalty, seed or
                       max_new_tokens
/help                  this list
/quit                  leave; so does Ctrl-D"""
SETTINGS = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens")


@contextmanager
def open_chat(request: AskRequest) -> Iterator[Chat]:
    """A conversation with a checkpoint, without media so far; the model is loaded on entry."""
    prepared = prepare(request, has_videos=True)
    cache = prepared.settings.cache_tokens
    with open_session(prepared, cache, cache_step=CHAT_STEP, verbose=request.verbose) as session:
        yield Chat(session, prepared.processor, prepared.preset, prepared.sampling)


@dataclass(frozen=True)
class Loaded:
    """One image or video with what was read from it."""

    medium: Medium
    media: Media


class Chat:
    """One conversation with one session.

    Attributes:
        turns: questions, with their placeholders, and answers.
        loaded: the media of the turns, in order.
        before: how many media there were before each question.
        staged: media for the next question.
        sampling: how tokens of the next answer are drawn.
    """

    def __init__(self, session: Session, processor: Processor, preset: Preset, sampling: Sampling):
        self.session, self.processor, self.preset, self.sampling = session, processor, preset, sampling
        self.turns: tuple[Turn, ...] = ()
        self.loaded: tuple[Loaded, ...] = ()
        self.before: tuple[int, ...] = ()
        self.staged: tuple[Loaded, ...] = ()

    def ask(self, question: str, on_text: Callable[[str], None] | None = None) -> Answer:
        """Ask with the conversation so far. A question that cannot be asked changes nothing.

        Raises:
            DataError: placeholders and media do not match, or the conversation no longer fits into the cache.
        """
        kinds = [one.medium.kind for one in self.staged]
        loaded = (*self.loaded, *[self.staged[at] for at in media_order(question, kinds)])
        names = [IMAGE_PLACEHOLDER if kind == "image" else VIDEO_PLACEHOLDER for kind in kinds]
        media = tuple(one.medium for one in loaded)

        def fits(turns: tuple[Turn, ...]) -> bool:
            return check_placeholders(Sample("", "", media, turns)) is None

        turns = (*self.turns, Turn("user", question))
        named = (*self.turns, Turn("user", "\n".join([*names, question])))
        turns = named if fits(named) and not fits(turns) else turns  # if neither fits, encoding says why
        encoded = self.encode(turns, loaded)
        hint = "/clear starts a new conversation, /undo removes the last turn; --frames takes fewer frames of videos"
        check_room(encoded, self.session.cache_tokens, hint)
        answer = self.session.answer([encoded], self.sampling, (lambda row, text: on_text(text)) if on_text else None)
        self.before += (len(self.loaded),)
        self.turns, self.loaded, self.staged = (*turns, Turn("assistant", answer[0].text)), loaded, ()
        return answer[0]

    def encode(self, turns: tuple[Turn, ...], loaded: tuple[Loaded, ...]) -> EncodedSample:
        sample = Sample("", "", tuple(one.medium for one in loaded), turns)
        return self.processor.encode_question(sample, {}, join_media([one.media for one in loaded], self.processor))

    def run_command(self, line: str) -> str:
        """Run a line that begins with a slash.

        Returns:
            What to tell the user.

        Raises:
            LlavaNextError: the command is unknown or fails.
        """
        try:
            name, *words = shlex.split(line)
        except ValueError as error:
            raise DataError(f"{line}: {error}", "quote a path that has spaces") from error
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
            raise DataError(f"{name}: unknown command", "/help lists all commands")
        function, count = commands[name]
        if len(words) != count:
            raise DataError(f"{name} takes {count or 'no'} argument{'' if count == 1 else 's'}", "see /help")
        return function(*words)

    def add_image(self, path: str) -> str:
        return self.add("image", path)

    def add_video(self, path: str) -> str:
        return self.add("video", path)

    def add(self, kind: str, path: str) -> str:
        """Read an image or video for the next question."""
        medium = Medium(kind, str(Path(path).expanduser().absolute()))
        sample = Sample("", "", (medium,), ())
        check_media(sample, self.preset)
        media = self.processor.load_media(sample)
        self.staged = (*self.staged, Loaded(medium, media))
        what = f"{len(media.tiles)} tiles" if kind == "image" else f"{len(media.frames)} frames"
        return f"{path}: {what}, added to the next question"

    def undo(self) -> str:
        """Remove the newest staged medium, or else the last question with its answer and media."""
        if self.staged:
            self.staged = self.staged[:-1]
            return "the last image or video is removed"
        if not self.turns:
            raise DataError("there is no question to remove", "type a question; /help lists all commands")
        self.turns, self.loaded, self.before = self.turns[:-2], self.loaded[: self.before[-1]], self.before[:-1]
        return f"removed; questions left: {len(self.turns) // 2}"

    def clear(self) -> str:
        self.turns, self.loaded, self.before, self.staged = (), (), (), ()
        return "a new conversation"

    def save(self, path: str) -> str:
        """Write the conversation as one JSON sample, which `ask --batch` and `train` read. No file is replaced."""
        sample = Sample("chat", "", tuple(one.medium for one in self.loaded), self.turns)
        try:
            with Path(path).expanduser().open("x", encoding="utf-8") as file:
                file.write(msgspec.json.encode(sample).decode() + "\n")
        except FileExistsError as error:
            raise DataError(f"{path} already exists", "choose another file") from error
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror or error}", "choose another file") from error
        return f"saved: {path}"

    def set(self, name: str, value: str) -> str:
        """Change one setting of the sampling."""
        if name not in SETTINGS:
            raise DataError(f"{name}: unknown setting", f"settings: {', '.join(SETTINGS)}")
        kind = {field.name: field.type for field in fields(Sampling)}[name]
        try:
            number: Any = int(value) if kind == "int" else float(value)
            self.sampling = replace(self.sampling, **{name: number})
        except (ValueError, LlavaNextError) as error:
            raise DataError(f"{name} cannot be {value}", getattr(error, "what", "use a number")) from error
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
