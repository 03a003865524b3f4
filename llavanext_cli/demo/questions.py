"""What is asked about a planned picture or clip, and what is right.

Kinds are the rows of the report. The answers of a kind are equally likely by the way pictures and clips are planned, so
that no constant answer is right much more often than one time in four.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llavanext_cli.demo.clips import Clip
from llavanext_cli.demo.pictures import Picture

PICTURE_KINDS = ("colour", "symbol", "position", "count", "anyres")
CLIP_KINDS = ("move", "change", "appear")
CONTROL_KIND = "anyres, squashed"
"""The anyres questions again, about the same pictures after a trip through the size of the base tile."""
NUMBERS = ("none", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """One question with its only right answer. `kind` is a row of the report."""

    kind: str
    text: str
    answer: str


def ask_about_picture(picture: Picture, rng: random.Random) -> list[Question]:
    """Everything that can be asked about a picture, in random order."""
    if picture.tag:
        return [Question("anyres", "Which pattern does the tag have?", picture.tag.pattern)]
    if len(picture.signs) > 1 or rng.random() < 1 / 9:  # so that one is as likely an answer as four
        return [Question("count", "How many signs are there?", NUMBERS[len(picture.signs)])]
    sign = picture.signs[0]
    questions = [
        Question("colour", "What colour is the sign?", sign.colour),
        Question("symbol", "What is on the sign?", sign.symbol),
        Question("position", "Where is the sign?", sign.quadrant),
    ]
    rng.shuffle(questions)
    return questions


_CLIP_QUESTIONS = {
    "move": "Which way does the sign move?",
    "change": "Which colour does the sign turn?",
    "appear": "Where does the sign appear?",
}


def ask_about_clip(clip: Clip) -> list[Question]:
    """The one question about a clip."""
    return [Question(clip.kind, _CLIP_QUESTIONS[clip.kind], clip.answer)]
