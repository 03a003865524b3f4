"""The prompt as segments: text, the places of media, and which parts are supervised.

Before sample_layout, which turns each segment into ids, labels and feature rows. Two rounds about one image in the
format vicuna_v1:

    text    A chat between ... questions. USER:␣     not supervised     system prompt, one space, "USER: "
    medium  0                                        not supervised     the image's tokens
    text    \\nWhat is it? ASSISTANT:                 not supervised
    text    ␣A cat.                                  supervised         the answer, with the space before it
    end                                              supervised         </s>
    text    USER: And its colour? ASSISTANT:         not supervised
    text    ␣Grey.                                   supervised
    end                                              supervised

and in the format mistral_instruct, whose answers end with a space:

    [INST] <image>\\nWhat is it? [/INST] A cat. </s>[INST] And its colour? [/INST] Grey. </s>

The prompt of a question ends with its last "ASSISTANT:" or "[/INST]", where the model continues. The finished text is
never searched, so "</s>" or " ASSISTANT: " in an answer are ordinary text.

Source: conversation templates vicuna_v1 and mistral_instruct of the original training code (LLaVA-NeXT,
`conversation.py`); the placeholder rule is its `preprocess_multimodal`. transformers' documentation of llava_next uses
the same format for llava-v1.6-mistral.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

from llavanext_cli.errors import DataError
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Sample, Turn

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEXT, MEDIUM, END = "text", "medium", "end"


@dataclass(frozen=True)
class Conversation:
    """The text around questions and answers. The space before an answer is part of every format, and supervised.

    Attributes:
        head: before everything.
        before_question, after_question: around each question.
        after_answer: between an answer and its end token; supervised.
    """

    head: str
    before_question: str
    after_question: str
    after_answer: str


CONVERSATIONS = {
    "vicuna_v1": Conversation(SYSTEM + " ", "USER: ", " ASSISTANT:", ""),
    "mistral_instruct": Conversation("", "[INST] ", " [/INST]", " "),
}
"""The formats that `Architecture.conversation` names."""


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt.

    Attributes:
        kind: TEXT, MEDIUM (the tokens of one image or video) or END (`</s>`).
        text: of a TEXT.
        medium: index of a MEDIUM in the sample's media.
        supervised: whether the loss is computed on its tokens.
    """

    kind: str
    text: str = ""
    medium: int = -1
    supervised: bool = False


def build_training_prompt(sample: Sample, conversation: str = "vicuna_v1") -> list[Segment]:
    """Segments of a conversation whose answers are supervised, in the format named.

    Raises:
        DataError: it does not end with an answer, or placeholders and media do not match.
    """
    if not sample.turns or sample.turns[-1].role != "assistant":
        raise DataError(
            f"{_label(sample)}: the conversation does not end with an answer", "drop the last turn, or the sample"
        )
    return _build(sample, sample.turns, CONVERSATIONS[conversation])


def build_question_prompt(sample: Sample, conversation: str = "vicuna_v1") -> list[Segment]:
    """Segments of a conversation that the model continues, in the format named. Without placeholders, all media come
    first.

    Raises:
        DataError: it does not end with a question, or placeholders and media do not match.
    """
    if not sample.turns or sample.turns[-1].role != "user":
        raise DataError(f"{_label(sample)}: the conversation does not end with a question", "end it with a user turn")
    turns = sample.turns
    if sample.media and not any(_placeholders(turn.text, sample) for turn in turns if turn.role == "user"):
        heads = "".join(f"{IMAGE_PLACEHOLDER if m.kind == 'image' else VIDEO_PLACEHOLDER}\n" for m in sample.media)
        turns = (Turn("user", heads + turns[0].text), *turns[1:])
    return _build(sample, turns, CONVERSATIONS[conversation])


def check_placeholders(sample: Sample) -> str | None:
    """What is wrong with a sample's placeholders, or None. Reads no file."""
    try:
        _check_media(sample, sample.turns)
    except DataError as error:
        return error.what
    return None


