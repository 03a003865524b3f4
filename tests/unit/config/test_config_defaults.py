"""What a config.json does not say is named when the model does not fit, and only then."""

from __future__ import annotations

from typing import Any

import pytest

from llavanext_cli.config.architecture import Architecture, architecture_to_hf, parse_architecture
from llavanext_cli.config.defaults import name_defaults
from llavanext_cli.errors import CheckpointError

REST = "not in config.json, so transformers' defaults hold: "


def whole() -> dict[str, Any]:
    return architecture_to_hf(Architecture())


def details(config: dict[str, Any]) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        parse_architecture(config, "config.json")
    return caught.value.details


@pytest.mark.parametrize(
    ("missing", "wrong", "line"),
    [
        ("hidden_size", {"num_attention_heads": 31}, "text_config.hidden_size 4096"),
        ("vocab_size", {}, "text_config.vocab_size 32000"),  # <image> is 32001
        (
            "max_position_embeddings",
            {"model_type": "mistral", "sliding_window": 4096},
            "text_config.max_position_embeddings 131072",
        ),
    ],
)
def test_a_size_that_a_fault_is_about_comes_first(missing: str, wrong: dict, line: str) -> None:
    config = whole()
    del config["text_config"][missing], config["vision_config"]["intermediate_size"]
    config["text_config"] |= wrong
    assert details(config)[0] == REST + line


def test_a_size_of_the_tower() -> None:
    config = whole()
    del config["vision_config"]["image_size"]  # 224
    first, *others = details(config)
    assert first == REST + "vision_config.image_size 224"
    assert len(others) == 4  # 672 x 672 is made of tiles of 224 too


@pytest.mark.parametrize(
    ("section", "size"), [("text_config", "hidden_size 4096"), ("vision_config", "hidden_size 1024")]
)
def test_a_section_that_is_missing_comes_first(section: str, size: str) -> None:
    config = whole() | {"projector_hidden_act": "relu"}
    del config[section]
    first = details(config)[0]
    assert first.startswith(f"{section}: is not in config.json, so transformers' defaults hold: {size}, ")
    assert "token_id" not in first


def test_the_id_of_a_token() -> None:
    config = whole() | {"video_token_index": 5}
    config["text_config"]["vocab_size"] = 10
    del config["image_token_index"]
    assert details(config)[0] == REST + "image_token_index 32001"


def test_a_fault_that_has_nothing_to_do_with_it() -> None:
    config = whole() | {"projector_hidden_act": "relu"}
    del config["text_config"]["hidden_size"]
    assert len(details(config)) == 1


def test_without_faults_all_sizes_are_named() -> None:
    config = whole()
    assert name_defaults(config, Architecture()) == []
    del config["text_config"]["hidden_size"], config["vision_config"]["patch_size"]
    assert name_defaults(config, Architecture()) == [REST + "vision_config.patch_size 14, text_config.hidden_size 4096"]
