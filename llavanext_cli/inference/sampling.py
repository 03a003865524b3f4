"""From logits to the next token: greedy, or drawn with temperature, top-k, top-p and a repetition penalty."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from llavanext_cli.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn.

    Attributes:
        max_new_tokens: greatest length of an answer, in tokens.
        temperature: 0 takes the likeliest token; higher values vary more.
        top_k: draw from this many of the likeliest tokens; 0: all.
        top_p: draw from the likeliest tokens that together have this probability.
        repetition_penalty: above 1, tokens that were used become less likely (Keskar et al. 2019).
        seed: the same seed gives the same answer.
        stop: strings that end an answer and are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name, good, allowed in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", 0 <= self.temperature < float("inf"), "at least 0"),
            ("top_k", self.top_k >= 0, "at least 0"),
            ("top_p", 0 < self.top_p <= 1, "above 0, at most 1"),
            ("repetition_penalty", 0 < self.repetition_penalty < float("inf"), "above 0"),
            ("seed", self.seed >= 0, "at least 0"),
            ("stop", all(self.stop), "text that is not empty"),
        ):
            if not good:
                hint = f"change --{name.replace('_', '-')}"
                raise ConfigError(f"{name} is {getattr(self, name)!r}, but must be {allowed}", hint)

    @property
    def is_greedy(self) -> bool:
        """Whether the likeliest token is always taken, so that nobody needs the logits."""
        return self.temperature == 0 and self.repetition_penalty == 1


def next_token(logits: np.ndarray, seen: Iterable[int], sampling: Sampling, rng: np.random.Generator) -> int:
    """Choose one token.

    Args:
        logits: `float32[V]`.
        seen: ids of prompt and answer so far, for the repetition penalty.
        rng: advanced by one draw unless greedy.

    Source: the order of transformers' logits processors: penalty, temperature, top-k, top-p.
    """
    if sampling.repetition_penalty != 1.0:
        logits = logits.copy()
        used = np.fromiter(set(seen), np.int64)
        score = logits[used]
        penalty = sampling.repetition_penalty
        logits[used] = np.where(score < 0, score * penalty, score / penalty)
    if sampling.temperature == 0:
        return int(logits.argmax())
    return int(rng.choice(len(logits), p=probabilities(logits, sampling)))


def probabilities(logits: np.ndarray, sampling: Sampling) -> np.ndarray:
    """`float64[V]`: what a token is drawn from, after temperature, top-k and top-p."""
    with np.errstate(over="ignore"):  # near temperature 0 all scores but the highest are -inf
        scores = (logits.astype(np.float64) - logits.max()) / sampling.temperature
    if 0 < sampling.top_k < len(scores):
        scores[scores < np.partition(scores, -sampling.top_k)[-sampling.top_k]] = -np.inf
    share = np.exp(scores)
    share /= share.sum()
    if sampling.top_p < 1:
        order = np.argsort(-share, kind="stable")
        before = np.cumsum(share[order]) - share[order]
        share[order[before >= sampling.top_p]] = 0  # the likeliest token always stays
        share /= share.sum()
    return share