def _build(sample: Sample, turns: Sequence[Turn], form: Conversation) -> list[Segment]:
    _check_media(sample, turns)
    media = count()  # placeholders and media have the same order
    segments: list[Segment] = []
    text = form.head  # unsupervised text since the last segment
    for turn in turns:
        if turn.role == "assistant":
            # of an empty answer only the end remains: the space belongs to the answer's first word
            answer = f" {turn.text}{form.after_answer}" if turn.text else ""
            segments.append(Segment(TEXT, answer, supervised=True))
            segments.append(Segment(END, supervised=True))
            continue
        text += form.before_question
        for part, is_placeholder in _split_turn(turn.text, sample):
            if is_placeholder:
                segments += [Segment(TEXT, text), Segment(MEDIUM, medium=next(media))]
                text = ""
            else:
                text += part
        segments.append(Segment(TEXT, text + form.after_question))
        text = ""
    return [segment for segment in segments if segment.kind != TEXT or segment.text]


def _split_turn(text: str, sample: Sample) -> list[tuple[str, bool]]:
    """(part, is a placeholder) of a user's turn. A single placeholder moves to the front and gets a line of its own."""
    found = _placeholders(text, sample)
    if len(found) == 1:
        rest = text.replace(found[0], "", 1)
        # "<image>\n..." stays as it is, trailing spaces included; otherwise the rest is stripped, as the original does
        rest = rest if text.startswith(found[0] + "\n") else "\n" + rest.strip()
        return [(found[0], True), (rest, False)]
    pattern = _pattern(sample)
    if pattern is None or not found:
        return [(text, False)]
    return [(part, number % 2 == 1) for number, part in enumerate(re.split(f"({pattern})", text))]


def _pattern(sample: Sample) -> str | None:
    """What counts as a placeholder: `<image>` and `<video>` if the sample has a video, `<image>` if it has images only,
    nothing if it has no media. Everything else is text (people ask about HTML)."""
    if any(medium.kind == "video" for medium in sample.media):
        return f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}"
    return IMAGE_PLACEHOLDER if sample.media else None


def _placeholders(text: str, sample: Sample) -> list[str]:
    pattern = _pattern(sample)
    return re.findall(pattern, text) if pattern else []


def _check_media(sample: Sample, turns: Sequence[Turn]) -> None:
    """Compare placeholders and media.

    Raises:
        DataError: their numbers differ, `<video>` stands for an image, or a placeholder line has no medium at all.
    """
    texts = [turn.text for turn in turns if turn.role == "user"]
    found = [name for text in texts for name in _placeholders(text, sample)]
    if not sample.media:
        # inside a sentence "<image>" is text; alone on the first or last line, its image is missing
        found = [name for text in texts for name in _lone_placeholders(text)]
    if len(found) != len(sample.media):
        raise DataError(
            f"{_label(sample)}: {len(found)} placeholder{'' if len(found) == 1 else 's'} "
            f"({IMAGE_PLACEHOLDER}, {VIDEO_PLACEHOLDER}) "
            f"for {len(sample.media)} file{'' if len(sample.media) == 1 else 's'}",
            "write one placeholder for each image and video in the user's turns",
        )
    for number, (name, medium) in enumerate(zip(found, sample.media, strict=True)):
        if name == VIDEO_PLACEHOLDER and medium.kind == "image":
            raise DataError(
                f"{_label(sample)}: placeholder {number + 1} is {VIDEO_PLACEHOLDER}, but file {number + 1} is an image",
                "list the images and videos in the order of their placeholders",
            )


def _lone_placeholders(text: str) -> list[str]:
    lines = text.strip().splitlines() or [""]
    edge = dict.fromkeys((0, len(lines) - 1))
    return [lines[i].strip() for i in edge if lines[i].strip() in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)]


def _label(sample: Sample) -> str:
    return f"sample {sample.id}" if sample.id else "the question"
