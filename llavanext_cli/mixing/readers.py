"""Turns a record of a public data set into a `records.Sample`, or says why it cannot be one.

    {"id": 7, "image": "coco/7.jpg",              {"id": "7", "source": "mix665k", "media": [{"kind": "image", ...}],
     "conversations": [                            "turns": [
       {"from": "human", "value": "<image> .."},     {"role": "user", "text": "<image> .."},
       {"from": "gpt", "value": ".."}]}              {"role": "assistant", "text": ".."}]}

Records of LLaVA-Instruct-150K name images, those of LLaVA-Video-178K videos; both write `<image>` for the medium, and a
video's becomes `<video>` here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from operator import attrgetter
from posixpath import normpath

import msgspec

from llavanext_cli.mixing.json_index import record_lines, split_records
from llavanext_cli.processing.prompt import check_placeholders
from llavanext_cli.records import IMAGE_PLACEHOLDER, INVALID_JSON, ROLES, VIDEO_PLACEHOLDER, Medium, Sample, Turn

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}

_PLACEHOLDERS = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")


class BadRecordError(Exception):
    """A record that cannot become a sample. `reason` is one word for counting, `detail` a sentence."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Message(msgspec.Struct, gc=False):
    """One entry of `conversations`."""

    speaker: str = msgspec.field(name="from")
    value: str


class Record(msgspec.Struct, gc=False):
    """A record of LLaVA-Instruct-150K or LLaVA-Video-178K; other keys are skipped."""

    conversations: list[Message]
    id: str | int | float | None = None
    image: str | list[str] | None = None
    video: str | list[str] | None = None


@dataclass(frozen=True)
class Reject:
    """A bad record. `number` counts the file's records from 0, `line` its lines from 1."""

    number: int
    line: int
    id: str
    reason: str
    detail: str


_records = msgspec.json.Decoder(list[Record])
_record_line = msgspec.json.Decoder(Record)


def decode_records(data: bytes, lines: bool, chosen: Sequence[int]) -> list[Record | BadRecordError]:
    """Decode the `chosen` records of a chunk (ascending positions in it); a bad one becomes the error that says why."""
    try:
        if len(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen):
            records = _record_line.decode_lines(data) if lines else _records.decode(b"[" + data + b"]")
            return records[chosen[0] : chosen[-1] + 1]
    except INVALID_JSON:
        pass  # at least one record is bad: decode each of them alone
    texts = split_records(data, lines)
    return [_decode(bytes(texts[position])) for position in chosen]


def _decode(text: bytes) -> Record | BadRecordError:
    try:
        return _record_line.decode(text)
    except msgspec.ValidationError as error:
        if not text.lstrip().startswith(b"{"):
            return BadRecordError("not_a_record", "the record is not an object")
        return BadRecordError("not_a_record", f"{str(error)[:1].lower()}{str(error)[1:]}".replace("$.", ""))
    except INVALID_JSON:
        if _has_constant(text):  # Python's json writes NaN and Infinity, which JSON does not have
            return BadRecordError("not_a_record", "it contains NaN or Infinity, which JSON does not have")
        return BadRecordError("not_unicode", "a text has bytes or escapes that are not Unicode")


def _has_constant(text: bytes) -> bool:
    found: list[str] = []
    try:
        json.loads(text, parse_constant=found.append)
    except (ValueError, RecursionError):
        return False
    return bool(found)


def locate_rejects(
    data: bytes, lines: bool, first: int, line: int, bad: Sequence[tuple[int, str, str]]
) -> list[Reject]:
    """Add to bad records, (position in the chunk, reason, detail), their number and line in the file, and their id."""
    if not bad:
        return []
    texts = split_records(data, lines)
    starts = record_lines(data, texts, line)
    return [
        Reject(first + position, starts[position], _id_of(texts[position]), reason, detail)
        for position, reason, detail in bad
    ]


def _id_of(text: bytes | msgspec.Raw) -> str:
    try:
        record = msgspec.json.decode(text)
    except INVALID_JSON:
        return ""
    found = record.get("id", "") if isinstance(record, dict) else ""
    return found if isinstance(found, str) else msgspec.json.encode(found).decode()  # true is true, not True


def read_record(record: Record | BadRecordError, root: str, source: str = "", number: int = 0) -> Sample:
    """The sample of a record, with the media in the order of their placeholders.

    Args:
        root: the media folder; paths in the sample are relative to it.
        source: name of the data set.
        number: of the record in its file; stands for a missing id.

    Raises:
        BadRecordError: the record cannot be a sample; or `record` is itself the error.
    """
    if isinstance(record, BadRecordError):
        raise BadRecordError(record.reason, record.detail)  # a new one: a traceback would keep the chunk in memory
    media, texts = _read_plain(record) or _read_any(record, root)
    name = str(number) if record.id is None or record.id == "" else str(record.id)
    return Sample(name, source, tuple(media), tuple(map(Turn, cycle(ROLES), texts)))


