"""Turns a record of a public data set into a sample, or says why it cannot be one.

    {"id": 7, "image": "coco/7.jpg",              {"id": "7", "source": "mix665k", "media": [{"kind": "image", ...}],
     "conversations": [                            "turns": [
       {"from": "human", "value": "<image> .."},     {"role": "user", "text": "<image> .."},
       {"from": "gpt", "value": ".."}]}              {"role": "assistant", "text": ".."}]}

Records of LLaVA-Instruct-150K name pictures, those of LLaVA-Video-178K clips; both write `<image>` for the medium, and
a clip's becomes `<video>` here. The types of this module are msgspec's, because a mix has hundreds of thousands of
records; a test holds the result against `records.Sample`.
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
from llavanext_cli.records import IMAGE_PLACEHOLDER, INVALID_JSON, ROLES, VIDEO_PLACEHOLDER, Medium, Sample
from llavanext_cli.records import Turn as SampleTurn

_PLACEHOLDERS = re.compile(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}")

SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


class BadRecordError(Exception):
    """A record that cannot become a sample. `reason` is one word for counting, `detail` a sentence."""

    def __init__(self, reason: str, detail: str):
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Said(msgspec.Struct, gc=False):
    """One entry of `conversations`."""

    speaker: str = msgspec.field(name="from")
    value: str


class Record(msgspec.Struct, gc=False):
    """A record of LLaVA-Instruct-150K or LLaVA-Video-178K; keys that mean nothing to us are skipped."""

    conversations: list[Said]
    id: str | int | float | None = None
    image: str | list[str] | None = None
    video: str | list[str] | None = None


@dataclass(frozen=True)
class Fault:
    """Why one record of a chunk is no sample. `number` counts the file's records from 0, `line` its lines from 1."""

    number: int
    line: int
    id: str
    reason: str
    detail: str


class Media(msgspec.Struct, gc=False, omit_defaults=True):
    """One medium of a sample, as `records.Medium` is written."""

    kind: str
    path: str
    size: tuple[int, int] | None = None


class Turn(msgspec.Struct, gc=False):
    """One turn of a sample, as `records.Turn` is written."""

    role: str
    text: str


class Converted(msgspec.Struct, gc=False):
    """A sample in the form and key order of `records.Sample`, ready to be written."""

    id: str
    source: str
    media: list[Media]
    turns: list[Turn]


def build_converted(name: str, source: str, media: list[Media], texts: Sequence[str]) -> Converted:
    """What is written of one sample; `texts` are question and answer in turn."""
    return Converted(name, source, media, list(map(Turn, cycle(ROLES), texts)))


_records = msgspec.json.Decoder(list[Record])
_record_line = msgspec.json.Decoder(Record)
_anything = msgspec.json.Decoder()


def decode_records(data: bytes, lines: bool, chosen: Sequence[int]) -> list[Record | BadRecordError]:
    """Decode the `chosen` records of a chunk (ascending positions in it); a bad one becomes the error that says why."""
    try:
        if len(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen):
            records = _record_line.decode_lines(data) if lines else _records.decode(b"[" + data + b"]")
            return records[chosen[0] : chosen[-1] + 1]
    except INVALID_JSON:
        pass  # at least one record is not as it should be: look at each of them
    texts = split_records(data, lines)
    return [_decode(texts[position]) for position in chosen]


def _decode(text: bytes | msgspec.Raw) -> Record | BadRecordError:
    try:
        return _record_line.decode(text)
    except msgspec.ValidationError as error:
        if not _starts_object(text):
            return BadRecordError("not_a_record", "the record is not an object")
        return BadRecordError("not_a_record", f"{str(error)[:1].lower()}{str(error)[1:]}".replace("$.", ""))
    except INVALID_JSON:
        if _has_constant(bytes(text)):  # Python's json writes NaN and Infinity, which JSON does not have
            return BadRecordError("not_a_record", "NaN or Infinity stands in it, and JSON has neither")
        return BadRecordError("not_unicode", "a text holds bytes or escapes that are not Unicode")


def _has_constant(text: bytes) -> bool:
    found: list[str] = []
    try:
        json.loads(text, parse_constant=found.append)
    except (ValueError, RecursionError):
        return False
    return bool(found)


