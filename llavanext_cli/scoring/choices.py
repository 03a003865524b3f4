"""Multiple choice and yes/no: which option a free text names.

"(B)"  "B."  "B: a dog"  "The answer is B."  "Option B"  "a dog"          → B
"A or B"  "It is not a dog"                                              → ambiguous, or nothing
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from llavanext_cli.scoring.text import squad_words

LETTERS = "ABCDEFGHIJ"
_LEADING = re.compile(r"^[\s(\[*]*([A-J])(?:[)\].:,*]|\s*$|\s+[-\u2013]\s)")
"""A letter at the start that stands alone or has a mark behind it: `B`, `(B)`, `B.`, `B: a dog`."""
_STATED = re.compile(r"\b(?:answer|option|choice)\s*(?:is|:)?\s*[:(\[*]*\s*([A-J])\b(?!\s*[a-z])", re.IGNORECASE)
"""`the answer is (B)`, `option B`."""
_STANDALONE = re.compile(r"(?<![\w'])([B-HJ]|[AI](?=[).,:\]]|\s*$|\s+(?:or|and)\s+[B-J]\b))(?![\w'])")
"""A capital letter that is a word of its own; `A` and `I` only where they are not the article and the pronoun."""


def find_choices(answer: str, options: Sequence[str]) -> set[str]:
    """The letters of all options that an answer names: one is an answer, none or several are not.

    Letters come first, in the order of their certainty: at the start, after "answer is", anywhere. Without a letter the
    text of an option counts, if the answer contains no other option's text.

    Args:
        options: texts of the options in order; empty when only letters are known.
    """
    letters = LETTERS[: len(options)] if options else LETTERS
    everywhere = {letter for letter in _STANDALONE.findall(answer) if letter in letters}
    if (leading := _LEADING.match(answer)) and leading[1] in letters:
        return {leading[1]} | (everywhere if re.match(r"[\s(\[*]*[A-J][)\].*]*,?\s*(?:or|and|,)\s", answer) else set())
    stated = {letter.upper() for letter in _STATED.findall(answer) if letter.upper() in letters}
    return stated or everywhere or _named_by_text(answer, options)


def _named_by_text(answer: str, options: Sequence[str]) -> set[str]:
    said = f" {' '.join(squad_words(answer))} "
    texts = [" ".join(squad_words(option)) for option in options]
    named = [index for index, text in enumerate(texts) if text and f" {text} " in said]
    # "a black dog" names the option "black dog" and not "dog"
    whole = [i for i in named if not any(i != j and f" {texts[i]} " in f" {texts[j]} " for j in named)]
    return {LETTERS[index] for index in whole}


def says_yes(answer: str) -> bool:
    """Whether an answer counts as yes, as POPE (Li et al. 2023, evaluate.py) decides: by the first sentence, "no" and
    "not" are no, and everything else is yes."""
    words = answer.partition(".")[0].replace(",", "").split()
    return not {"No", "not", "no"} & set(words)
