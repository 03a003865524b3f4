"""The processed JSON of MindFormers' former llava_next: media between tags in the first turn, `<text>` before others.

    [{"conversations": [
        {"from": "human", "value": "<|reserved_special_token_3|>/data/7.jpg<|reserved_special_token_4|><image>What?"},
        {"from": "gpt", "value": "<text>A cat."}]}, ...]

A text-only record has the empty pair of tags. Ids and sources are not kept. `mix --format mindformers` writes it,
`train` reads it, because users have such files.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec
from msgspec.structs import replace

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.readers import SPEAKERS
from llavanext_cli.processing.formats import guess_kind
from llavanext_cli.processing.prompt import check_placeholders
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Medium, Sample, build_sample

MEDIA_TAGS = ("<|reserved_special_token_3|>", "<|reserved_special_token_4|>")
TEXT_TAG = "<text>"
OPENING = "["
BETWEEN = ","
CLOSING = "\n]"
EMPTY = "[]"

_MARKS = (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
_TAGGED = re.compile(f"{re.escape(MEDIA_TAGS[0])}(.*?){re.escape(MEDIA_TAGS[1])}", re.DOTALL)


def encode(records: Sequence[bytes | msgspec.Raw], samples: Sequence[Sample], root: str) -> bytes:
    """Records as the original writes them: `json.dump(..., indent=2, ensure_ascii=False)`, without the outer brackets.

    Args:
        records: JSON text of each record.
        samples: the sample of each record, with media paths relative to `root`.
    """
    written = []
    for text, sample in zip(records, samples, strict=True):
        turns: list[dict[str, Any]] = msgspec.json.decode(text)["conversations"]
        tags = "".join(f"{MEDIA_TAGS[0]}{root}{medium.path}{MEDIA_TAGS[1]}" for medium in sample.media)
        turns[0]["value"] = (tags or "".join(MEDIA_TAGS)) + turns[0]["value"]
        for turn in turns:
            if MEDIA_TAGS[0] not in turn["value"]:
                turn["value"] = TEXT_TAG + turn["value"]
        written.append({"conversations": turns})
    if not written:
        return b""
    return msgspec.json.format(msgspec.json.encode(written), indent=2)[len("[") : -len("\n]")]


def decode(data: Any, where: str, number: int) -> Sample:
    """One record of the processed JSON as a sample; its number in the file becomes its id.

    Args:
        data: the parsed record.
        where: "file.json, line 7", to open the message of an error.

    Raises:
        DataError: the record has another form, or its placeholders do not fit its media.
    """
    said = data.get("conversations") if isinstance(data, dict) else None
    if not isinstance(said, list) or not said:
        raise DataError(f"{where}: a record needs a list of conversations", "make the file again: llavanext mix --help")
    if "image" in data or "video" in data:
        raise DataError(
            f"{where}: this is a record of a raw data set, not a sample", "make samples first: llavanext mix --help"
        )
    turns, media = [], []
    for position, turn in enumerate(said):
        speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, dict) else (None, None)
        if speaker not in SPEAKERS or not isinstance(text, str):
            raise DataError(
                f"{where}: turn {position + 1} needs from (human or gpt) and value",
                "drop the record, or make the file again: llavanext mix --help",
            )
        if position == 0:
            # the tags do not say what a file is; its name must
            media = [Medium(guess_kind(path) or "image", path) for path in _TAGGED.findall(text) if path]
            text = _TAGGED.sub("", text)
        turns.append({"role": SPEAKERS[speaker], "text": text.removeprefix(TEXT_TAG)})
    if turns[0]["role"] == "assistant":
        turns = turns[1:]
    marks = sum(turn["text"].count(mark) for turn in turns for mark in _MARKS if turn["role"] == "user")
    if turns and media and not marks:  # the tags alone place the media, as they do in the original
        turns[0]["text"] = IMAGE_PLACEHOLDER * len(media) + "\n" + turns[0]["text"]
        marks = len(media)
    if media and marks == len(media) and all(medium.kind == "video" for medium in media):
        for turn in turns[::2]:
            turn["text"] = turn["text"].replace(IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)
    sample = replace(build_sample({"id": number, "turns": turns}, where), media=tuple(media))
    problem = check_placeholders(sample)
    if problem:
        raise DataError(f"{where}: {problem.partition(': ')[2]}", "drop the record, or make the file again")
    return sample
