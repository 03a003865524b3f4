"""Our model against stored values of transformers', so that parity is tested where torch is not installed.

Where torch is installed, the stored values are also compared with a fresh run of the script that made them.
"""

import json

import numpy as np
import pytest

from tests.parity.cases import conversations
from tests.parity.make_goldens import FILE, GOLDENS, make_tokenizer, summarise, write_goldens
from tests.parity.stages import INTEGER_STAGES, relative_error, tolerance

SPREAD = 4
"""A sample's relative error may be this many times the whole stage's."""


@pytest.fixture(scope="module")
def goldens():
    with np.load(GOLDENS / FILE) as file:
        return dict(file)


def test_goldens_are_small_and_say_where_they_come_from(goldens):
    assert sum(file.stat().st_size for file in GOLDENS.iterdir()) < 1_000_000
    provenance = json.loads(str(goldens["provenance"]))
    assert provenance["script"] == "tests/parity/make_goldens.py"
    assert provenance["transformers"] == "4.57.1"
    assert provenance["torch"].startswith("2.")


@pytest.mark.parametrize("name", list(conversations()))
def test_stages(name, ours, goldens):
    stages = [key.split("/")[1] for key in goldens if key.startswith(f"{name}/") and key.count("/") == 1]
    compared = [stage for stage in stages if stage in ours[name]]
    assert compared[:3] == ["pixels", "ids", "labels"]
    assert {"tower", "pooled", "projected", "fused", "layer 0", "layer 1", "norm", "logits"} <= set(compared)
    kept = summarise(ours[name], name)
    for stage in compared:
        key = f"{name}/{stage}"
        if stage in INTEGER_STAGES:
            assert np.array_equal(kept[key], goldens[key]), stage
            continue
        assert kept[f"{key}/size"] == goldens[f"{key}/size"], f"size of {stage}"
        assert kept[f"{key}/norm"] == pytest.approx(float(goldens[f"{key}/norm"]), rel=tolerance(stage)), stage
        assert relative_error(kept[key], goldens[key]) <= SPREAD * tolerance(stage), f"{stage} differs first"


# --- the script ---


def test_script_makes_these_goldens(goldens, tmp_path):
    pytest.importorskip("torch")
    with np.load(write_goldens(tmp_path / "made")) as file:
        made = dict(file)
    assert set(made) == set(goldens)
    for key, value in made.items():
        if key == "provenance":
            continue
        if value.dtype.kind == "i":
            assert np.array_equal(value, goldens[key]), key
        else:
            assert relative_error(value, goldens[key]) <= 1e-5, key


def test_script_makes_this_tokenizer():
    from sentencepiece import SentencePieceProcessor

    stored, made = (
        SentencePieceProcessor(model_proto=data)
        for data in ((GOLDENS / "tokenizer.model").read_bytes(), make_tokenizer())
    )
    assert [stored.id_to_piece(i) for i in range(len(stored))] == [made.id_to_piece(i) for i in range(len(made))]
