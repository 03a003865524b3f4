"""The questions about a planned image or video, and their right answers.

Kinds of questions are the rows of the report. The four answers of a kind are about equally likely, so that no constant
answer is right much more often than one time in four.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from llavanext_cli.demo.images import DemoImage
from llavanext_cli.demo.videos import DemoVideo

IMAGE_KINDS = ("colour", "symbol", "position", "count", "anyres")
VIDEO_KINDS = ("move", "change", "appear")
CONTROL_KIND = "anyres, squashed"
"""The anyres questions again, about the same images scaled to the size of the base tile and back."""
NUMBERS = ("none", "one", "two", "three", "four")


@dataclass(frozen=True)
class Question:
    """One question with its only right answer. `kind` is a row of the report."""

    kind: str
    text: str
    answer: str


def ask_about_image(plan: DemoImage, rng: random.Random) -> list[Question]:
    """All questions about an image, in random order."""
    if plan.tag:
        return [Question("anyres", "Which pattern does the tag have?", plan.tag.pattern)]
    if len(plan.signs) > 1 or rng.random() < 1 / 9:  # so that one is as likely an answer as four
        return [Question("count", "How many signs are there?", NUMBERS[len(plan.signs)])]
    sign = plan.signs[0]
    questions = [
        Question("colour", "What colour is the sign?", sign.colour),
        Question("symbol", "What is on the sign?", sign.symbol),
        Question("position", "Where is the sign?", sign.quadrant),
    ]
    rng.shuffle(questions)
    return questions


_VIDEO_QUESTIONS = {
    "move": "Which way does the sign move?",
    "change": "Which colour does the sign turn?",
    "appear": "Where does the sign appear?",
}


def ask_about_video(plan: DemoVideo) -> list[Question]:
    """The one question about a video."""
    return [Question(plan.kind, _VIDEO_QUESTIONS[plan.kind], plan.answer)]
