"""Which ids end an answer."""

import json

import pytest

from llavanext_cli.errors import CheckpointError
from llavanext_cli.inference.session import load_eos_token_ids


@pytest.mark.parametrize(
    ("named", "ends"), [({}, {2}), (None, {2}), (2, {2}), ([2, 524], {2, 524}), ([524], {2, 524}), ([], {2})]
)
def test_the_tokenizers_and_those_of_generation_config(named, ends, tmp_path):
    content = named if isinstance(named, dict) else {"eos_token_id": named}
    (tmp_path / "generation_config.json").write_text(json.dumps(content))
    assert load_eos_token_ids(tmp_path, 2) == ends


def test_without_a_generation_config(tmp_path):
    assert load_eos_token_ids(tmp_path, 7) == {7}


@pytest.mark.parametrize("named", ["</s>", [2, None], {"a": 1}, True])
def test_what_is_no_id(named, tmp_path):
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": named}))
    with pytest.raises(CheckpointError, match=r"generation_config\.json: eos_token_id must be one id or a list of ids"):
        load_eos_token_ids(tmp_path, 2)
