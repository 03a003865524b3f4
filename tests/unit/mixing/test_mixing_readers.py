"""Records to samples: what is kept, what is corrected, and what is rejected for which reason."""

from __future__ import annotations

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llavanext_cli.mixing.readers import BadRecordError, Record, decode_records, locate_rejects, read_record
from llavanext_cli.processing.prompt import check_placeholders
from llavanext_cli.records import build_sample


def talk(*texts: str, first: str = "human") -> list[dict]:
    names = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": names[number % 2], "value": text} for number, text in enumerate(texts)]


def convert(record: object, root: str = "/data/") -> dict:
    """One record through the whole path, to the dictionary that a line of the output holds."""
    data = json.dumps(record).encode()
    (found,) = decode_records(data, False, range(1))
    return json.loads(msgspec.json.encode(read_record(found, root, "s", 7)))


def reason_of(record: object, root: str = "/data/") -> str:
    with pytest.raises(BadRecordError) as error:
        convert(record, root)
    assert error.value.detail
    return error.value.reason


def test_an_image():
    sample = convert({"id": "a1", "image": "coco/7.jpg", "conversations": talk("<image>\nWhat?", "A cat.")})
    assert sample == {
        "id": "a1",
        "source": "s",
        "media": [{"kind": "image", "path": "coco/7.jpg"}],
        "turns": [{"role": "user", "text": "<image>\nWhat?"}, {"role": "assistant", "text": "A cat."}],
    }


def test_a_video_gets_its_own_placeholder():
    sample = convert(
        {"id": 3, "video": "x/a.mp4", "conversations": talk("<image>\nWho?", "<image> is a tag.", "And?", "B")}
    )
    assert sample["media"] == [{"kind": "video", "path": "x/a.mp4"}]
    assert [turn["text"] for turn in sample["turns"]] == ["<video>\nWho?", "<image> is a tag.", "And?", "B"]
    assert sample["id"] == "3"


def test_text_only_and_a_leading_answer():
    sample = convert({"model": "", "conversations": talk("Hello!", "Who?", "Me.", first="gpt")})
    assert sample["media"] == []
    assert sample["turns"] == [{"role": "user", "text": "Who?"}, {"role": "assistant", "text": "Me."}]
    assert sample["id"] == "7", "a record without an id is known by its number"
    assert convert({"image": None, "id": 0, "conversations": talk("q", "a")})["id"] == "0"


def test_other_names_of_the_speakers():
    said = [{"from": "user", "value": "q"}, {"from": "assistant", "value": "a"}]
    assert [turn["role"] for turn in convert({"conversations": said})["turns"]] == ["user", "assistant"]


def test_a_very_long_talk():
    texts = [f"turn {number}" for number in range(1000)]
    assert [turn["text"] for turn in convert({"conversations": talk(*texts)})["turns"]] == texts


def test_several_images():
    sample = convert({"image": ["a.jpg", "b.jpg"], "conversations": talk("<image><image> Same?", "No.")})
    assert [medium["path"] for medium in sample["media"]] == ["a.jpg", "b.jpg"]


def test_an_image_and_a_video_come_in_the_order_of_their_placeholders():
    record = {"image": "a.jpg", "video": "b.mp4", "conversations": talk("<video> then <image>?", "Yes.")}
    assert [medium["kind"] for medium in convert(record)["media"]] == ["video", "image"]
    record["conversations"] = talk("<image> then <image>?", "Yes.")
    assert reason_of(record) == "placeholders"