def _read_plain(record: Record) -> tuple[list[Medium], list[str]] | None:
    """What `_read_any` returns for almost all records: human and gpt in turn, one image or none, nothing unusual; None
    for any other. A mix spends its time here, so each step is one call that loops in C."""
    messages, image = record.conversations, record.image
    turns = len(messages)
    if record.video is not None or not 0 < turns < _MOST_TURNS or [*map(_speaker, messages)] != _ALTERNATING[turns]:
        return None
    texts = [*map(_value, messages)]
    if min(texts) < "!":  # empty, or it begins with a blank
        return None
    if max(texts) > "\x7f" and True in map(str.isspace, texts):
        return None
    questions = texts[0] if turns == 2 else "\n".join(texts[::2])
    if image is None:
        return None if "<" in questions else ([], texts)
    if questions.count("<") == 1 and IMAGE_PLACEHOLDER in questions and type(image) is str and _is_plain(image):
        return [Medium("image", image)], texts
    return None


_speaker, _value = attrgetter("speaker"), attrgetter("value")
_MOST_TURNS = 400
_ALTERNATING = [["human", "gpt"] * (turns // 2) for turns in range(_MOST_TURNS)]
"""The usual speakers of that many turns; an odd number of turns equals none of them."""


def _read_any(record: Record, root: str) -> tuple[list[Medium], list[str]]:
    media = _read_media(record, root)
    return _read_texts(record, media)


def _read_media(record: Record, root: str) -> list[Medium]:
    """The media of a record, images before videos. Raises if a path leads out of `root`."""
    media = []
    for kind, paths in (("image", record.image), ("video", record.video)):
        for path in [paths] if isinstance(paths, str) and paths else paths or ():
            media.append(Medium(kind, path if _is_plain(path) else _path_inside(path, root)))
    return media


def _is_plain(path: str) -> bool:
    """Whether a path needs no second look. Almost all pass, and `normpath` is slow."""
    return bool(path) and ".." not in path and path[0] not in "/." and "\0" not in path


def _path_inside(path: str, root: str) -> str:
    if not path or "\0" in path:
        raise BadRecordError("bad_path", f"invalid path {path!r}")
    clean = normpath(path)
    if clean.startswith("/"):
        folder = normpath(root).rstrip("/") + "/"
        if not clean.startswith(folder):
            raise BadRecordError("outside_root", f"{path} is outside the media folder {root}")
        clean = clean[len(folder) :]
    if clean == ".." or clean.startswith("../"):
        raise BadRecordError("outside_root", f"{path} is outside the media folder")
    return clean


def _read_texts(record: Record, media: list[Medium]) -> tuple[list[Medium], list[str]]:
    """The media in the order of their placeholders, and the turns from the first question on.

    An answer that opens the conversation, as in ShareGPT texts, has no question and is left out, as LLaVA's training
    does. Raises if speakers do not alternate, a turn is empty, or placeholders and media do not match.
    """
    messages = record.conversations
    skipped = 1 if messages and SPEAKERS.get(messages[0].speaker) == "assistant" else 0
    messages = messages[skipped:]
    _check_speakers(messages, skipped)
    texts = [message.value for message in messages]
    for number, text in enumerate(texts):
        if not text or text.isspace():
            what = "answer" if number % 2 else "question"
            raise BadRecordError(f"empty_{what}", f"turn {number + skipped + 1}, a {what}, is empty")
    return _match_placeholders(texts, media)


def _check_speakers(messages: Sequence[Message], skipped: int) -> None:
    """Raise unless known speakers alternate and the last turn is an answer."""
    for number, message in enumerate(messages):
        role = SPEAKERS.get(message.speaker)
        if role is None:
            raise BadRecordError("speakers", f"turn {number + skipped + 1}: unknown speaker {message.speaker!r}")
        if role != ROLES[number % 2]:
            raise BadRecordError(
                "speakers", f"turn {number + skipped + 1} is the {role}'s again: speakers must alternate"
            )
    if len(messages) < 2:
        raise BadRecordError("no_answer", "the conversation has no question with an answer")
    if len(messages) % 2:
        raise BadRecordError("no_answer", "the last question has no answer")


def _match_placeholders(texts: list[str], media: list[Medium]) -> tuple[list[Medium], list[str]]:
    kinds = {medium.kind for medium in media}
    placeholders = [found for question in texts[::2] for found in _PLACEHOLDERS.findall(question)]
    if len(kinds) > 1:
        return _order_media(placeholders, media), texts
    if kinds == {"video"} and len(placeholders) == len(media):
        # Public records write <image> for a video too; an answer may mention either word.
        return media, [
            text if number % 2 else text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
            for number, text in enumerate(texts)
        ]
    # `processing` decides whether words that look like placeholders are some
    problem = check_placeholders(Sample("", "", tuple(media), tuple(map(Turn, cycle(ROLES), texts))))
    if problem:
        raise BadRecordError("placeholders", problem.partition(": ")[2])
    return media, texts


def _order_media(placeholders: Sequence[str], media: Sequence[Medium]) -> list[Medium]:
    """Images and videos of one record in the order of their placeholders, which must tell them apart."""
    images = [medium for medium in media if medium.kind == "image"]
    videos = [medium for medium in media if medium.kind == "video"]
    if placeholders.count(IMAGE_PLACEHOLDER) != len(images) or placeholders.count(VIDEO_PLACEHOLDER) != len(videos):
        raise BadRecordError("placeholders", "images and videos in one record need <image> and <video> placeholders")
    return [(images if placeholder == IMAGE_PLACEHOLDER else videos).pop(0) for placeholder in placeholders]
