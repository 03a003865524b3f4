"""A model's config.json: read with transformers' defaults, refused by name, written back."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llavanext_cli.config.architecture import (
    Architecture,
    TextArchitecture,
    VisionArchitecture,
    architecture_to_hf,
    load_architecture,
    parse_architecture,
)
from llavanext_cli.errors import CheckpointError

# What llava-hf/LLaVA-NeXT-Video-7B-hf has in its config.json, with stray keys of an early revision.
PUBLISHED = {
    "architectures": ["LlavaNextVideoForConditionalGeneration"],
    "ignore_index": -100,
    "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
    "image_token_index": 32001,
    "model_type": "llava_next_video",
    "projector_hidden_act": "gelu",
    "spatial_pool_mode": "average",
    "spatial_pool_stride": 2,
    "text_config": {
        "_name_or_path": "lmsys/vicuna-7b-v1.5",
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "rope_scaling_factor": 2,
        "rope_scaling_type": "linear",
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "use_image_newline_parameter": True,
    "video_token_index": 32000,
    "vision_config": {
        "hidden_size": 1024,
        "image_size": 336,
        "intermediate_size": 4096,
        "model_type": "clip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 24,
        "patch_size": 14,
        "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2,
    "vision_feature_select_strategy": "default",
}


def published(**changes: Any) -> dict[str, Any]:
    """The published config with keys changed; `text` and `vision` change the nested ones."""
    config = json.loads(json.dumps(PUBLISHED))
    config["text_config"].update(changes.pop("text", {}))
    config["vision_config"].update(changes.pop("vision", {}))
    return config | changes


def faults(config: Any) -> tuple[str, ...]:
    with pytest.raises(CheckpointError) as caught:
        parse_architecture(config, "config.json")
    assert str(caught.value).startswith("config.json: ")
    return caught.value.details


def test_the_published_model_is_the_default() -> None:
    assert parse_architecture(published(), "x") == Architecture()


def test_absent_sections_have_transformers_defaults() -> None:
    bare = parse_architecture({"model_type": "llava_next_video", "video_token_index": 5, "image_token_index": 6}, "x")
    assert bare.vision == VisionArchitecture()
    assert bare.text == TextArchitecture(vocab_size=32000, max_position_embeddings=2048, rms_norm_eps=1e-6)
    clip = parse_architecture(published() | {"vision_config": {"image_size": 336, "patch_size": 14}}, "x").vision
    assert (clip.hidden_size, clip.num_hidden_layers, clip.intermediate_size) == (768, 12, 3072)


def test_defaults_agree_with_transformers() -> None:
    """The numbers above come from transformers' own classes."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextVideoConfig, MistralConfig

    bare = LlavaNextVideoConfig().to_dict()
    ours = parse_architecture(published() | {"vision_config": None, "text_config": {"vocab_size": 32064}}, "x")
    for section, kind in (("vision", CLIPVisionConfig), ("text", LlamaConfig)):
        mine = getattr(ours, section)
        theirs = bare[f"{section}_config"] if section == "vision" else kind(vocab_size=32064).to_dict()
        for name, value in vars(mine).items():
            if value is not None and theirs.get(name) is not None:
                assert value == theirs[name], (section, name)
    mistral = MistralConfig(sliding_window=None, vocab_size=32064).to_dict()
    text = {"model_type": "mistral", "sliding_window": None, "vocab_size": 32064}
    mine = parse_architecture(published() | {"text_config": text}, "x").text
    for name, value in vars(mine).items():
        if mistral.get(name) is not None:
            assert value == mistral[name], name


def test_a_picture_model_has_no_token_for_clips() -> None:
    config = published(model_type="llava_next", image_token_index=32000)
    del config["video_token_index"]
    architecture = parse_architecture(config, "x")
    assert (architecture.image_token_index, architecture.video_token_index) == (32000, 32000)


@pytest.mark.parametrize(
    ("text", "scaling", "theta"),
    [
        ({"rope_scaling": None}, None, 1e4),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, {"type": "linear", "factor": 2.5}, 1e4),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, {"type": "linear", "factor": 2.0}, 1e4),
        ({"rope_scaling": {"rope_type": "default"}}, None, 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None, 5e5),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, "rope_theta": 3.0},
            {"type": "linear", "factor": 4.0},
            1e6,
        ),
    ],
)
def test_rotary_scaling_in_both_spellings(text: dict, scaling: dict | None, theta: float) -> None:
    parsed = parse_architecture(published(text=text), "x").text
    assert (parsed.rope_scaling, parsed.rope_theta) == (scaling, theta)


def test_other_spellings_of_the_same() -> None:
    config = published(vision_feature_layer=[-2], image_token_id=32001, text={"eos_token_id": [2], "pad_token_id": -1})
    del config["image_token_index"]
    assert parse_architecture(config, "x") == Architecture()


