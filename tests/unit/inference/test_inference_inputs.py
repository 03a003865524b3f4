"""What a batch reads from a file or a folder, and what it says about a line that it cannot use."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.inference.inputs import read_inputs


def read_lines(folder: Path, *lines: str):
    path = folder / "q.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    return read_inputs(path, None)


def test_a_folder_gives_every_image_and_video_that_mix_and_train_read(tmp_path):
    kinds = {
        **{name: "image" for name in ("a.avif", "b.jp2", "c.ppm", "d.GIF", "deep/c.webp", "e.jfif")},
        **{name: "video" for name in ("f.ts", "g.3gp", "h.ogv", "i.MTS", "j.vob")},
    }
    for name in (*kinds, "notes.txt", ".hidden.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inputs = read_inputs(tmp_path, "what?")
    assert {item.id: item.sample.media[0].kind for item in inputs.items} == kinds
    assert [item.id for item in inputs.items] == sorted(kinds)
    assert inputs.skipped == 1


def test_a_folder_needs_a_question_and_media(tmp_path):
    with pytest.raises(DataError, match="a folder needs a question"):
        read_inputs(tmp_path, None)
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="no images or videos") as caught:
        read_inputs(tmp_path, "what?")
    assert ".avif" in caught.value.hint and ".mkv" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": 3}, "question must be text"),
        ({"question": " "}, "the question is empty"),
        ({"question": "what?", "photo": "a.jpg"}, "unknown key 'photo'; known keys: id, image, images, question,"),
        ({"question": "what?", "image": 3}, "image must be a path or a list of paths"),
    ],
)
def test_a_line_that_cannot_be_used_is_an_error_of_its_own(tmp_path, line, says):
    good, bad = read_lines(tmp_path, '{"question": "what?"}', json.dumps(line)).items
    assert good.sample and not good.error
    assert bad.error.startswith("q.jsonl, line 2: ") and says in bad.error


def test_a_file_without_questions_says_how_a_line_looks(tmp_path):
    for lines, what in (((), "the file has no questions"), (("a", "b"), "no line is valid JSON")):
        with pytest.raises(DataError, match=what) as caught:
            read_lines(tmp_path, *lines)
        assert '"question": "What is it?"' in caught.value.hint


def test_a_byte_order_mark_is_skipped(tmp_path):
    assert read_lines(tmp_path, '\ufeff{"question": "what?"}').items[0].sample.turns[0].text == "what?"


@pytest.mark.parametrize("roots", [["images"], {"m": 7}, "images"])
def test_invalid_roots(tmp_path, roots):
    header = json.dumps({"llavanext_mix": 1, "roots": roots})
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: roots must name a folder for each source"):
        read_lines(tmp_path, header, '{"question": "what?"}')


def test_a_device_is_not_a_file_of_questions():
    with pytest.raises(DataError, match="/dev/zero is a device, not a file"):
        read_inputs(Path("/dev/zero"), None)


def test_media_of_a_line_are_beside_its_file_in_the_order_of_the_placeholders(tmp_path):
    lines = (
        '{"question": "what?", "images": ["a.jpg", "b.jpg"], "video": "c.mp4"}',
        '{"question": "<video> or <image>?", "image": "a.jpg", "video": "c.mp4"}',
    )
    first, second = (item.sample.media for item in read_lines(tmp_path, *lines).items)
    assert [(m.kind, m.path) for m in first] == [
        ("image", str(tmp_path / "a.jpg")),
        ("image", str(tmp_path / "b.jpg")),
        ("video", str(tmp_path / "c.mp4")),
    ]
    assert [m.kind for m in second] == ["video", "image"]
