"""A model's config.json: read with transformers' defaults, refused by name, written back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from llavanext_cli.config.architecture import Architecture, RopeScaling, TextArchitecture, VisionArchitecture
from llavanext_cli.config.hf_config import architecture_to_hf, name_defaults, parse_architecture
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


@pytest.mark.parametrize(
    ("text", "scaling", "theta"),
    [
        ({"rope_scaling": None}, None, 1e4),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, RopeScaling("linear", 2.5), 1e4),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2}}, RopeScaling("linear", 2.0), 1e4),
        ({"rope_scaling": {"rope_type": "default"}}, None, 1e4),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, None, 5e5),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6}, "rope_theta": 3.0},
            RopeScaling("linear", 4.0),
            1e6,
        ),
    ],
)
def test_rotary_scaling_in_both_spellings(text: dict, scaling: RopeScaling | None, theta: float) -> None:
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
        "text_config.sliding_window: expected null, or at least max_position_embeddings (32768), not 4096",
    )


REFUSED = {  # key = value: what is said of the key, or of another one
    "text_config.num_hidden_layers = 1000000000": "must be at most 1000, not 1000000000",
    "vision_config.image_size = 1000000000000": "must be at most 2147483647, not 1e+12 (pixels",
    'text_config.model_type = "qwen2"': "expected llama or mistral, not 'qwen2'",
    'text_config.hidden_act = "gelu"': "only 'silu' is supported, not 'gelu'",
    "text_config.attention_bias = true": "only false is supported, not true",
    "text_config.head_dim = 64": "only 128 is supported, not 64",
    "text_config.hidden_size = 96": (
        "text_config.num_attention_heads: hidden_size 96 divided by 32 heads must be an even integer"
    ),
    "text_config.num_key_value_heads = 5": "the 32 attention heads are not a multiple of 5",
    'text_config.vocab_size = "many"': "expected a whole number, not 'many'",
    'text_config.rope_scaling = {"type": "yarn", "factor": 2}': (
        "text_config.rope_scaling.type: expected linear, not 'yarn'"
    ),
    'text_config.rope_scaling = {"type": "linear"}': (
        "text_config.rope_scaling.factor: missing: factor by which positions reach further"
    ),
    'text_config.rope_scaling = {"type": "linear", "factor": 0.5}': (
        "text_config.rope_scaling.factor: must be at least 1, not 0.5 ("
    ),
    'text_config.rope_scaling = {"factor": 2.0}': "text_config.rope_scaling.type: missing: how positions are scaled",
    'text_config.rope_scaling = "linear"': "expected a mapping of keys to values, not 'linear'",
    'text_config.rope_parameters = {"rope_type": "linear", "factor": 2, "partial_rotary_factor": 0.5}': (
        "text_config.rope_parameters.partial_rotary_factor: only 1.0 is supported, not 0.5"
    ),
    "text_config.eos_token_id = [1, 2]": "expected a whole number, not [1, 2]",
    "text_config.eos_token_id = 32064": "token 32064 is outside the vocabulary of 32064",
    'vision_config.model_type = "siglip"': "only 'clip_vision_model' is supported, not 'siglip'",
    'vision_config.hidden_act = "relu"': "expected quick_gelu or gelu, not 'relu'",
    "vision_config.patch_size = 15": "vision_config.image_size: 336 is not a multiple of patch_size 15",
    "vision_config.num_channels = 1": "only 3 is supported, not 1",
    'spatial_pool_mode = "conv"; spatial_pool_out_channels = 512': (
        "spatial_pool_out_channels: only 1024 is supported, not 512"
    ),
    'spatial_pool_mode = "conv"; pool_before_projector = false': (
        "pool_before_projector: must be true with spatial_pool_mode conv"
    ),
    "vision_feature_layer = [-2, -5]": "expected a whole number, not [-2, -5]",
    "image_grid_pinpoints = [[336, 500]]": "[336, 500] is not a multiple of the tile's 336 pixels",
    "image_token_index = 32064": "token 32064 is outside the vocabulary of 32064",
    "image_token_index = 32000": "video_token_index: is 32000, the same as image_token_index",
    "tie_word_embeddings = true": "is true while text_config.tie_word_embeddings is not",
    "use_image_newline_parameter = false": "only true is supported, not false",
    "text_config = 7": "expected a mapping, not 7",
    "vision_config = []": "expected a mapping, not []",
    'architectures = ["FooForCausalLM"]': "only LlavaNextVideoForConditionalGeneration, Llava",
    'text_config.architectures = ["Qwen2ForCausalLM"]': "only LlamaForCausalLM, Mistral",
    'vision_config.architectures = "SiglipVisionModel"': "only CLIPVisionModel, CLIP",
}


def changed(settings: str) -> dict[str, Any]:
    """The published config with settings such as `text_config.mlp_bias = true`."""
    config = published()
    for setting in settings.split("; "):
        key, value = setting.split(" = ")
        section, _, name = key.rpartition(".")
        (config[section] if section else config)[name] = json.loads(value)
    return config


@pytest.mark.parametrize("settings", REFUSED)
def test_unsupported_values_are_refused_by_name(settings: str) -> None:
    found, message = faults(changed(settings)), REFUSED[settings]
    key = settings.partition(" = ")[0]
    assert any(line.startswith((message, f"{key}: {message}")) for line in found), found
    assert max(map(len, found)) <= 300


def test_all_faults_at_once() -> None:
    config = published(text={"hidden_act": "relu", "mlp_bias": True}, vision={"num_channels": 4}, spatial_pool_mode="x")
    assert len(faults(config)) == 4


@pytest.mark.parametrize(
    "settings",
    [
        "text_config.hidden_size = true; text_config.num_attention_heads = 5; text_config.num_key_value_heads = 5",
        'text_config.rope_scaling = {"type": "linear", "factor": "2"}',
        'text_config.vocab_size = "10"; image_token_index = 99999',
        'text_config.model_type = "qwen2"; text_config.architectures = ["Qwen2ForCausalLM"]',
        'text_config.model_type = "mistral"; text_config.max_position_embeddings = "x"; text_config.sliding_window = 8',
        "vision_config.image_size = 0; image_grid_pinpoints = [[335, 335], [7, 7]]; spatial_pool_stride = 99",
        'vision_config.hidden_size = -1; spatial_pool_mode = "conv"; spatial_pool_out_channels = 9',
        "vision_config.num_hidden_layers = null; vision_config.num_attention_heads = 1.5",
        'vision_config = "clip"; image_grid_pinpoints = [[28, 28]]',
    ],
)
def test_what_follows_from_an_invalid_value_is_not_reported(settings: str) -> None:
    assert len(faults(changed(settings))) == 1


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MistralForCausalLM", "LlavaLlamaForCausalLM", "LlamaModel"])
def test_classes_of_published_models(name: str) -> None:
    config = published(text={"architectures": [name]}, vision={"architectures": ["CLIPVisionModel"]})
    config["architectures"] = ["LlavaNextForConditionalGeneration"]
    assert parse_architecture(config, "x") == Architecture()


@pytest.mark.parametrize("config", [{}, {"model_type": "llava"}, {"model_type": ["llava_next"]}])
def test_another_model_type(config: dict) -> None:
    assert faults(config)[0].startswith("model_type: expected llava_next_video or llava_next, not ")


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"text": TextArchitecture(num_key_value_heads=8, rope_scaling=RopeScaling("linear", 2.5))},
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


# --- what a config.json leaves to transformers' defaults

REST = "not in config.json, so transformers' defaults are used: "


@pytest.mark.parametrize(
    ("missing", "wrong", "named"),
    [
        ("text_config.hidden_size", {"text": {"num_attention_heads": 31}}, "text_config.hidden_size 4096"),
        ("text_config.vocab_size", {}, "text_config.vocab_size 32000"),  # <image> is 32001
        (
            "text_config.max_position_embeddings",
            {"text": {"model_type": "mistral", "sliding_window": 4096, "vocab_size": 32064}},
            "text_config.max_position_embeddings 131072",
        ),
        ("vision_config.image_size", {}, "vision_config.image_size 224"),
        ("image_token_index", {"video_token_index": 5, "text": {"vocab_size": 10}}, "image_token_index 32001"),
        ("text_config", {}, "text_config.vocab_size 32000"),
    ],
)
def test_a_missing_size_that_a_problem_is_about_comes_first(missing: str, wrong: dict, named: str) -> None:
    config = json.loads(json.dumps(architecture_to_hf(Architecture())))
    for name, value in wrong.items():
        config |= {"text_config": config["text_config"] | value} if name == "text" else {name: value}
    del config["vision_config"]["intermediate_size"]  # no problem is about this one
    section, _, name = missing.rpartition(".")
    del (config[section] if section else config)[name]
    assert faults(config)[0] == REST + named


def test_without_problems_all_missing_sizes_are_named() -> None:
    config = architecture_to_hf(Architecture())
    assert name_defaults(config, Architecture()) == []
    del config["text_config"]["hidden_size"], config["vision_config"]["patch_size"]
    assert name_defaults(config, Architecture()) == [REST + "vision_config.patch_size 14, text_config.hidden_size 4096"]
