"""Scores of many answers: the mean of a metric over all of them, and over those of each source and kind of question."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.errors import ConfigError
from llavanext_cli.scoring.answers import Answer, read_answers
from llavanext_cli.scoring.choices import LETTERS, find_choices, says_yes
from llavanext_cli.scoring.metrics import METRICS, is_yes, option_letters
from llavanext_cli.scoring.text import squad_words

RESAMPLES = 1000
"""Bootstrap resamples of an interval."""
CONFIDENCE = 0.95
RIGHT = 0.5
"""An answer with a lower score is listed as wrong."""
LONG_WORDS = 6.0
"""References of more words on average are captions."""


@dataclass(frozen=True)
class ScoreRequest:
    """What to score.

    Attributes:
        answers: file of answers.
        references: file of references; None where the answers have their own.
        metric: a name of `METRICS`; None chooses one by the references.
        seed: of the bootstrap.
    """

    answers: Path
    references: Path | None = None
    metric: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class Group:
    """Some answers and their mean score, with its bootstrap interval (95 %)."""

    name: str
    answers: int
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Scored:
    """One answer and its score, from 0 to 1."""

    answer: Answer
    score: float


@dataclass(frozen=True)
class ScoreReport:
    """What `run_score` found.

    Attributes:
        reason: why this metric, in words; empty where it was asked for.
        details: further numbers of the metric, by name: precision, recall, F1 and share of yes for yesno, the number of
            ambiguous answers for choice.
        failed: answers that are an error, counted as wrong.
        without_reference, without_answer: records without a partner, left out.
        scored: every answer with its score, in the order of the file.
    """

    metric: str
    reason: str
    overall: Group
    by_source: tuple[Group, ...]
    by_kind: tuple[Group, ...]
    details: dict[str, float]
    failed: int
    without_reference: int
    without_answer: int
    scored: tuple[Scored, ...]

    @property
    def wrong(self) -> tuple[Scored, ...]:
        """Answers whose score is below `RIGHT`."""
        return tuple(item for item in self.scored if item.score < RIGHT)

    def summary(self) -> dict[str, Any]:
        """All of it for JSON, without the answers."""
        fields = {name: value for name, value in vars(self).items() if name != "scored"}
        groups = {name: [asdict(group) for group in fields[name]] for name in ("by_source", "by_kind")}
        return fields | {"overall": asdict(self.overall), **groups, "wrong": len(self.wrong)}


def run_score(request: ScoreRequest) -> ScoreReport:
    """Score a file of answers.

    Raises:
        DataError: the files cannot be used, see `read_answers`.
        ConfigError: there is no such metric, or it does not fit the references.
    """
    answers = read_answers(request.answers, request.references)
    report = score_answers(answers.items, request.metric, request.seed)
    counts = {"without_reference": answers.without_reference, "without_answer": answers.without_answer}
    return ScoreReport(**vars(report) | counts)


def score_answers(answers: Sequence[Answer], metric: str | None = None, seed: int = 0) -> ScoreReport:
    """Score answers that have references. Errors as in `run_score`."""
    metric, reason = (metric, "") if metric else choose_metric(answers)
    if metric not in METRICS:
        raise ConfigError(f"unknown metric {metric!r}", f"known metrics: {', '.join(METRICS)}")
    check_references(metric, answers)
    score = METRICS[metric]
    scored = tuple(
        Scored(item, 0.0 if item.error else score(item.text, item.references, item.options)) for item in answers
    )
    return ScoreReport(
        metric=metric,
        reason=reason,
        overall=_group("all", [item.score for item in scored], seed),
        by_source=_groups(scored, lambda answer: answer.source, seed),
        by_kind=_groups(scored, lambda answer: answer.kind, seed),
        details=DETAILS[metric](answers) if metric in DETAILS else {},
        failed=sum(bool(item.error) for item in answers),
        without_reference=0,
        without_answer=0,
        scored=scored,
    )


def choose_metric(answers: Sequence[Answer]) -> tuple[str, str]:
    """The metric that the references ask for, and why."""
    references = [reference for answer in answers for reference in answer.references]
    if all(answer.options for answer in answers):
        return "choice", "the questions have options"
    if all(reference.strip(" ().") in LETTERS and reference.strip(" ().") for reference in references):
        return "choice", "all references are letters"
    if all(squad_words(reference) in (["yes"], ["no"]) for reference in references):
        return "yesno", "all references are yes or no"
    words = sum(len(reference.split()) for reference in references) / len(references)
    if words > LONG_WORDS:
        return "rouge", f"references have {words:.0f} words on average"
    if any(len(answer.references) > 3 for answer in answers):
        return "vqa", "questions have several references"
    return "exact", "references are short texts"


def check_references(metric: str, answers: Sequence[Answer]) -> None:
    """Raise ConfigError where a reference does not fit the metric."""
    other = f"use another --metric: {', '.join(METRICS)}"
    for answer in answers:
        if metric == "choice" and not any(option_letters(ref, answer.options) for ref in answer.references):
            raise ConfigError(f"id {answer.id!r}: reference {answer.references[0]!r} is not one of its options", other)
        if metric == "yesno" and squad_words(answer.references[0])[:1] not in (["yes"], ["no"]):
            raise ConfigError(f"id {answer.id!r}: reference {answer.references[0]!r} is not yes or no", other)


def _yesno_details(answers: Sequence[Answer]) -> dict[str, float]:
    """As POPE's evaluate.py: yes is positive."""
    said = [says_yes(answer.text) and not answer.error for answer in answers]
    right = [is_yes(answer.references) for answer in answers]
    hits = sum(a and b for a, b in zip(said, right, strict=True))
    precision, recall = hits / max(1, sum(said)), hits / max(1, sum(right))
    f1 = 2 * precision * recall / (precision + recall) if hits else 0.0
    return {"precision": precision, "recall": recall, "f1": f1, "share of yes": sum(said) / len(said)}


def _choice_details(answers: Sequence[Answer]) -> dict[str, float]:
    named = [find_choices(answer.text, answer.options) for answer in answers]
    return {"ambiguous": sum(len(letters) > 1 for letters in named), "no option": sum(not letters for letters in named)}


DETAILS: dict[str, Callable[[Sequence[Answer]], dict[str, float]]] = {
    "yesno": _yesno_details,
    "choice": _choice_details,
}


def _groups(scored: Sequence[Scored], key: Callable[[Answer], str], seed: int) -> tuple[Group, ...]:
    """A group for each value of `key`, in the order in which they come; none where there is only one."""
    values: dict[str, list[float]] = {}
    for item in scored:
        values.setdefault(key(item.answer) or "other", []).append(item.score)
    return tuple(_group(name, scores, seed) for name, scores in values.items()) if len(values) > 1 else ()


def _group(name: str, scores: Sequence[float], seed: int) -> Group:
    """The mean and its percentile bootstrap interval (Efron 1979): of resamples drawn with replacement."""
    import numpy as np

    values, counts = np.unique(np.asarray(scores), return_counts=True)
    shares = counts / len(scores)
    rng = np.random.default_rng(seed)
    # How often each value is drawn is all that matters of a resample.
    means = [rng.multinomial(len(scores), shares) @ values / len(scores) for _ in range(RESAMPLES)]
    low, high = np.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Group(name, len(scores), float(np.mean(scores)), float(low), float(high))
