"""The prompt as segments: rounds, placeholders, what is supervised, text that looks like control symbols."""

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.processing.prompt import (
    END,
    MEDIUM,
    SYSTEM,
    Segment,
    build_question_prompt,
    build_training_prompt,
    check_placeholders,
)
from llavanext_cli.records import Medium, Sample, Turn

PICTURE, CLIP = Medium("image", "a.jpg"), Medium("video", "a.mp4")


def sample(texts, media=(), sample_id="s1") -> Sample:
    roles = ("user", "assistant")
    return Sample(sample_id, "src", tuple(media), tuple(Turn(roles[i % 2], text) for i, text in enumerate(texts)))


def written(segments: list[Segment]) -> str:
    return "".join({MEDIUM: f"[{s.medium}]", END: "</s>"}.get(s.kind, s.text) for s in segments)


def supervised(segments: list[Segment]) -> str:
    return written([s for s in segments if s.supervised])


ROUNDS = ["q1", "a1", "q2", "a2"]
MISTRAL = ["<image>\nq1", *ROUNDS[1:]]
IN_TRAINING = {  # what is tested: turns, media, the prompt after "USER: "
    "two rounds": (ROUNDS, [], "q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"),
    "already in place": (["<image>\n  What?  ", "a"], [PICTURE], "[0]\n  What?   ASSISTANT: a</s>"),
    "several keep their places": (
        ["First <image> and\n<image> then?", "a"],
        [PICTURE, PICTURE],
        "First [0] and\n[1] then? ASSISTANT: a</s>",
    ),
    "an image in a later turn": (
        ["<image>\nq1", "a1", "q2 <image>", "a2"],
        [PICTURE, PICTURE],
        "[0]\nq1 ASSISTANT: a1</s>USER: [1]\nq2 ASSISTANT: a2</s>",
    ),
    "a video named an image": (["<image>\nq", "a"], [CLIP], "[0]\nq ASSISTANT: a</s>"),
    "a video named a video": (["<video>\nq", "a"], [CLIP], "[0]\nq ASSISTANT: a</s>"),
    "both in order": (["<image> or <video>?", "a"], [PICTURE, CLIP], "[0] or [1]? ASSISTANT: a</s>"),
    "an empty answer": (["q", ""], [], "q ASSISTANT:</s>"),
    "tags without media": (
        ["How do I close a <video> tag, or an <image> one?", "So."],
        [],
        "How do I close a <video> tag, or an <image> one? ASSISTANT: So.</s>",
    ),
    "a tag beside an image": (
        ["<image>\nIs this a <video> tag?", "Yes."],
        [PICTURE],
        "[0]\nIs this a <video> tag? ASSISTANT: Yes.</s>",
    ),
}
PLACES = ["<image>\nWhat?", "What?\n<image>", "<image> What?", "<image>What?", "What? <image>  ", " <image>\nWhat?"]
IN_TRAINING |= {repr(text): ([text, "a"], [PICTURE], "[0]\nWhat? ASSISTANT: a</s>") for text in PLACES}


@pytest.mark.parametrize("name", IN_TRAINING)
def test_a_training_prompt(name):
    texts, media, prompt = IN_TRAINING[name]
    segments = build_training_prompt(sample(texts, media))
    assert written(segments) == f"{SYSTEM} USER: {prompt}"
    assert supervised(segments) == "".join(f" {answer}</s>" if answer else "</s>" for answer in texts[1::2])
    assert check_placeholders(sample(texts, media)) is None


@pytest.mark.parametrize(
    ("texts", "media", "prompt"),
    [
        (ROUNDS[:3], [], "q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"),
        (["compare", "ok", "again"], [PICTURE, CLIP], "[0]\n[1]\ncompare ASSISTANT: ok</s>USER: again ASSISTANT:"),
        (["  what?"], [CLIP], "[0]\n  what? ASSISTANT:"),
    ],
)
def test_a_question_ends_where_the_model_answers(texts, media, prompt):
    assert written(build_question_prompt(sample(texts, media))) == f"{SYSTEM} USER: {prompt}"


def test_the_system_text_is_the_one_the_model_was_trained_with():
    assert SYSTEM.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert SYSTEM.endswith("polite answers to the user's questions.")


def test_two_rounds_with_mistral():
    form = "mistral_instruct"
    segments = build_training_prompt(sample(MISTRAL, [PICTURE]), form)
    assert written(segments) == "[INST] [0]\nq1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>"
    assert supervised(segments) == " a1 </s> a2 </s>"
    asked = build_question_prompt(sample(MISTRAL[:3], [PICTURE]), form)
    assert written(asked) == "[INST] [0]\nq1 [/INST] a1 </s>[INST] q2 [/INST]"
    assert written(build_training_prompt(sample(["q", ""]), form)) == "[INST] q [/INST]</s>"


def test_an_answer_may_hold_control_words():
    answer = "Type </s>, then ASSISTANT: and USER: or <image>."
    segments = build_training_prompt(sample(["<image>\nHow?", answer, "q", "a"], [PICTURE]))
    assert supervised(segments) == f" {answer}</s> a</s>"
    assert sum(s.kind == END for s in segments) == 2
    assert sum(s.kind == MEDIUM for s in segments) == 1


@pytest.mark.parametrize(
    ("texts", "media", "has", "wants"),
    [
        (["<image>\n<image>\nq", "a"], [PICTURE], 2, 1),
        (["q", "a"], [PICTURE], 0, 1),
        (["<image>\nq", "a"], [PICTURE, PICTURE], 1, 2),
        (["<image>\nq", "a"], [], 1, 0),
        (["q\n<image>", "a"], [], 1, 0),
        (["<image>\nq", "<image>"], [PICTURE, PICTURE], 1, 2),
    ],
)
def test_placeholders_and_media_must_match(texts, media, has, wants):
    broken = sample(texts, media, "row-7")
    with pytest.raises(DataError) as caught:
        build_training_prompt(broken)
    assert "row-7" in caught.value.what
    assert f": {has} placeholder" in caught.value.what
    assert f"for {wants} file" in caught.value.what
    assert check_placeholders(broken) == caught.value.what


def test_a_question_with_too_few_placeholders():
    with pytest.raises(DataError, match=r"1 placeholder .* for 2 files"):
        build_question_prompt(sample(["<image> what?"], [PICTURE, PICTURE], ""))


def test_a_video_placeholder_on_an_image():
    with pytest.raises(DataError, match="placeholder 1 is <video>, but file 1 is an image"):
        build_training_prompt(sample(["<video> <image>", "a"], [PICTURE, CLIP]))


@pytest.mark.parametrize(
    ("build", "texts"),
    [(build_training_prompt, ["q"]), (build_question_prompt, ["q", "a"]), (build_training_prompt, [])],
)
def test_the_last_turn_must_be_the_right_side(build, texts):
    with pytest.raises(DataError, match="sample s1: the conversation does not end with"):
        build(sample(texts))
