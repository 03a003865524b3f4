"""How answers are written alike before they are compared: the two normalisations that benchmarks use.

squad_words    SQuAD (Rajpurkar et al. 2016, evaluate-v1.1.py): lower case, no punctuation, no articles
vqa_answer     VQA v2 (Antol et al. 2015, vqaEval.py): the same, and number words become digits, contractions get their
               apostrophe back
"""

from __future__ import annotations

import re
import string
from itertools import combinations

ARTICLES = {"a", "an", "the"}
_NUMBERS = "zero one two three four five six seven eight nine ten"
NUMBER_WORDS = {word: str(number) for number, word in enumerate(_NUMBERS.split())} | {"none": "0"}
"""As in vqaEval.py, where "none" is 0."""
CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've
o'clock oughtn't 'ow's'at 'twas shan't she'd've should've shouldn't shouldn't've somebody'd somebody'd've
somebody'll somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that'd
that'd've that's there'd there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've
weren't what'll what're what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll
why're why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
"""
"""Those of vqaEval.py that it finds in a text of lower case."""


def _without_apostrophes(word: str) -> list[str]:
    """Spellings of a contraction that lack one apostrophe or more."""
    places = [place for place, letter in enumerate(word) if letter == "'"]
    dropped = (set(some) for size in range(1, len(places) + 1) for some in combinations(places, size))
    return ["".join(letter for place, letter in enumerate(word) if place not in some) for some in dropped]


SPELLINGS = {spelling: word for word in CONTRACTIONS.split() for spelling in _without_apostrophes(word)}
"""`dont` → `don't`."""

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_ALL_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_words(text: str) -> list[str]:
    """`"The cat's, mat."` → `["cats", "mat"]`."""
    return [word for word in text.lower().translate(_ALL_PUNCTUATION).split() if word not in ARTICLES]


def vqa_answer(text: str) -> str:
    """`"Two dogs!"` → `"2 dogs"`, as vqaEval.py's processPunctuation and processDigitArticle."""
    text = text.lower().replace("\n", " ").replace("\t", " ").strip()
    cleaned = text
    for mark in _PUNCTUATION:
        stands_apart = f"{mark} " in text or f" {mark}" in text
        cleaned = cleaned.replace(mark, "" if stands_apart or _COMMA_IN_NUMBER.search(text) else " ")
    words = (NUMBER_WORDS.get(word, word) for word in _PERIOD.sub("", cleaned).split())
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)