def test_mistral_is_llama_with_grouped_heads() -> None:
    mistral = {
        "model_type": "mistral",
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "num_key_value_heads": 8,
        "rope_theta": 1e6,
        "sliding_window": None,
        "vocab_size": 32064,
    }
    text = parse_architecture(published() | {"text_config": mistral}, "x").text
    assert (text.model_type, text.num_key_value_heads, text.head_dim) == ("mistral", 8, 128)
    assert text.intermediate_size == 14336
    wide = mistral | {"sliding_window": 32768}
    assert parse_architecture(published() | {"text_config": wide}, "x").text == text
    narrow = mistral | {"sliding_window": 4096}
    assert faults(published() | {"text_config": narrow}) == (
        "text_config.sliding_window: 4096 is not supported; supported: null, or at least max_position_embeddings "
        "(32768)",
    )


REFUSED = [
    ({"text": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers: must be a whole number of at most 1000"),
    ({"vision": {"image_size": 10**12}}, "vision_config.image_size: must be a whole number of at most 2147483647"),
    ({"text": {"model_type": "qwen2"}}, "text_config.model_type: 'qwen2' is not supported; supported: llama, mistral"),
    ({"text": {"hidden_act": "gelu"}}, "text_config.hidden_act: 'gelu' is not supported; supported: silu"),
    ({"text": {"attention_bias": True}}, "text_config.attention_bias: True is not supported; supported: False"),
    ({"text": {"mlp_bias": True}}, "text_config.mlp_bias: True is not supported; supported: False"),
    ({"text": {"head_dim": 64}}, "text_config.head_dim: 64 is not hidden_size / heads = 128"),
    ({"text": {"hidden_size": 4097}}, "text_config.num_attention_heads: 32 heads do not divide hidden_size 4097"),
    ({"text": {"hidden_size": 96}}, "text_config.num_attention_heads: hidden_size 96 gives heads that have no halves"),
    ({"text": {"num_key_value_heads": 5}}, "text_config.num_key_value_heads: 5 does not divide the 32 attention heads"),
    ({"text": {"num_hidden_layers": 0}}, "text_config.num_hidden_layers: must be a whole number of at least 1, not 0"),
    ({"text": {"vocab_size": "many"}}, "text_config.vocab_size: must be a whole number of at least 1, not 'many'"),
    ({"text": {"rope_theta": 10**4000}}, "text_config.rope_theta: must be a positive number, not 1000"),
    ({"text": {"rms_norm_eps": float("nan")}}, "text_config.rms_norm_eps: must be a positive number, not nan"),
    (
        {"text": {"rope_scaling": {"type": "yarn", "factor": 2}}},
        "text_config.rope_scaling.type: 'yarn' is not supported; supported: linear, default",
    ),
    (
        {"text": {"rope_scaling": {"type": "linear"}}},
        "text_config.rope_scaling.factor: linear scaling needs a number of at least 1, not None",
    ),
    (
        {"text": {"rope_scaling": {"type": "linear", "factor": 0.5}}},
        "text_config.rope_scaling.factor: linear scaling needs a number of at least 1, not 0.5",
    ),
    (
        {"text": {"rope_scaling": {"factor": 2.0}}},
        "text_config.rope_scaling.type: is missing beside a factor; supported: linear, default",
    ),
    ({"text": {"rope_scaling": "linear"}}, "text_config.rope_scaling: must be an object or null, not 'linear'"),
    ({"text": {"eos_token_id": [1, 2]}}, "text_config.eos_token_id: must be one token id, not [1, 2]"),
    (
        {"vision": {"model_type": "siglip_vision_model"}},
        "vision_config.model_type: 'siglip_vision_model' is not supported; supported: clip_vision_model",
    ),
    (
        {"vision": {"hidden_act": "relu"}},
        "vision_config.hidden_act: 'relu' is not supported; supported: quick_gelu, gelu",
    ),
    (
        {"vision": {"patch_size": 16, "image_size": 330}},
        "vision_config.image_size: 330 is not a multiple of patch_size 16",
    ),
    (
        {"vision": {"num_attention_heads": 7}},
        "vision_config.num_attention_heads: 7 heads do not divide hidden_size 1024",
    ),
    ({"vision": {"num_channels": 1}}, "vision_config.num_channels: 1 is not supported; supported: 3"),
    ({"projector_hidden_act": "relu"}, "projector_hidden_act: 'relu' is not supported; supported: quick_gelu, gelu"),
    ({"spatial_pool_mode": "median"}, "spatial_pool_mode: 'median' is not supported; supported: average, max"),
    ({"spatial_pool_stride": 25}, "spatial_pool_stride: 25 is more than the 24 patches along a tile"),
    (
        {"spatial_pool_mode": "conv", "spatial_pool_out_channels": 512},
        "spatial_pool_out_channels: 512 is not supported; supported: 1024",
    ),
    (
        {"vision_feature_select_strategy": "cls"},
        "vision_feature_select_strategy: 'cls' is not supported; supported: default, full",
    ),
    ({"vision_feature_layer": [-2, -5]}, "vision_feature_layer: [-2, -5] is not supported; supported: one layer"),
    ({"vision_feature_layer": 25}, "vision_feature_layer: 25 is outside a tower of 24 layers"),
    ({"image_grid_pinpoints": [[336, 500]]}, "image_grid_pinpoints: [336, 500] is not a multiple of the tile's 336"),
    ({"image_grid_pinpoints": []}, "image_grid_pinpoints: must be a list of [height, width], not []"),
    ({"image_grid_pinpoints": [336]}, "image_grid_pinpoints: must hold [height, width] in pixels, not 336"),
    ({"image_token_index": 32064}, "image_token_index: 32064 is outside the vocabulary of 32064"),
    ({"image_token_index": 32000}, "video_token_index: is 32000, the same as image_token_index"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings: is true while text_config.tie_word_embeddings is not"),
    ({"use_image_newline_parameter": False}, "use_image_newline_parameter: False is not supported; supported: True"),
    ({"multimodal_projector_bias": "yes"}, "multimodal_projector_bias: must be true or false, not 'yes'"),
    ({"text_config": 7}, "text_config: must be an object, not 7"),
    ({"vision_config": []}, "vision_config: must be an object, not []"),
    (
        {"architectures": ["FooForCausalLM"]},
        "architectures: ['FooForCausalLM'] is not supported; supported: LlavaNextVideoForConditionalGeneration, Llava",
    ),
    (
        {"text": {"architectures": ["Qwen2ForCausalLM"]}},
        "text_config.architectures: ['Qwen2ForCausalLM'] is not supported; supported: LlamaForCausalLM, Mistral",
    ),
    (
        {"vision": {"architectures": "SiglipVisionModel"}},
        "vision_config.architectures: 'SiglipVisionModel' is not supported; supported: CLIPVisionModel, CLIP",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message.split(":")[0] for _, message in REFUSED])
def test_what_cannot_be_computed_is_refused_by_name(changes: dict, message: str) -> None:
    found = faults(published(**changes))
    assert any(line.startswith(message) for line in found) and max(map(len, found)) <= 300


def test_all_faults_at_once() -> None:
    config = published(text={"hidden_act": "relu", "mlp_bias": True}, vision={"num_channels": 4}, spatial_pool_mode="x")
    assert len(faults(config)) == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"text": {"hidden_size": True, "num_attention_heads": 5, "num_key_value_heads": 5}},
        {"text": {"rope_scaling": {"type": "linear", "factor": "2"}}},
        {"text": {"vocab_size": "10"}, "image_token_index": 99999},
        {"text": {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}},
        {"text": {"model_type": "mistral", "max_position_embeddings": "many", "sliding_window": 8}},
        {"vision": {"image_size": 0}, "image_grid_pinpoints": [[335, 335], [7, 7]], "spatial_pool_stride": 99},
        {"vision": {"hidden_size": -1}, "spatial_pool_mode": "conv", "spatial_pool_out_channels": 9},
        {"vision": {"num_hidden_layers": None, "num_attention_heads": 1.5}},
        {"vision_config": "clip", "image_grid_pinpoints": [[28, 28]]},
    ],
)
def test_what_follows_from_a_wrong_value_is_not_said_as_well(changes: dict) -> None:
    assert len(faults(published(**changes))) == 1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "LlavaLlamaForCausalLM", "LlamaModel"])
