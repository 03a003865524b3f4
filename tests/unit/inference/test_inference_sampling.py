"""Which token comes next."""

import numpy as np
import pytest

from llavanext_cli.errors import ConfigError
from llavanext_cli.inference.sampling import Sampling, next_token, probabilities

LOGITS = np.array([1.0, 3.0, 2.0, -1.0], np.float32)


def test_greedy_takes_the_likeliest():
    assert next_token(LOGITS, (), Sampling(), np.random.default_rng(0)) == 1


def test_the_same_seed_draws_the_same():
    sampling = Sampling(temperature=1.0)
    draws = [
        [next_token(LOGITS, (), sampling, rng) for _ in range(20)] for rng in map(np.random.default_rng, (5, 5, 6))
    ]
    assert draws[0] == draws[1] != draws[2]


def test_draws_follow_the_softmax():
    rng, count = np.random.default_rng(0), 20_000
    drawn = np.bincount([next_token(LOGITS, (), Sampling(temperature=0.7), rng) for _ in range(count)], minlength=4)
    expected = np.exp(LOGITS / 0.7) / np.exp(LOGITS / 0.7).sum() * count
    chi_square = ((drawn - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # 3 degrees of freedom, p = 0.001


def test_top_k_keeps_the_likeliest():
    share = probabilities(LOGITS, Sampling(temperature=1.0, top_k=2))
    assert np.flatnonzero(share).tolist() == [1, 2]
    assert share.sum() == pytest.approx(1)


def test_top_p_keeps_as_few_as_reach_it_and_always_one():
    share = probabilities(LOGITS, Sampling(temperature=1.0, top_p=0.7))
    assert np.flatnonzero(share).tolist() == [1, 2]
    assert np.flatnonzero(probabilities(LOGITS, Sampling(temperature=1.0, top_p=1e-9))).tolist() == [1]


def test_the_penalty_makes_used_tokens_less_likely_and_leaves_the_logits_alone():
    before = LOGITS.copy()
    sampling = Sampling(repetition_penalty=2.0)
    assert next_token(LOGITS, [1, 1], sampling, np.random.default_rng(0)) == 2
    assert next_token(np.array([-1.0, -1.5]), [0], sampling, np.random.default_rng(0)) == 1
    assert (before == LOGITS).all()


def test_equal_to_the_logits_processors_of_transformers():
    torch = pytest.importorskip("torch")
    from transformers import (
        LogitsProcessorList,
        RepetitionPenaltyLogitsProcessor,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(0.8), TopKLogitsWarper(20), TopPLogitsWarper(0.9)])
    rng = np.random.default_rng(3)
    for _ in range(20):
        logits = rng.normal(0, 2, 64).astype(np.float32)
        theirs = chain(torch.zeros(1, 1, dtype=torch.long), torch.tensor(logits)[None]).softmax(-1)[0].numpy()
        ours = probabilities(logits, Sampling(temperature=0.8, top_k=20, top_p=0.9))
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
    penalty = RepetitionPenaltyLogitsProcessor(1.3)
    best = penalty(torch.tensor([[3, 5]]), torch.tensor(logits)[None]).argmax()
    assert next_token(logits, [3, 5], Sampling(repetition_penalty=1.3), rng) == best


@pytest.mark.parametrize("temperature", [1e-320, 1e-30])
def test_a_temperature_near_zero_takes_the_likeliest(temperature):
    share = probabilities(np.array([1.0, 3.0, -np.inf, 2.0], np.float32), Sampling(temperature=temperature, top_k=2))
    assert share.tolist() == [0, 1, 0, 0]


def test_a_setting_that_cannot_be_names_its_option():
    with pytest.raises(ConfigError, match="repetition_penalty is 0, but must be above 0") as caught:
        Sampling(repetition_penalty=0)
    assert "--repetition-penalty" in caught.value.hint
