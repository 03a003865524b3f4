"""Text as it comes: whole characters, and stop strings that are never half written."""

import pytest

from llavanext_cli.inference.streaming import TextStreamer
from llavanext_cli.processing.tokenizer import load_tokenizer


@pytest.fixture
def tokenizer(make_tokenizer_folder):
    return load_tokenizer(make_tokenizer_folder())


def written(tokenizer, text: str, stop=()) -> tuple[list[str], str, bool]:
    pieces: list[str] = []
    streamer = TextStreamer(tokenizer, stop, pieces.append)
    stopped = any(streamer.push(token) for token in tokenizer.encode(text, first=True))
    return pieces, streamer.close(), stopped


def test_no_half_characters(tokenizer):
    pieces, text, stopped = written(tokenizer, "a ☃ and 😀 é")
    assert text == "".join(pieces) == "a ☃ and 😀 é"
    assert not any("\ufffd" in piece for piece in pieces)
    assert not stopped


@pytest.mark.parametrize("stop", [("mat",), ("zzz", "the mat"), ("e m",)])
def test_a_stop_string_ends_and_is_left_out(tokenizer, stop):
    pieces, text, stopped = written(tokenizer, "a cat on the mat, and a ball", stop)
    assert stopped
    whole = "a cat on the mat, and a ball"
    assert text == "".join(pieces) == whole[: min(whole.find(s) for s in stop if s in whole)]


def test_what_only_began_like_a_stop_string_is_written(tokenizer):
    pieces, text, stopped = written(tokenizer, "the mat", ("matter",))
    assert not stopped
    assert text == "".join(pieces) == "the mat"
