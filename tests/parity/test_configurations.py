"""Models beyond the 7B, each against transformers; what cannot be computed is refused when the checkpoint is opened."""

import json

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.checkpoint import open_checkpoint
from tests import loading
from tests.parity.cases import ANSWER_TOKENS, QUESTIONS, build_cases
from tests.parity.models import tiny_config, write_hf_folder
from tests.parity.stages import TABLE, check_stages, gradient_errors, tolerance
from tests.parity.variants import CACHED, COMBINED, MEDIA_CASES, ODD_GRID, SMALLER, VARIANTS, combine


@pytest.fixture
def both_sides(mindspore_cpu, tmp_path):
    """`make(changes, cases)` gives our converted model and transformers' of the same weights."""

    def make(changes, cases=MEDIA_CASES, *, changes_there=None):
        from tests.parity.mindspore_side import Model
        from tests.parity.torch_side import Reference

        source = write_hf_folder(tmp_path / "hub", tiny_config(SMALLER | changes))
        theirs = source
        if changes_there:
            theirs = write_hf_folder(tmp_path / "theirs", tiny_config(SMALLER | changes | changes_there))
        return Model(source, tmp_path / "converted", cases), Reference(theirs)

    return make


@pytest.mark.parametrize(
    "names", [*COMBINED, *[pytest.param((name,), marks=pytest.mark.full) for name in VARIANTS]], ids=" + ".join
)
def test_stages(names, both_sides):
    from tests.parity.mindspore_side import Forward

    variant, name = combine(names), " + ".join(names)
    model, reference = both_sides(variant.changes, variant.cases)
    assert {case.name for case in model.cases} == set(variant.cases)
    for case, stages in zip(model.cases, Forward(model).stages(model.cases), strict=True):
        theirs = reference.stages(case)
        assert set(theirs) - {"loss"} <= set(stages)
        check_stages(name, stages, theirs)


def test_every_variant_is_in_a_combination():
    assert sorted(name for names in COMBINED for name in names) == sorted(VARIANTS)


@pytest.mark.parametrize(
    "names",
    [
        ("pooling conv", "grouped queries", "tied embeddings"),
        pytest.param(("pooling max", "feature strategy full"), marks=pytest.mark.full),
    ],
    ids=" + ".join,
)
def test_loss_and_gradients(names, both_sides):
    from tests.parity.mindspore_side import Learning, hub_gradients

    variant, name = combine(names), "gradients: " + " + ".join(names)
    model, reference = both_sides(variant.changes, variant.cases)
    learning = Learning(model)
    for case in model.cases:
        loss, gradients = learning([case.encoded])
        their_loss, theirs = reference.gradients(case)
        gradients = hub_gradients(model, gradients)
        assert all(not theirs[weight].any() for weight in set(theirs) - set(gradients))
        errors = gradient_errors(gradients, theirs)
        TABLE.add(name, "loss", abs(loss - their_loss) / their_loss)
        TABLE.add(name, "gradients", max(errors.values()))
        assert loss == pytest.approx(their_loss, rel=tolerance("loss"))
        assert {weight: error for weight, error in errors.items() if error > tolerance("gradients")} == {}


def test_full_strategy_is_beyond_transformers(both_sides):
    """Why its row is computed with a small repair: by itself transformers cannot, neither images nor videos."""
    from transformers import LlavaNextVideoForConditionalGeneration

    model, reference = both_sides(VARIANTS["feature strategy full"].changes, ("100x99", "video"))
    untouched = LlavaNextVideoForConditionalGeneration(reference.config).eval()
    for case in model.cases:
        with pytest.raises(RuntimeError, match="size"):
            untouched(**reference.inputs(case))


@pytest.mark.full
def test_greedy_tokens_with_the_cache(both_sides, mindspore_cpu, monkeypatch):
    """Grouped queries and scaled positions, in the cell that has a cache."""
    from llavanext_cli.config.presets import load_preset
    from llavanext_cli.inference.sampling import Sampling
    from llavanext_cli.inference.session import Session, load_eos_token_ids
    from llavanext_cli.model import runtime
    from tests.parity.mindspore_side import keep_alive

    monkeypatch.setattr(runtime, "load_libraries", lambda *args, **options: None)  # they are
    model, reference = both_sides(CACHED, QUESTIONS)
    questions = build_cases(model.processor, QUESTIONS, question=True)
    answers = [reference.generate(case, ANSWER_TOKENS) for case in questions]
    assert max(map(len, answers)) == ANSWER_TOKENS and len(set(map(tuple, answers))) == len(answers)
    session = Session(
        model.checkpoint, load_preset("tiny-ask", []), mindspore_cpu, batch_size=4, cache_tokens=model.length
    )
    keep_alive(session.engine.layer)
    encoded = [case.encoded for case in questions]
    given = session.answer(encoded, Sampling(max_new_tokens=ANSWER_TOKENS))
    assert [list(answer.tokens) for answer in given] == answers
    # A generation_config.json may name several ids that end an answer.
    ends = [2, answers[0][ANSWER_TOKENS // 4]]
    (model.checkpoint.folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
    session.ends = load_eos_token_ids(model.checkpoint.folder, session.tokenizer.eos_id)
    given = session.answer(encoded, Sampling(max_new_tokens=ANSWER_TOKENS))
    shorter = [reference.generate(case, ANSWER_TOKENS, ends) for case in questions]
    assert [list(answer.tokens) for answer in given] == shorter != answers
    assert given[0].finish == "stop"


# --- numerics of the original training code, which transformers does not have ---


ORIGINAL = {
    "project, then pool": {"pool_before_projector": False},
    "bilinear pooling": {"spatial_pool_mode": "interpolate", **ODD_GRID},
}


@pytest.mark.parametrize(
    "names", [tuple(ORIGINAL), *[pytest.param((name,), marks=pytest.mark.full) for name in ORIGINAL]], ids=" + ".join
)
def test_original_numerics(names, both_sides):
    from tests.parity import torch_side
    from tests.parity.mindspore_side import Forward

    changes = {key: value for name in names for key, value in ORIGINAL[name].items()}
    model, reference = both_sides(changes, ("video", "image and video"), changes_there={"spatial_pool_mode": "average"})
    if "bilinear pooling" in names:
        torch_side.interpolate(reference)
    plain = [reference.stages(case)["logits"] for case in model.cases]
    if "project, then pool" in names:
        torch_side.project_first(reference)
    for case, stages, logits in zip(model.cases, Forward(model).stages(model.cases), plain, strict=True):
        theirs = reference.stages(case)
        if "project, then pool" in names:
            del theirs["pooled"]  # recorded before it is pooled
            assert np.abs(theirs["logits"] - logits).max() > 0.1, "the order makes no difference here"
        check_stages(f"original: {' + '.join(names)}", stages, theirs)


def test_what_cannot_be_computed_is_refused_when_a_checkpoint_is_opened(tmp_path):
    """After its config.json was edited; tests/unit/config/test_config_hf.py has the list of what is refused."""
    loading.convert(write_hf_folder(tmp_path / "hub", tiny_config()), tmp_path / "converted")
    (tmp_path / "converted" / "config.json").write_text(json.dumps(tiny_config({"projector_hidden_act": "relu"})))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(tmp_path / "converted")
    assert [line for line in caught.value.details if "projector_hidden_act" in line and "quick_gelu" in line]
