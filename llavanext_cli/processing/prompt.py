"""The prompt, as segments: what is said, what is learned, and where media stand.

Before packing, which turns each segment into ids, labels and feature rows. Two rounds about one picture, in the form
vicuna_v1:

    text    A chat between ... questions. USER:␣     not supervised     system prompt, one space, "USER: "
    medium  0                                        not supervised     the picture's tokens
    text    \\nWhat is it? ASSISTANT:                 not supervised
    text    ␣A cat.                                  supervised         the answer, with the space before it
    end                                              supervised         </s>
    text    USER: And its colour? ASSISTANT:         not supervised
    text    ␣Grey.                                   supervised
    end                                              supervised

and in the form mistral_instruct, whose answers end with a space:

    [INST] <picture>\\nWhat is it? [/INST] A cat. </s>[INST] And its colour? [/INST] Grey. </s>

A question is the same up to its last "ASSISTANT:" or "[/INST]", where the model goes on. Nothing is ever searched for
in the finished text, so an answer may hold "</s>" or " ASSISTANT: " and stays what it is: words.

Source: conversation templates vicuna_v1 and mistral_instruct of the original training code (LLaVA-NeXT,
`conversation.py`); the placeholder rule is its `preprocess_multimodal`. transformers' documentation of llava_next asks
llava-v1.6-mistral in the same form.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from llavanext_cli.errors import DataError
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Sample, Turn

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
TEXT, MEDIUM, END = "text", "medium", "end"


@dataclass(frozen=True)
class Conversation:
    """What is written around questions and answers. The space before an answer is everywhere, and is learned.

    Attributes:
        head: before everything.
        before_question, after_question: around each question.
        after_answer: between an answer and its end token; learned.
    """

    head: str
    before_question: str
    after_question: str
    after_answer: str


CONVERSATIONS = {
    "vicuna_v1": Conversation(SYSTEM + " ", "USER: ", " ASSISTANT:", ""),
    "mistral_instruct": Conversation("", "[INST] ", " [/INST]", " "),
}
"""The forms that `Architecture.conversation` names."""


@dataclass(frozen=True)
class Segment:
    """A piece of the prompt.

    Attributes:
        kind: TEXT, MEDIUM (the tokens of one picture or clip) or END (`</s>`).
        text: the words of a TEXT.
        medium: which of the sample's media a MEDIUM is.
        supervised: whether its tokens are learned.
    """

    kind: str
    text: str = ""
    medium: int = -1
    supervised: bool = False


def build_training_prompt(sample: Sample, conversation: str = "vicuna_v1") -> list[Segment]:
    """Segments of a conversation whose answers are learned, in the form named.

    Raises:
        DataError: it does not end with an answer, or placeholders and media do not match.
    """
    if not sample.turns or sample.turns[-1].role != "assistant":
        raise DataError(
            f"{_label(sample)}: the conversation does not end with an answer", "drop the last turn or the sample"
        )
    return _build(sample, sample.turns, CONVERSATIONS[conversation])


def build_question_prompt(sample: Sample, conversation: str = "vicuna_v1") -> list[Segment]:
    """Segments of a conversation that the model is to continue, in the form named. Media that no placeholder names come
    first of all.

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
    """What is wrong with a sample's placeholders, or None. Needs no file, so that a mix can be checked before
    training."""
    try:
        _match_media(sample, sample.turns)
    except DataError as error:
        return error.what
    return None


def _build(sample: Sample, turns: Sequence[Turn], form: Conversation) -> list[Segment]:
    media = iter(_match_media(sample, turns))
    segments: list[Segment] = []
    text = form.head  # unsupervised text since the last segment
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            # an empty answer is an end alone: the space belongs to the answer's first word
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
        if number + 1 < len(turns) and turns[number + 1].role != "assistant":
            raise DataError(
                f"{_label(sample)}: turn {number + 2} must be the assistant's",
                "let user and assistant take turns, or drop the sample",
            )
    return [segment for segment in segments if segment.kind != TEXT or segment.text]


def _split_turn(text: str, sample: Sample) -> list[tuple[str, bool]]:
    """(part, is a placeholder) of a user's turn. A single placeholder moves to the front and gets a line of its own."""
    found = _placeholders(text, sample)
    if len(found) == 1:
        rest = text.replace(found[0], "", 1)
        # "<image>\n..." is already as it should be, trailing spaces included; anything else is tidied as in training
        rest = rest if text.startswith(found[0] + "\n") else "\n" + rest.strip()
        return [(found[0], True), (rest, False)]
    pattern = _pattern(sample)
    if pattern is None or not found:
        return [(text, False)]
    return [(part, number % 2 == 1) for number, part in enumerate(re.split(f"({pattern})", text))]


def _pattern(sample: Sample) -> str | None:
    """What counts as a placeholder here: clips are marked by either word, pictures by `<image>` alone.

    Where there is no medium the words are text (people ask about HTML), and where there are only pictures, so is
    `<video>`.
    """
    if any(medium.kind == "video" for medium in sample.media):
        return f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}"
    return IMAGE_PLACEHOLDER if sample.media else None


def _placeholders(text: str, sample: Sample) -> list[str]:
    pattern = _pattern(sample)
    return re.findall(pattern, text) if pattern else []


def _match_media(sample: Sample, turns: Sequence[Turn]) -> list[int]:
    """Index of the medium behind each placeholder: in order, one for each.

    Raises:
        DataError: their numbers differ, `<video>` stands for a picture, or a placeholder line has no medium at all.
    """
    texts = [turn.text for turn in turns if turn.role == "user"]
    found = [name for text in texts for name in _placeholders(text, sample)]
    if not sample.media:
        # "<image>" amid a sentence is talk about HTML; alone on the first or last line it has lost its picture
        found = [name for text in texts for name in _lone_placeholders(text)]
    if len(found) != len(sample.media):
        raise DataError(
            f"{_label(sample)}: {len(found)} placeholder{'' if len(found) == 1 else 's'} "
            f"({IMAGE_PLACEHOLDER}, {VIDEO_PLACEHOLDER}) "
            f"for {len(sample.media)} media",
            "give each picture or clip one placeholder in the user's turns",
        )
    for number, (name, medium) in enumerate(zip(found, sample.media, strict=True)):
        if name == VIDEO_PLACEHOLDER and medium.kind == "image":
            raise DataError(
                f"{_label(sample)}: placeholder {number + 1} is {VIDEO_PLACEHOLDER}, "
                f"but medium {number + 1} is a picture",
                "put the media in the order of their placeholders",
            )
    return list(range(len(found)))


def _lone_placeholders(text: str) -> list[str]:
    lines = text.strip().splitlines() or [""]
    edge = dict.fromkeys((0, len(lines) - 1))
    return [lines[i].strip() for i in edge if lines[i].strip() in (IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER)]


def _label(sample: Sample) -> str:
    return f"sample {sample.id}" if sample.id else "the question"
