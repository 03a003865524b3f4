"""Tokenizer folders: what is read, what is refused, and decoding that never shows half a character."""

import json
import os
import pickle

import pytest

from llavanext_cli.errors import CheckpointError
from llavanext_cli.processing.tokenizer import load_tokenizer
from tests.conftest import train_sentencepiece

TEXTS = ["what is it?", "héllo wörld", "emoji 🐈‍⬛ and 漢字", "  two  spaces  ", "line\nbreak\ttab", "1234 5.6", "a\0b"]


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_text_survives(make_tokenizer_folder, legacy, text):
    tokenizer = load_tokenizer(make_tokenizer_folder(legacy))
    assert tokenizer.decode(tokenizer.encode(text, first=True)) == text


def test_the_space_before_a_stretch(make_tokenizer_folder):
    new, old = load_tokenizer(make_tokenizer_folder(False)), load_tokenizer(make_tokenizer_folder(True))
    assert new.encode("USER: a") != new.encode("USER: a", first=True)
    assert new.encode("USER: a", first=True) == old.encode("USER: a") == old.encode("USER: a", first=True)
    assert new.encode("USER: a") == new.encode_more("USER: a") == old.encode_more("USER: a")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"model_type": "unigram"},
        {"remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
        {"model_type": "unigram", "remove_extra_whitespaces": True, "normalization_rule_name": "nmt_nfkc"},
    ],
)
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("answer", ["a grey cat.", "  a cat", "\nthree", "½ ﬁne", "🐈", " ", "a cat  "])
def test_cutting_before_the_answer_changes_no_id(make_tokenizer_folder, options, legacy, answer):
    tokenizer = load_tokenizer(make_tokenizer_folder(legacy, train_sentencepiece(vocab_size=400, **options)))
    head = "what is it? ASSISTANT:"
    assert tokenizer.encode(head) + tokenizer.encode_more(" " + answer) == tokenizer.encode(f"{head} {answer}")


@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("text", ["</s>", "<s>a", "a <image> b", "<unk>", "x</s>y<video>"])
def test_text_never_becomes_a_control_id(make_tokenizer_folder, legacy, text):
    # the second model makes <image> and <video> out of text by itself
    for model in (None, train_sentencepiece(user_defined_symbols=["<image>", "<video>"])):
        folder = make_tokenizer_folder(legacy, model, name="plain" if model is None else "defined")
        if model:
            (folder / "added_tokens.json").unlink()
        tokenizer = load_tokenizer(folder)
        assert len(tokenizer.added) == 2
        ids = tokenizer.encode(text, first=True)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


def test_a_lone_surrogate_is_no_traceback(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder())
    assert tokenizer.decode(tokenizer.encode("a\ud83d b", first=True)) == "a\ufffd b"
    assert tokenizer.decode(tokenizer.encode("\ud83d\udc08", first=True)) == "🐈"


def test_streaming_holds_back_half_characters(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder())
    ids = tokenizer.encode("a 🐈 漢.", first=True)
    stream = tokenizer.stream()
    parts = [stream.push(token) for token in ids]
    assert "".join(parts) == "a 🐈 漢."
    assert not any("\ufffd" in part for part in parts)
    assert stream.flush() == ""
    assert "🐈" in parts  # whole, from its fourth byte


def test_an_unfinished_character_is_marked(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder())
    ids = tokenizer.encode("a🐈", first=True)
    assert tokenizer.decode(ids[:-1]) == "a\ufffd"


def test_special_ids_are_left_out(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder())
    ids = [tokenizer.bos_id, *tokenizer.encode("a cat", first=True), tokenizer.added["<image>"], tokenizer.eos_id]
    assert tokenizer.decode(ids) == "a cat"
    assert tokenizer.decode([tokenizer.size + 5]) == ""  # rows of the embedding that no token uses


def test_what_a_folder_says(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder(None))
    assert tokenizer.legacy is True  # transformers' default
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.special_ids == {0, 1, 2, *tokenizer.added.values()}  # 0: unknown, and padding
    assert tokenizer.add_bos
    assert tokenizer.size == tokenizer.added["<image>"] + 1
    other = load_tokenizer(
        make_tokenizer_folder(
            name="other",
            add_bos_token=False,
            bos_token={"content": "<s>", "special": True},
            pad_token="<pad>",
            added_tokens_decoder={"600": {"content": "<pad>", "special": True}},
        )
    )
    assert not other.add_bos
    assert 600 in other.special_ids


def test_it_travels_to_other_processes(make_tokenizer_folder):
    tokenizer = load_tokenizer(make_tokenizer_folder())
    ids = tokenizer.encode("what is it?", first=True)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert copy.encode("what is it?", first=True) == ids
    assert copy.decode(ids) == "what is it?"


def test_folders_that_are_refused(make_tokenizer_folder, tmp_path):
    folder = make_tokenizer_folder()
    (folder / "tokenizer_config.json").write_text("{broken")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="expected a JSON object, not list"):
        load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    with pytest.raises(CheckpointError, match=r"eos_token '<\|end\|>'") as caught:
        load_tokenizer(folder)
    assert caught.value.hint
    (folder / "tokenizer.model").write_bytes(b"<html>not found</html>")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        load_tokenizer(folder)
    (folder / "tokenizer.model").write_bytes(b"")
    with pytest.raises(CheckpointError, match="not a SentencePiece model"):
        load_tokenizer(folder)
    os.truncate(folder / "tokenizer.model", 3_000_000_000)  # takes no room
    with pytest.raises(CheckpointError, match="more than 67108864 bytes"):
        load_tokenizer(folder)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is missing") as caught:
        load_tokenizer(tmp_path)
    assert "tokenizer.json alone" in caught.value.hint


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("added_tokens.json", {"<image>": "many"}),
        ("added_tokens.json", {"<image>": None}),
        ("added_tokens.json", {"<image>": -1}),
        ("added_tokens.json", {"<image>": float("inf")}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {"content": "<image>"}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": {}}}),
        ("tokenizer_config.json", {"added_tokens_decoder": {"7": "<image>"}}),
        ("tokenizer_config.json", {"added_tokens_decoder": [1]}),
    ],
)
def test_added_tokens_that_are_none(make_tokenizer_folder, file, content):
    folder = make_tokenizer_folder()
    (folder / file).write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match="invalid added tokens") as caught:
        load_tokenizer(folder)
    assert "again" in caught.value.hint


@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"])
def test_json_files_are_regular_and_of_a_likely_size(make_tokenizer_folder, file):
    path = make_tokenizer_folder() / file
    path.unlink(missing_ok=True)
    os.mkfifo(path)  # would be waited for
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_tokenizer(path.parent)
    path.unlink()
    path.write_text("{}")
    os.truncate(path, 3_000_000_000)  # takes no room
    with pytest.raises(CheckpointError, match="larger than 16777216 bytes"):
        load_tokenizer(path.parent)
