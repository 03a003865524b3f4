"""Greedy answers to 40 random questions equal transformers': alone (every third), and in batches of mixed lengths.

Where transformers pads on the left, our batches are padded on the right and each sequence counts its own positions:
what is written after the end of a sequence has no effect, so an answer must not depend on the rest of its batch.
"""

from __future__ import annotations

import numpy as np
import pytest

from tests.parity.cases import build_cases, random_conversations

COUNT, TOKENS, BATCH = 40, 12, 8


@pytest.fixture(scope="module")
def questions(model):
    return build_cases(model.processor, question=True, talks=random_conversations(COUNT))


@pytest.fixture(scope="module")
def answers(reference, questions):
    return [reference.generate(case, TOKENS) for case in questions]


def test_the_questions_are_worth_asking(questions, answers):
    assert len(questions) == COUNT
    assert len({case.encoded.length for case in questions}) > COUNT / 2
    assert any(len(case.images) == 2 and case.videos for case in questions)
    assert any(not case.images and not case.videos for case in questions)
    assert len(set(map(tuple, answers))) > 0.9 * COUNT
    assert {len(answer) < TOKENS for answer in answers} == {True, False}


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, BATCH])
def test_greedy_answers(model, mindspore_cpu, questions, answers, batch):
    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.inference.sampling import Sampling
    from llavanext_cli.inference.session import Session
    from tests.parity.mindspore_side import keep_alive

    # one shape for all, so that little is compiled
    shapes = {"batch_size": batch, "cache_tokens": 512, "bucket": 512, "cache_step": 512}
    session = Session(model.checkpoint, load_preset("tiny-ask", []), mindspore_cpu, **shapes)
    keep_alive(session.engine.layer)
    order = np.random.RandomState(1).permutation(COUNT) if batch > 1 else np.arange(0, COUNT, 3)
    given = {}
    for begin in range(0, len(order), batch):
        group = order[begin : begin + batch]
        samples = [questions[number].encoded for number in group]
        given |= dict(zip(group, session.answer(samples, Sampling(max_new_tokens=TOKENS)), strict=True))
    assert [questions[n].name for n in order if list(given[n].tokens) != answers[n]] == []
    assert all((answer.finish == "stop") == (len(answers[n]) < TOKENS) for n, answer in given.items())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_weights_answer_as_widened_ones(dtype, source, mindspore_cpu, questions, tmp_path):
    """Weights that are widened layer by layer give the answers of a float32 checkpoint with the same values."""
    import shutil

    import ml_dtypes  # noqa: F401 - NumPy's bfloat16
    from safetensors.numpy import load_file, save_file

    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.inference.sampling import Sampling
    from llavanext_cli.inference.session import Session
    from llavanext_cli.weights.checkpoint import open_checkpoint
    from tests.loading import convert
    from tests.parity.mindspore_side import keep_alive

    folder = shutil.copytree(source, tmp_path / "rounded")
    weights = load_file(folder / "model.safetensors")
    rounded = {name: array.astype(dtype).astype(np.float32) for name, array in weights.items()}
    save_file(rounded, folder / "model.safetensors", metadata={"format": "pt"})
    given = []
    for name, options in (("wide", {}), ("half", {"dtype": dtype})):
        convert(folder, tmp_path / name, **options)
        shapes = {"batch_size": BATCH, "cache_tokens": 512, "bucket": 512, "cache_step": 512}
        session = Session(open_checkpoint(tmp_path / name), load_preset("tiny-ask", []), mindspore_cpu, **shapes)
        keep_alive(session.engine.layer)
        encoded = [question.encoded for question in questions[:BATCH]]
        given.append([answer.tokens for answer in session.answer(encoded, Sampling(max_new_tokens=TOKENS))])
    assert given[0] == given[1]
    assert len(set(given[0])) > BATCH / 2
