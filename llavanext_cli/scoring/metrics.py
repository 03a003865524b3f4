"""How right one answer is, from 0 to 1, by the definition of each benchmark.

exact     equal after SQuAD's normalisation (evaluate-v1.1.py)
vqa       VQA v2's soft accuracy over up to ten references (vqaEval.py)
anls      1 - normalised Levenshtein distance, 0 from a distance of 0.5 on (Biten et al. 2019, "Scene Text VQA")
choice    the letter of the right option, found in free text
yesno     as POPE (Li et al. 2023), "yes" is the positive class
relaxed   a number within 5 % (ChartQA, Masry et al. 2022, section 5.1), or the same text
f1        F1 of the words, as SQuAD
rouge     ROUGE-L (Lin 2004) with beta 1.2 over all references, as COCO captions (pycocoevalcap)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence

from llavanext_cli.scoring.choices import LETTERS, find_choices, says_yes
from llavanext_cli.scoring.text import squad_words, vqa_answer

RELAXED_TOLERANCE = 0.05
ANLS_THRESHOLD = 0.5
ROUGE_BETA = 1.2
VQA_AGREEING = 3
"""References that must agree with an answer for full marks."""


def exact(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the answer equals a reference, but for case, punctuation and articles."""
    return float(any(squad_words(answer) == squad_words(reference) for reference in references))


def vqa(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """The mean over the references of min(1, agreeing others / 3); with fewer than four of them, of any agreeing one.

    The official formula is for ten references. With one to three, no answer could reach 1, so one match counts fully.
    """
    said, right = vqa_answer(answer), [vqa_answer(reference) for reference in references]
    agreeing = right.count(said)
    if len(right) <= VQA_AGREEING:
        return float(agreeing > 0)
    scores = (min(1.0, (agreeing - (reference == said)) / VQA_AGREEING) for reference in right)
    return sum(scores) / len(right)


def anls(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """The best of 1 - distance / length over the references, if that distance is below one half."""
    from rapidfuzz.distance import Levenshtein

    said = " ".join(answer.lower().split())
    distances = (Levenshtein.normalized_distance(said, " ".join(ref.lower().split())) for ref in references)
    nearest = min(distances)
    return 1.0 - nearest if nearest < ANLS_THRESHOLD else 0.0


def choice(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where the answer names the right option and no other; a reference is a letter or the text of an option."""
    right = {letter for reference in references for letter in option_letters(reference, options)}
    named = find_choices(answer, options)
    return float(len(named) == 1 and named <= right)


def option_letters(reference: str, options: Sequence[str]) -> set[str]:
    """`B`, `(B)`, `B. a dog` or the text of option B → {"B"}."""
    for letter, option in zip(LETTERS, options, strict=False):
        if reference.strip() == option.strip():
            return {letter}
    return find_choices(reference.upper() if len(reference.strip(" ().")) == 1 else reference, options)


def yesno(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 where both are yes, or both are no."""
    return float(says_yes(answer) == is_yes(references))


def is_yes(references: Sequence[str]) -> bool:
    """Whether yes is right: the first word of the first reference."""
    return squad_words(references[0])[:1] == ["yes"]


def relaxed(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """1 within 5 % of a number that is not 0, or for the same text in any case; `12%` is 0.12."""
    return float(any(_is_relaxed(answer.strip(), reference.strip()) for reference in references))


def _is_relaxed(answer: str, reference: str) -> bool:
    said, right = _number(answer), _number(reference)
    if said is not None and right:
        return abs(said - right) / abs(right) <= RELAXED_TOLERANCE
    return answer.lower() == reference.lower()


def _number(text: str) -> float | None:
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def f1(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """The best F1 of the normalised words over the references."""
    return max(_word_f1(squad_words(answer), squad_words(reference)) for reference in references)


def _word_f1(said: list[str], right: list[str]) -> float:
    if not said or not right:
        return float(said == right)
    common = sum((Counter(said) & Counter(right)).values())
    return 2 * common / (len(said) + len(right))


def rouge(answer: str, references: Sequence[str], options: Sequence[str] = ()) -> float:
    """F of the longest common subsequence, from the best precision and the best recall over the references."""
    from rapidfuzz.distance import LCSseq

    said, rights = _words(answer), [words for reference in references if (words := _words(reference))]
    if not said or not rights:
        return 0.0
    common = [LCSseq.similarity(said, right) for right in rights]
    precision = max(common) / len(said)
    recall = max(length / len(right) for length, right in zip(common, rights, strict=True))
    if not precision or not recall:
        return 0.0
    return (1 + ROUGE_BETA**2) * precision * recall / (recall + ROUGE_BETA**2 * precision)


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


Metric = Callable[[str, Sequence[str], Sequence[str]], float]
METRICS: dict[str, Metric] = {
    "exact": exact,
    "vqa": vqa,
    "anls": anls,
    "choice": choice,
    "yesno": yesno,
    "relaxed": relaxed,
    "f1": f1,
    "rouge": rouge,
}
"""Name of `--metric` → score of (answer, references, options)."""
