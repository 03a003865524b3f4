"""`ask --chat`: three turns equal the same conversation from scratch, and only what is new is computed."""

from dataclasses import replace
from pathlib import Path

import pytest

from llavanext_cli.config.presets import load_preset
from llavanext_cli.errors import DataError
from llavanext_cli.inference.chat import Chat
from llavanext_cli.inference.inputs import read_inputs
from llavanext_cli.inference.sampling import Sampling
from llavanext_cli.mixing.samples import read_samples
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.records import Turn
from llavanext_cli.weights.checkpoint import open_checkpoint

SETTINGS = ["ask.cache_tokens=512", "data.frames=8", "runtime.threads=2"]


@pytest.fixture(scope="module")
def chat(mindspore_cpu, tiny_checkpoint) -> Chat:
    from llavanext_cli.inference.session import Session

    opened = open_checkpoint(tiny_checkpoint)
    preset = load_preset("tiny-ask", SETTINGS)
    session = Session(opened, preset, mindspore_cpu, cache_step=512)
    processor = Processor(opened.architecture, load_tokenizer(opened.folder), frames=preset.data.frames)
    return Chat(session, processor, preset, Sampling(max_new_tokens=8))


@pytest.fixture(autouse=True)
def new_conversation(request):
    if "chat" in request.fixturenames:
        chat = request.getfixturevalue("chat")
        chat.clear()
        chat.sampling = Sampling(max_new_tokens=8)
        chat.session.cached = None


def test_three_turns_equal_the_conversation_from_scratch(chat, media):
    chat.add("image", str(media / "1.png"))
    answers = [chat.ask("what is it?")]
    cached = chat.session.cached[1]
    answers.append(chat.ask("and?"))
    chat.add("image", str(media / "4.png"))
    answers.append(chat.ask("how many?"))
    assert answers[0].cached_tokens == 0
    # everything before the first difference between what was generated and what its text encodes to
    assert answers[1].cached_tokens >= answers[0].prompt_tokens
    assert answers[1].cached_tokens <= len(cached)
    assert answers[2].cached_tokens >= answers[1].prompt_tokens
    assert (answers[2].tiles, answers[2].media_tokens) == (
        len(chat.loaded[0].media.tiles) + len(chat.loaded[1].media.tiles),
        sum(plan.tokens for one in chat.loaded for plan in one.media.plans),
    )

    for number, answer in enumerate(answers):
        turns = chat.turns[: 2 * number + 1]
        loaded = chat.loaded[: 1 if number < 2 else 2]
        chat.session.cached = None
        scratch = chat.session.answer([chat.encode(turns, loaded)], chat.sampling)[0]
        assert scratch.cached_tokens == 0
        assert scratch.tokens == answer.tokens
        assert scratch.text == answer.text


def test_another_image_is_not_mistaken_for_the_cached_one(chat, media):
    chat.add("image", str(media / "4.png"))
    first = chat.ask("what is it?")
    assert chat.undo() == "removed; questions left: 0"
    assert chat.turns == () and chat.loaded == ()
    chat.add("image", str(media / "4.png"))
    loaded = chat.staged[0]
    changed = replace(loaded, media=replace(loaded.media, tiles=255 - loaded.media.tiles))
    chat.staged = (changed,)
    assert chat.ask("what is it?").cached_tokens == 0
    chat.clear()
    chat.add("image", str(media / "4.png"))
    assert chat.ask("what is it?").tokens == first.tokens


def test_undo_removes_the_media_of_its_turn_whatever_the_words_are(chat, media):
    chat.add("image", str(media / "4.png"))
    chat.ask("what is it?")
    chat.add("image", str(media / "1.png"))
    chat.ask("what does the <video> tag do?")  # a word, as there are only images
    assert chat.turns[2].text == "<image>\nwhat does the <video> tag do?"
    chat.ask("and <video>, once more?")
    chat.undo()
    assert len(chat.loaded) == 2
    chat.undo()
    assert [Path(one.medium.path).name for one in chat.loaded] == ["4.png"]
    chat.undo()
    assert chat.loaded == chat.turns == chat.before == ()


def test_placeholders_give_the_order_of_what_was_staged(chat, media):
    chat.add("video", str(media / "clip.mp4"))
    chat.add("image", str(media / "4.png"))
    chat.ask("is <image> in <video>?")
    assert chat.turns[0].text == "is <image> in <video>?"
    assert [one.medium.kind for one in chat.loaded] == ["image", "video"]


def test_a_saved_conversation_finds_its_media_from_everywhere(chat, media, tmp_path, monkeypatch):
    monkeypatch.chdir(media)
    chat.add("image", "4.png")
    chat.ask("what is it?")
    chat.save(str(tmp_path / "talk.jsonl"))
    monkeypatch.chdir(tmp_path)
    file = read_samples(tmp_path / "talk.jsonl")
    chat.processor.encode(file[0], file.roots)
    (item,) = read_inputs(tmp_path / "talk.jsonl", None).items
    assert item.sample.media[0].path == str(media / "4.png")


def test_the_same_seed_gives_the_same_answer(chat):
    chat.run_command("/set temperature 1.5")
    chat.run_command("/set seed 3")
    first = chat.ask("what is it?").tokens
    chat.run_command("/undo")
    assert chat.ask("what is it?").tokens == first
    chat.run_command("/undo")
    chat.run_command("/set seed 4")
    assert chat.ask("what is it?").tokens != first


def test_commands(chat, tmp_path, media):
    assert "/undo" in chat.run_command("/help")
    assert "added to the next question" in chat.run_command(f"/video '{media / 'clip.mp4'}'")
    chat.turns = (Turn("user", "a"), Turn("assistant", "b"))
    chat.run_command(f"/save {tmp_path / 'talk.json'}")
    assert '"text":"b"' in (tmp_path / "talk.json").read_text()
    for line, expected in (
        (f"/save {tmp_path / 'talk.json'}", "already exists"),
        ("/image", "takes 1 argument"),
        ("/image gone.png", "gone.png"),
        ("/dance", "unknown command"),
        ("/set temperature warm", "cannot be warm"),
        ("/set temperature -1", "cannot be -1"),
        ("/set colour 1", "unknown setting"),
        ("/image 'a", "closing quotation"),
    ):
        with pytest.raises(DataError, match="(?i)" + expected):
            chat.run_command(line)
    assert Path(tmp_path / "talk.json").exists()


def test_a_conversation_that_outgrows_the_cache(chat):
    chat.turns = (Turn("user", "what " * 600), Turn("assistant", "no"))
    with pytest.raises(DataError) as fault:
        chat.ask("and?")
    assert "/clear" in fault.value.hint
    assert len(chat.turns) == 2


def test_an_answer_that_fills_the_cache_ends_there(chat):
    chat.sampling = Sampling(max_new_tokens=4000)
    answer = chat.ask("what " * 380)
    assert answer.finish == "length"
    assert answer.prompt_tokens + len(answer.tokens) == chat.session.cache_tokens + 1  # the last one is not fed back
    with pytest.raises(DataError, match="tokens, media included, but at most 511 fit"):
        chat.ask("and?")
    assert len(chat.turns) == 2