def test_classes_of_published_models(name: str) -> None:
    config = published(text={"architectures": [name]}, vision={"architectures": ["CLIPVisionModel"]})
    config["architectures"] = ["LlavaNextForConditionalGeneration"]
    assert parse_architecture(config, "x") == Architecture()


@pytest.mark.parametrize("config", [{}, {"model_type": "llava"}, {"model_type": ["llava_next"]}])
def test_another_model_type(config: dict) -> None:
    assert "supported: llava_next_video, llava_next" in faults(config)[0]


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": TextArchitecture(num_key_value_heads=8, rope_scaling={"type": "linear", "factor": 2.5})},
        {"text": TextArchitecture(tie_word_embeddings=True, rope_theta=5e5, pad_token_id=31999)},
        {"text": TextArchitecture(model_type="mistral", num_key_value_heads=8)},
        {"vision": VisionArchitecture(image_size=28, hidden_act="gelu"), "image_grid_pinpoints": ((28, 56),)},
        {"pool_before_projector": False, "spatial_pool_mode": "max", "vision_feature_layer": -1},
        {"vision_feature_select_strategy": "full", "multimodal_projector_bias": False},
    ],
)
def test_written_and_read_again(changes: dict) -> None:
    architecture = replace(Architecture(), **changes)
    written = json.loads(json.dumps(architecture_to_hf(architecture)))
    assert parse_architecture(written, "x") == architecture


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    for text, message in ((None, "no config.json"), ("{", "not a JSON file"), ("[]", "a JSON object is expected")):
        if text is not None:
            (tmp_path / "config.json").write_text(text)
        with pytest.raises(CheckpointError, match=message):
            load_architecture(tmp_path)
    os.truncate(tmp_path / "config.json", 600_000_000)  # takes no room
    with pytest.raises(CheckpointError, match="more than 16777216 bytes"):
        load_architecture(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED))
    assert load_architecture(tmp_path) == Architecture()
