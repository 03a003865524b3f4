"""Turns a record of a public data set into a sample, or says why it cannot be one.

    {"id": 7, "image": "coco/7.jpg",              {"id": "7", "source": "mix665k", "media": [{"kind": "image", ...}],
     "conversations": [                            "turns": [
       {"from": "human", "value": "<image> .."},     {"role": "user", "text": "<image> .."},
       {"from": "gpt", "value": ".."}]}              {"role": "assistant", "text": ".."}]}

Records of LLaVA-Instruct-150K name pictures, those of LLaVA-Video-178K clips; both write `<image>` for the medium, and
a clip's becomes `<video>` here. The hot path works on typed records and plain dictionaries, because a mix has hundreds
of thousands of records; a test holds the result against `records.Sample`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from posixpath import normpath
from typing import Any

import msgspec

from llavanext_cli.mixing.splitter import record_lines, split_records
from llavanext_cli.processing.prompt import check_placeholders
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Medium, Sample, Turn

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
    """One medium of a sample, as `records.Medium.to_dict` writes it."""

    kind: str
    path: str
    size: tuple[int, int] | None = None


class Converted(msgspec.Struct, gc=False):
    """A sample in the form and key order of `records.Sample.to_dict`, ready to be written."""

    id: str
    source: str
    media: list[Media]
    turns: list[dict[str, str]]


_records = msgspec.json.Decoder(list[Record])
_record_line = msgspec.json.Decoder(Record)
_anything = msgspec.json.Decoder()


def decode_records(data: bytes, lines: bool, chosen: Sequence[int]) -> list[Record | BadRecordError]:
    """Decode the `chosen` records of a chunk (ascending positions in it); a bad one becomes the error that says why."""
    try:
        if len(chosen) and chosen[-1] - chosen[0] + 1 == len(chosen):
            records = _record_line.decode_lines(data) if lines else _records.decode(b"[" + data + b"]")
            return records[chosen[0] : chosen[-1] + 1]
    except (msgspec.DecodeError, UnicodeDecodeError):
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
    except (msgspec.DecodeError, UnicodeDecodeError):
        return BadRecordError("not_unicode", "a text holds bytes or escapes that are not Unicode")


def _starts_object(text: bytes | msgspec.Raw) -> bool:
    return bytes(text).lstrip()[:1] == b"{"


def describe_faults(
    data: bytes, lines: bool, first: int, line: int, bad: Sequence[tuple[int, BadRecordError]]
) -> list[Fault]:
    """Give bad records, (position in the chunk, error), their number and line in the file, and their id if any."""
    if not bad:
        return []
    texts = split_records(data, lines)
    starts = record_lines(data, texts, line)
    return [
        Fault(first + position, starts[position], _id_of(texts[position]), error.reason, error.detail)
        for position, error in bad
    ]


def _id_of(text: bytes | msgspec.Raw) -> str:
    try:
        record = _anything.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return ""
    return str(record.get("id", "")) if isinstance(record, dict) else ""


def media_of(record: Record, root: str) -> list[Media]:
    """The media a record names, pictures before clips, with paths relative to `root`.

    Raises:
        BadRecordError: a path leads out of `root`.
    """
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


def turns_of(record: Record, media: list[Media]) -> list[dict[str, str]]:
    """The conversation as user and assistant turns with one placeholder a medium; may reorder `media`.

    An answer that opens the conversation, as in ShareGPT texts, has no question and is left out, as LLaVA's training
    does.

    Raises:
        BadRecordError: speakers do not alternate, a turn is empty, or placeholders and media do not fit.
    """
    said = record.conversations
    start = 1 if said and SPEAKERS.get(said[0].speaker) == "assistant" else 0
    if len(said) - start < 2:
        raise BadRecordError("no_answer", "the conversation has no question with an answer")
    turns: list[dict[str, str]] = []
    expected, other = "user", "assistant"
    placeholders = 0
    for number in range(start, len(said)):
        text = said[number].value
        if SPEAKERS.get(said[number].speaker) != expected:
            raise BadRecordError("speakers", _speaker_fault(said[number].speaker, number, expected))
        if not text or text.isspace():
            kind = "question" if expected == "user" else "answer"
            raise BadRecordError(f"empty_{kind}", f"turn {number + 1}, {_articled(kind)}, is empty")
        if expected == "user" and "<" in text:
            placeholders += text.count(IMAGE_PLACEHOLDER) + text.count(VIDEO_PLACEHOLDER)
        turns.append({"role": expected, "text": text})
        expected, other = other, expected
    if expected == "assistant":
        raise BadRecordError("no_answer", "the last question has no answer")
    if placeholders or media:
        _fit_placeholders(turns, media, placeholders)
    return turns


def _fit_placeholders(turns: list[dict[str, str]], media: list[Media], placeholders: int) -> None:
    kinds = {medium.kind for medium in media}
    if len(kinds) > 1:
        _order_media(turns, media)
    elif kinds == {"video"} and placeholders == len(media):
        name_placeholders(turns, media)
    elif kinds != {"image"} or placeholders != len(media) or any(VIDEO_PLACEHOLDER in turn["text"] for turn in turns):
        # Words that look like placeholders need not be any; processing, which will read them, has the last word.
        problem = check_placeholders(
            Sample(
                "",
                "",
                tuple(Medium(medium.kind, medium.path) for medium in media),
                tuple(Turn(turn["role"], turn["text"]) for turn in turns),
            )
        )
        if problem:
            raise BadRecordError("placeholders", problem.partition(": ")[2])


def _order_media(turns: Sequence[dict[str, str]], media: list[Media]) -> None:
    """Bring pictures and clips of one record into the order of their placeholders, which must tell them apart."""
    text = "".join(turn["text"] for turn in turns if turn["role"] == "user")
    pictures = [medium for medium in media if medium.kind == "image"]
    clips = [medium for medium in media if medium.kind == "video"]
    if text.count(IMAGE_PLACEHOLDER) != len(pictures) or text.count(VIDEO_PLACEHOLDER) != len(clips):
        raise BadRecordError("placeholders", "pictures and clips in one record need <image> and <video> placeholders")
    marks = re.findall(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}", text)
    media[:] = [(pictures if mark == IMAGE_PLACEHOLDER else clips).pop(0) for mark in marks]


def name_placeholders(turns: list[dict[str, Any]], media: Sequence[Media]) -> None:
    """Give every placeholder the name of its medium's kind, in place: public records write `<image>` for a clip."""
    kinds = iter([IMAGE_PLACEHOLDER if medium.kind == "image" else VIDEO_PLACEHOLDER for medium in media])
    for turn in turns:
        if turn["role"] == "user":
            pieces = turn["text"].replace(VIDEO_PLACEHOLDER, IMAGE_PLACEHOLDER).split(IMAGE_PLACEHOLDER)
            turn["text"] = pieces[0] + "".join(next(kinds) + piece for piece in pieces[1:])


def _articled(kind: str) -> str:
    return f"an {kind}" if kind == "answer" else f"a {kind}"


def _speaker_fault(speaker: str, number: int, expected: str) -> str:
    if speaker not in SPEAKERS:
        return f"turn {number + 1}: unknown speaker {speaker!r}"
    return f"turn {number + 1} must be the {expected}'s, and is the {SPEAKERS[speaker]}'s: speakers do not alternate"


def sample_id(record: Record, number: int) -> str:
    """The record's own id, or its number in the file where it has none."""
    return str(number) if record.id is None or record.id == "" else str(record.id)
