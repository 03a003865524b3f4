"""The original's processed JSON: written to the byte as its script writes it, and read back."""

from __future__ import annotations

import copy
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.mindformers_format import BETWEEN, CLOSING, OPENING, decode, encode
from llavanext_cli.records import Medium, Sample

OPEN, CLOSE = "<|reserved_special_token_3|>", "<|reserved_special_token_4|>"


def as_the_original(records: list[dict], folder: str) -> str:
    """The original's loop, for files that all exist."""
    samples = []
    for record in copy.deepcopy(records):
        conversation = record["conversations"]
        named = record.get("image") or record.get("video") or []
        named = named if isinstance(named, list) else [named]
        tags = "".join(f"{OPEN}{folder}/{path}{CLOSE}" for path in named) or OPEN + CLOSE
        conversation[0]["value"] = tags + conversation[0]["value"]
        for turn in conversation:
            if OPEN not in turn["value"]:
                turn["value"] = "<text>" + turn["value"]
        samples.append({"conversations": conversation})
    return json.dumps(samples, indent=2, ensure_ascii=False)


turn = st.fixed_dictionaries(
    {"from": st.sampled_from(["human", "gpt"]), "value": st.text(max_size=20)},
    optional={"weight": st.integers(0, 9), "note": st.lists(st.text(max_size=3), max_size=2), "meta": st.just({})},
)
record = st.fixed_dictionaries(
    {"conversations": st.lists(turn, min_size=1, max_size=4)},
    optional={"image": st.sampled_from(["a.jpg", ["a.jpg", "b/c.jpg"]]), "id": st.integers()},
)


@given(st.lists(record, min_size=1, max_size=4))
def test_byte_for_byte(records):
    parts = []
    for record in records:
        paths = [record["image"]] if isinstance(record.get("image"), str) else record.get("image", [])
        sample = Sample("", "", tuple(Medium("image", path) for path in paths), ())
        parts.append(encode([json.dumps(record).encode()], [sample], "/data/images/").decode())
    assert OPENING + BETWEEN.join(parts) + CLOSING == as_the_original(records, "/data/images")


def read(*said: str, first: str = "human"):
    names = ("human", "gpt") if first == "human" else ("gpt", "human")
    turns = [{"from": names[number % 2], "value": text} for number, text in enumerate(said)]
    return decode({"conversations": turns}, "f.json, line 3", 5)


def test_read_back_an_image():
    sample = read(f"{OPEN}/d/a.jpg{CLOSE}<image>\nWhat?", "<text>A cat.", "<text>And?", "<text>No <text>.")
    assert [(medium.kind, medium.path) for medium in sample.media] == [("image", "/d/a.jpg")]
    assert [turn.text for turn in sample.turns] == ["<image>\nWhat?", "A cat.", "And?", "No <text>."]
    assert (sample.id, sample.source) == ("5", "")


def test_read_back_a_video_whatever_the_case_of_its_name():
    sample = read(f"{OPEN}/d/a.MP4{CLOSE}What?\n<image>", "<text>A cat.")
    assert sample.media[0].kind == "video"
    assert sample.turns[0].text == "What?\n<video>"


def test_read_back_text():
    sample = read(f"{OPEN}{CLOSE}Hello?", "<text>Hello.")
    assert sample.media == () and sample.turns[0].text == "Hello?"
    assert read(f"{OPEN}{CLOSE}Hi", "<text>q", "<text>a", first="gpt").turns[0].text == "q"


def test_tags_without_a_placeholder_place_the_media():
    sample = read(f"{OPEN}a.jpg{CLOSE}{OPEN}b.jpg{CLOSE}Same?", "<text>No.")
    assert sample.turns[0].text == "<image><image>\nSame?" and len(sample.media) == 2


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (3, "a record needs a list of conversations"),
        ({"conversations": []}, "a record needs a list of conversations"),
        ({"conversations": [{"from": "human"}]}, "turn 1 needs from (human or gpt) and value"),
        ({"conversations": [{"from": "human", "value": OPEN + CLOSE + "q"}] * 2}, "turn 2 must be the assistant's"),
        ({"conversations": [{"from": "human", "value": OPEN + "a.jpg" + CLOSE + "<image><image>"}]}, "2 placeholders"),
        ({"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>"}]}, "a record of a raw data set"),
    ],
)
def test_refused(data, says):
    with pytest.raises(DataError) as error:
        decode(data, "f.json, line 3", 0)
    assert error.value.what.startswith("f.json, line 3: ") and says in error.value.what
    assert error.value.hint
