"""The model against transformers', live: the same tiny weights through the shipped converter, stage by stage.

`pytest tests/parity -n 0 -s` prints the table of errors. A failure names the first stage that differs.
"""

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.parity.cases import ANSWER_TOKENS, QUESTIONS, build_cases, conversations
from tests.parity.greedy import answer_without_cache
from tests.parity.stages import TABLE, check_stages, gradient_errors, relative_error, tolerance

MIXED = ("20x200", "two images", "text only", "video")


def test_the_cases_are_those_that_matter(model):
    images = [case for case in model.cases if len(case.images) == 1 and not case.videos]
    assert len({case.sizes[0][1] / case.sizes[0][0] for case in images}) >= 9
    assert len(images) == 12
    assert {len(case.encoded.tiles) for case in images} == {3, 4, 5}  # every grid of the pinpoints
    assert {(len(c.images), len(c.videos)) for c in model.cases} >= {(2, 0), (0, 0), (0, 1), (1, 1)}


@pytest.mark.parametrize("name", list(conversations()))
def test_stages(name, model, reference, ours):
    """From pixels to logits. transformers computes each sample alone, we in a padded batch of four."""
    case = next(case for case in model.cases if case.name == name)
    theirs = reference.stages(case)
    assert set(theirs) - {"loss"} <= set(ours[name])
    check_stages(name, ours[name], theirs)
    assert relative_error(ours[name]["logits"], theirs["logits"]) <= 1e-4


def test_mixed_padded_batch(model, reference, forward):
    """Images, two images, a video and text only, padded and masked on their side, padded on ours."""
    cases = [case for case in model.cases if case.name in MIXED]
    assert len({case.encoded.length for case in cases}) == len(MIXED)
    theirs = reference.padded(cases)
    logits = forward.logits([case.encoded for case in cases])
    for row, case in enumerate(cases):
        error = relative_error(logits[row, : case.encoded.length], theirs[row, : case.encoded.length])
        TABLE.add("mixed padded batch", "logits", error)
        assert error <= tolerance("logits"), f"{case.name}, in a mixed batch"


# --- loss and gradients ---


@pytest.mark.parametrize("name", list(conversations()))
def test_loss_and_gradients(name, model, reference, learning):
    from tests.parity.mindspore_side import hub_gradients

    case = next(case for case in model.cases if case.name == name)
    loss, gradients = learning([case.encoded])
    their_loss, theirs = reference.gradients(case)
    error = abs(loss - their_loss) / their_loss
    TABLE.add(name, "loss", error)
    assert error <= tolerance("loss")

    gradients = hub_gradients(model, gradients)
    unused = set(theirs) - set(gradients)
    assert all(not theirs[weight].any() for weight in unused), "a weight we do not compute has a gradient"
    errors = gradient_errors(gradients, theirs)
    TABLE.add(name, "gradients", max(errors.values()))
    off = {weight: error for weight, error in errors.items() if error > tolerance("gradients")}
    assert not off, f"gradients that differ: {off}"


def test_loss_of_a_batch_is_the_mean_over_its_tokens(model, reference, learning):
    cases = [case for case in model.cases if case.name in MIXED]
    loss, _ = learning([case.encoded for case in cases])
    tokens = [int((case.encoded.labels[1:] >= 0).sum()) for case in cases]
    assert len(set(tokens)) > 1
    theirs = np.average([float(reference.stages(case)["loss"]) for case in cases], weights=tokens)
    assert loss == pytest.approx(theirs, rel=tolerance("loss"))


# --- greedy answers; those with a cache are in test_answers.py ---


def test_greedy_tokens_without_a_cache(model, reference, forward):
    """The whole sequence again for every token, through the network that training uses."""
    questions = build_cases(model.processor, QUESTIONS, question=True)
    answers = [reference.generate(case, ANSWER_TOKENS) for case in questions]
    assert [len(answer) for answer in answers] == [19, ANSWER_TOKENS, ANSWER_TOKENS, ANSWER_TOKENS]
    assert answer_without_cache(model, forward) == answers


# --- half precision ---


def test_stages_in_float16(model, reference):
    """Products in float16 on float32 weights: as far off as ten bits of mantissa are, and no further."""
    from tests.parity.mindspore_side import Forward

    cases = [case for case in model.cases if case.name in QUESTIONS]
    for case, stages in zip(cases, Forward(model, "float16").stages(cases), strict=True):
        theirs = reference.stages(case)
        check_stages(f"{case.name}, float16", stages, theirs, "float16")
        assert relative_error(stages["logits"], theirs["logits"]) > 1e-5, "this was not computed in float16"