def test_words_that_only_look_like_placeholders():
    """Without media, `<image>` within a sentence is plain text; processing decides that."""
    assert convert({"conversations": talk("What does <image> mean in SVG?", "<image> embeds one.")})["media"] == []
    record = {"image": "a.jpg", "conversations": talk("<image>\nIs <video> a tag?", "Yes.")}
    assert convert(record)["turns"][0]["text"] == "<image>\nIs <video> a tag?"


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (3, "not_a_record"),
        ("text", "not_a_record"),
        (None, "not_a_record"),
        ([], "not_a_record"),
        ({}, "not_a_record"),
        ({"conversations": "hello"}, "not_a_record"),
        ({"conversations": [{"from": "human"}]}, "not_a_record"),
        ({"conversations": [{"from": "human", "value": 3}]}, "not_a_record"),
        ({"image": 3, "conversations": talk("<image>", "a")}, "not_a_record"),
        ({"conversations": []}, "no_answer"),
        ({"conversations": talk("q")}, "no_answer"),
        ({"conversations": talk("a", first="gpt")}, "no_answer"),
        ({"conversations": talk("q", "a", "q")}, "no_answer"),
        ({"conversations": talk("q", "")}, "empty_answer"),
        ({"conversations": talk("q", " \n\u3000")}, "empty_answer"),
        ({"conversations": talk("q", "a", " ", "a")}, "empty_question"),
        ({"conversations": [*talk("q", "a"), *talk("a", first="gpt")]}, "speakers"),
        ({"conversations": [*talk("q"), *talk("q", "a")]}, "speakers"),
        ({"conversations": [{"from": "system", "value": "x"}, *talk("q", "a")]}, "speakers"),
        ({"image": "a.jpg", "conversations": talk("What?", "A.")}, "placeholders"),
        ({"image": "a.jpg", "conversations": talk("<image><image>", "A.")}, "placeholders"),
        ({"image": ["a.jpg", "b.jpg"], "conversations": talk("<image>", "A.")}, "placeholders"),
        ({"image": "a.jpg", "conversations": talk("<video>\nWhat?", "A.")}, "placeholders"),
        ({"video": "a.mp4", "conversations": talk("What?", "A <image>.")}, "placeholders"),
        ({"conversations": talk("<image>\nWhat?", "A.")}, "placeholders"),
        ({"image": "../../etc/passwd", "conversations": talk("<image>", "a")}, "outside_root"),
        ({"image": "/etc/passwd", "conversations": talk("<image>", "a")}, "outside_root"),
        ({"image": "a/../../b.jpg", "conversations": talk("<image>", "a")}, "outside_root"),
        ({"image": "/data2/b.jpg", "conversations": talk("<image>", "a")}, "outside_root"),
        ({"image": ["a.jpg", ""], "conversations": talk("<image><image>", "a")}, "bad_path"),
        ({"image": "a\0.jpg", "conversations": talk("<image>", "a")}, "bad_path"),
    ],
)
def test_rejected(record, reason):
    assert reason_of(record) == reason


@pytest.mark.parametrize(
    ("path", "kept"),
    [
        ("./a.jpg", "a.jpg"),
        ("b/../a.jpg", "a.jpg"),
        ("/data/a.jpg", "a.jpg"),
        ("a..b.jpg", "a..b.jpg"),
        (".a.jpg", ".a.jpg"),
    ],
)
def test_odd_paths_inside_the_root(path, kept):
    sample = convert({"image": path, "conversations": talk("<image>", "a")})
    assert sample["media"][0]["path"] == kept


def test_a_text_that_is_not_unicode():
    data = b'{"id": 1, "conversations": [{"from": "human", "value": "\\ud800"}, {"from": "gpt", "value": "a"}]}'
    (found,) = decode_records(data, False, range(1))
    assert isinstance(found, BadRecordError) and found.reason == "not_unicode"
    (found,) = decode_records(b'{"conversations": [{"from": "human", "value": "\xff"}]}', False, range(1))
    assert isinstance(found, BadRecordError) and found.reason == "not_unicode"


def test_one_bad_record_does_not_spoil_others():
    good = {"id": 1, "conversations": talk("q", "a")}
    data = json.dumps([good, 5, good, {"id": "bad"}, good])[1:-1].encode()
    found = decode_records(data, False, range(5))
    assert [isinstance(record, Record) for record in found] == [True, False, True, False, True]
    rejects = locate_rejects(data, False, 100, 9, [(n, r.reason, r.detail) for n, r in enumerate(found) if n in (1, 3)])
    assert [(reject.number, reject.line, reject.id) for reject in rejects] == [(101, 9, ""), (103, 9, "bad")]
    assert "conversations" in rejects[1].detail


@pytest.mark.parametrize("lines", [False, True])
@pytest.mark.parametrize("chosen", [[0, 1, 2, 3], [1, 2], [0, 3], [3], []])
def test_only_the_chosen_records_are_decoded(lines, chosen):
    data = (b"\n" if lines else b",").join(
        json.dumps({"id": number, "conversations": talk("q", "a")}).encode() for number in range(4)
    )
    assert [record.id for record in decode_records(data, lines, chosen)] == chosen


texts = st.one_of(
    st.text(min_size=1, max_size=30).filter(lambda text: not text.isspace()),
    st.sampled_from(
        ['{"from":"human","value":"', '\\"role":"user"', "<image>", "<video>", '"},{"from":"gpt","value":"']
    ),
)


@given(said=st.lists(texts, min_size=2, max_size=6).filter(lambda said: len(said) % 2 == 0), images=st.integers(0, 2))
def test_the_line_is_what_the_contract_says(said, images):
    """The plain and the general reader give the same samples, which processing accepts."""
    record = {"id": "x", "image": [f"{n}.jpg" for n in range(images)], "conversations": talk(*said)}
    try:
        line = convert(record)
    except BadRecordError as error:
        assert error.reason == "placeholders"
        return
    sample = build_sample(line, "here")
    assert msgspec.json.decode(msgspec.json.encode(sample)) == line
    assert [turn.text for turn in sample.turns] == said
    assert check_placeholders(sample) is None
