"""Greedy answers through the network that training uses, the whole sequence again for every token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.records import EncodedSample
from tests.parity.cases import ANSWER_TOKENS, QUESTIONS, build_cases

if TYPE_CHECKING:
    from tests.parity.mindspore_side import Forward, Model

EOS = 2


def answer_without_cache(model: Model, forward: Forward) -> list[list[int]]:
    """The answers to `QUESTIONS`, in one batch: up to `ANSWER_TOKENS` tokens each, or up to the end."""
    samples = [case.encoded for case in build_cases(model.processor, QUESTIONS, question=True)]
    answers: list[list[int]] = [[] for _ in samples]
    for _ in range(ANSWER_TOKENS):
        logits = forward.logits(samples)
        for row, sample in enumerate(samples):
            token = int(logits[row, sample.length - 1].argmax())
            answers[row].append(token)
            samples[row] = extended(sample, token)
    return [answer[: answer.index(EOS)] if EOS in answer else answer for answer in answers]


def extended(sample: EncodedSample, token: int) -> EncodedSample:
    """The sample with one more token of text."""
    text_row = sample.feature_index[0]  # a prompt begins with text
    return EncodedSample(
        id=sample.id,
        input_ids=np.append(sample.input_ids, np.int32(token)),
        labels=np.append(sample.labels, np.int32(-100)),
        tiles=sample.tiles,
        frames=sample.frames,
        feature_index=np.append(sample.feature_index, text_row),
    )
