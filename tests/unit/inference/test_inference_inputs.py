"""What a batch takes from a folder, and that every line that is refused says what to do."""

from __future__ import annotations

from pathlib import Path

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.inference.inputs import _to_sample, read_inputs


def test_a_folder_gives_every_picture_and_clip_that_mix_and_train_take(tmp_path):
    kinds = {
        **{name: "image" for name in ("a.avif", "b.jp2", "c.ppm", "d.GIF", "e.jfif")},
        **{name: "video" for name in ("f.ts", "g.3gp", "h.ogv", "i.MTS", "j.vob")},
    }
    for name in (*kinds, "notes.txt"):
        (tmp_path / name).write_bytes(b"x")
    inputs = read_inputs(tmp_path, "what?")
    assert {item.id: item.sample.media[0].kind for item in inputs.items} == kinds
    assert inputs.skipped == 1


def test_a_folder_without_media_names_the_endings(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(DataError, match="no pictures or clips") as caught:
        read_inputs(tmp_path, "what?")
    assert ".avif" in caught.value.hint and ".mkv" in caught.value.hint


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ({"question": 3}, "question must be text"),
        ({"question": " "}, "the question is empty"),
        ({"question": "what?", "picture": "a.jpg"}, "unknown key 'picture'; known are id, image, images, question,"),
        ({"question": "what?", "image": 3}, "image must be a path or a list of paths"),
    ],
)
def test_a_line_that_is_refused_says_how_one_looks(line, says):
    with pytest.raises(DataError) as caught:
        _to_sample(line, "q.jsonl, line 2", Path("/data"))
    assert caught.value.what.startswith("q.jsonl, line 2: ") and says in caught.value.what
    assert '"question": "What is it?"' in caught.value.hint