def _starts_object(text: bytes | msgspec.Raw) -> bool:
    return bytes(text).lstrip()[:1] == b"{"


def describe_faults(
    data: bytes, lines: bool, first: int, line: int, bad: Sequence[tuple[int, str, str]]
) -> list[Fault]:
    """Give bad records, (position in the chunk, reason, detail), their number and line in the file, and their id."""
    if not bad:
        return []
    texts = split_records(data, lines)
    starts = record_lines(data, texts, line)
    return [
        Fault(first + position, starts[position], _id_of(texts[position]), reason, detail)
        for position, reason, detail in bad
    ]


def _id_of(text: bytes | msgspec.Raw) -> str:
    try:
        record = _anything.decode(text)
    except INVALID_JSON:
        return ""
    found = record.get("id", "") if isinstance(record, dict) else ""
    return found if isinstance(found, str) else msgspec.json.encode(found).decode()  # true is true, not True


def read_record(record: Record | BadRecordError, root: str) -> tuple[list[Media], list[str]]:
    """The media of a record in the order of their placeholders, and what is said from the first question on.

    Raises:
        BadRecordError: the record cannot be a sample; or `record` is itself the error.
    """
    return _read_plain(record) or _read_any(record, root)


def _read_plain(record: Record | BadRecordError) -> tuple[list[Media], list[str]] | None:
    """What `_read_any` returns for a record as almost all are: human and gpt in turn, one picture or none, nothing
    odd. None for any other. The time of a mix is spent here, so each step is one call that loops in C."""
    if type(record) is not Record or record.video is not None:
        return None
    said, image = record.conversations, record.image
    turns = len(said)
    if not 0 < turns < _MOST_TURNS or [*map(_speaker, said)] != _IN_TURN[turns]:
        return None
    texts = [*map(_value, said)]
    if min(texts) < "!":  # empty, or it begins with a blank
        return None
    if max(texts) > "\x7f" and True in map(str.isspace, texts):
        return None
    questions = texts[0] if turns == 2 else "\n".join(texts[::2])
    if image is None:
        return None if "<" in questions else ([], texts)
    if questions.count("<") == 1 and IMAGE_PLACEHOLDER in questions and type(image) is str and _is_plain(image):
        return [Media("image", image)], texts
    return None


