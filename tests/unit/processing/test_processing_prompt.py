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


def test_two_rounds():
    segments = build_training_prompt(sample(["q1", "a1", "q2", "a2"]))
    assert written(segments) == f"{SYSTEM} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT: a2</s>"
    assert supervised(segments) == " a1</s> a2</s>"


def test_the_system_text_is_the_one_the_model_was_trained_with():
    assert SYSTEM.startswith("A chat between a curious user and an artificial intelligence assistant. ")
    assert SYSTEM.endswith("polite answers to the user's questions.")


def test_a_question_ends_where_the_model_goes_on():
    segments = build_question_prompt(sample(["q1", "a1", "q2"]))
    assert written(segments) == f"{SYSTEM} USER: q1 ASSISTANT: a1</s>USER: q2 ASSISTANT:"


def test_two_rounds_with_mistral():
    form = "mistral_instruct"
    segments = build_training_prompt(sample(["<image>\nq1", "a1", "q2", "a2"], [PICTURE]), form)
    assert written(segments) == "[INST] [0]\nq1 [/INST] a1 </s>[INST] q2 [/INST] a2 </s>"
    assert supervised(segments) == " a1 </s> a2 </s>"
    asked = build_question_prompt(sample(["<image>\nq1", "a1", "q2"], [PICTURE]), form)
    assert written(asked) == "[INST] [0]\nq1 [/INST] a1 </s>[INST] q2 [/INST]"
    assert written(build_training_prompt(sample(["q", ""]), form)) == "[INST] q [/INST]</s>"


@pytest.mark.parametrize(
    "text", ["<image>\nWhat?", "What?\n<image>", "<image> What?", "<image>What?", "What? <image>  ", " <image>\nWhat?"]
)
def test_a_single_placeholder_moves_to_the_front(text):
    segments = build_training_prompt(sample([text, "a"], [PICTURE]))
    assert written(segments) == f"{SYSTEM} USER: [0]\nWhat? ASSISTANT: a</s>"


def test_what_is_already_in_place_is_left_alone():
    segments = build_training_prompt(sample(["<image>\n  What?  ", "a"], [PICTURE]))
    assert written(segments) == f"{SYSTEM} USER: [0]\n  What?   ASSISTANT: a</s>"


def test_several_placeholders_keep_their_places():
    segments = build_training_prompt(sample(["First <image> and\n<image> then?", "a"], [PICTURE, PICTURE]))
    assert written(segments) == f"{SYSTEM} USER: First [0] and\n[1] then? ASSISTANT: a</s>"


def test_an_image_in_a_later_turn():
    segments = build_training_prompt(sample(["<image>\nq1", "a1", "q2 <image>", "a2"], [PICTURE, PICTURE]))
    assert written(segments) == f"{SYSTEM} USER: [0]\nq1 ASSISTANT: a1</s>USER: [1]\nq2 ASSISTANT: a2</s>"


@pytest.mark.parametrize("name", ["<image>", "<video>"])
def test_videos_are_marked_by_either_word(name):
    segments = build_training_prompt(sample([f"{name}\nq", "a"], [CLIP]))
    assert written(segments) == f"{SYSTEM} USER: [0]\nq ASSISTANT: a</s>"


def test_images_and_videos_in_order():
    segments = build_training_prompt(sample(["<image> or <video>?", "a"], [PICTURE, CLIP]))
    assert written(segments) == f"{SYSTEM} USER: [0] or [1]? ASSISTANT: a</s>"


def test_media_that_nothing_names_come_first_when_asking():
    segments = build_question_prompt(sample(["compare", "ok", "again"], [PICTURE, CLIP]))
    assert written(segments) == f"{SYSTEM} USER: [0]\n[1]\ncompare ASSISTANT: ok</s>USER: again ASSISTANT:"
    one = build_question_prompt(sample(["  what?"], [CLIP]))
    assert written(one) == f"{SYSTEM} USER: [0]\n  what? ASSISTANT:"


def test_an_answer_may_hold_control_words():
    answer = "Type </s>, then ASSISTANT: and USER: or <image>."
    segments = build_training_prompt(sample(["<image>\nHow?", answer, "q", "a"], [PICTURE]))
    assert supervised(segments) == f" {answer}</s> a</s>"
    assert sum(s.kind == END for s in segments) == 2
    assert sum(s.kind == MEDIUM for s in segments) == 1


def test_an_empty_answer_is_an_end_alone():
    segments = build_training_prompt(sample(["q", ""]))
    assert supervised(segments) == "</s>"
    assert written(segments).endswith("ASSISTANT:</s>")


def test_talk_about_tags_needs_no_media():
    segments = build_training_prompt(sample(["How do I close a <video> tag, or an <image> one?", "So."]))
    assert "a <video> tag, or an <image> one?" in written(segments)
    images = build_training_prompt(sample(["<image>\nIs this a <video> tag?", "Yes."], [PICTURE]))
    assert "[0]\nIs this a <video> tag?" in written(images)


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
    assert f"{wants} media" in caught.value.what
    assert check_placeholders(broken) == caught.value.what


def test_a_question_with_too_few_placeholders():
    with pytest.raises(DataError, match=r"1 placeholder .* for 2 media"):
        build_question_prompt(sample(["<image> what?"], [PICTURE, PICTURE], ""))


def test_a_video_placeholder_on_an_image():
    with pytest.raises(DataError, match="placeholder 1 is <video>, but medium 1 is an image"):
        build_training_prompt(sample(["<video> <image>", "a"], [PICTURE, CLIP]))


def test_check_passes_what_is_well_formed():
    assert check_placeholders(sample(["<image>\nq", "a"], [PICTURE])) is None


@pytest.mark.parametrize(
    ("build", "texts"),
    [(build_training_prompt, ["q"]), (build_question_prompt, ["q", "a"]), (build_training_prompt, [])],
)
def test_the_last_turn_must_be_the_right_side(build, texts):
    with pytest.raises(DataError, match="sample s1: the conversation does not end with"):
        build(sample(texts))