_speaker, _value = attrgetter("speaker"), attrgetter("value")
_MOST_TURNS = 400
_IN_TURN = [["human", "gpt"] * (turns // 2) for turns in range(_MOST_TURNS)]
"""The usual speakers of that many turns; an odd number of turns equals none of them. Longer talks are looked at turn by
turn."""


def _read_any(record: Record | BadRecordError, root: str) -> tuple[list[Media], list[str]]:
    media = media_of(record, root)
    return media, texts_of(record, media)


def media_of(record: Record | BadRecordError, root: str) -> list[Media]:
    """The media a record names, pictures before clips, with paths relative to `root`.

    Raises:
        BadRecordError: a path leads out of `root`; or `record` is itself the error.
    """
    if isinstance(record, BadRecordError):
        raise BadRecordError(record.reason, record.detail)  # a new one: a traceback would tie the chunk to it
    media = []
    for kind, named in (("image", record.image), ("video", record.video)):
        if named:
            for path in (named,) if isinstance(named, str) else named:
                media.append(Media(kind, path if _is_plain(path) else _inside(path, root)))
    return media


def _is_plain(path: str) -> bool:
    """Whether a path needs no second look. Almost all pass, and `normpath` is slow."""
    return bool(path) and ".." not in path and path[0] not in "/." and "\0" not in path


def _inside(path: str, root: str) -> str:
    if not path or "\0" in path:
        raise BadRecordError("bad_path", f"{path!r} is no path")
    clean = normpath(path)
    if clean.startswith("/"):
        base = normpath(root)
        prefix = base if base.endswith("/") else base + "/"
        if not clean.startswith(prefix):
            raise BadRecordError("outside_root", f"{path} lies outside of the media folder {root}")
        clean = clean[len(prefix) :]
    if clean == ".." or clean.startswith("../"):
        raise BadRecordError("outside_root", f"{path} climbs out of the media folder")
    return clean


def texts_of(record: Record, media: list[Media]) -> list[str]:
    """What is said from the first question on: question and answer in turn, with a placeholder for each medium.

    An answer that opens the conversation, as in ShareGPT texts, has no question and is left out, as LLaVA's training
    does. `media` is brought into the order of the placeholders.

    Raises:
        BadRecordError: speakers do not alternate, a turn is empty, or placeholders and media do not fit.
    """
    said = record.conversations
    if said and SPEAKERS.get(said[0].speaker) == "assistant":
        said = said[1:]
    turns = len(said)
    _check_speakers(said, len(record.conversations) - turns)
    texts = [turn.value for turn in said]
    if not all(texts) or any(map(str.isspace, texts)):
        raise _empty_turn(texts, len(record.conversations) - turns)
    questions = texts[0] if turns == 2 else "\n".join(texts[::2])
    if media or "<" in questions:
        pictures = questions.count(IMAGE_PLACEHOLDER)
        if record.video or pictures != len(media) or VIDEO_PLACEHOLDER in questions:
            return _fit_placeholders(texts, media)
    return texts


def _check_speakers(said: Sequence[Said], skipped: int) -> None:
    """Raise unless known speakers take turns and the last word is an answer."""
    for number, turn in enumerate(said, skipped):
        role = SPEAKERS.get(turn.speaker)
        if role is None:
            raise BadRecordError("speakers", f"turn {number + 1}: unknown speaker {turn.speaker!r}")
        if role != ROLES[(number - skipped) % 2]:
            raise BadRecordError("speakers", f"turn {number + 1} is the {role}'s again: speakers must alternate")
    if len(said) < 2:
        raise BadRecordError("no_answer", "the conversation has no question with an answer")
    if len(said) % 2:
        raise BadRecordError("no_answer", "the last question has no answer")


def _empty_turn(texts: Sequence[str], skipped: int) -> BadRecordError:
    number = next(number for number, text in enumerate(texts) if not text or text.isspace())
    if number % 2:
        return BadRecordError("empty_answer", f"turn {number + skipped + 1}, an answer, is empty")
    return BadRecordError("empty_question", f"turn {number + skipped + 1}, a question, is empty")


def _fit_placeholders(texts: list[str], media: list[Media]) -> list[str]:
    """What to do where not every placeholder is a picture's `<image>`."""
    kinds = {medium.kind for medium in media}
    marks = [mark for question in texts[::2] for mark in _PLACEHOLDERS.findall(question)]
    if len(kinds) > 1:
        _order_media(marks, media)
        return texts
    if kinds == {"video"} and len(marks) == len(media):
        # Public records write <image> for a clip too; an answer may speak of either word.
        return [
            text if number % 2 else text.replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
            for number, text in enumerate(texts)
        ]
    # Words that look like placeholders need not be any; processing, which will read them, has the last word.
    problem = check_placeholders(build_sample(texts, media))
    if problem:
        raise BadRecordError("placeholders", problem.partition(": ")[2])
    return texts


def _order_media(marks: Sequence[str], media: list[Media]) -> None:
    """Bring pictures and clips of one record into the order of their placeholders, which must tell them apart."""
    pictures = [medium for medium in media if medium.kind == "image"]
    clips = [medium for medium in media if medium.kind == "video"]
    if marks.count(IMAGE_PLACEHOLDER) != len(pictures) or marks.count(VIDEO_PLACEHOLDER) != len(clips):
        raise BadRecordError("placeholders", "pictures and clips in one record need <image> and <video> placeholders")
    media[:] = [(pictures if mark == IMAGE_PLACEHOLDER else clips).pop(0) for mark in marks]


def build_sample(texts: Sequence[str], media: Sequence[Media]) -> Sample:
    """What was said and shown as a `records.Sample`, without id and source."""
    return Sample(
        id="",
        source="",
        media=tuple(Medium(medium.kind, medium.path, medium.size) for medium in media),
        turns=tuple(map(SampleTurn, cycle(ROLES), texts)),
    )


def sample_id(record: Record, number: int) -> str:
    """The record's own id, or its number in the file where it has none."""
    return str(number) if record.id is None or record.id == "" else str(record.id)
