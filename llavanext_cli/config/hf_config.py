"""A Hugging Face config.json, read into an `Architecture` and written from one.

Reached through `load_architecture` and `parse_architecture` in `config.architecture`. Everything that is wrong with a
file is reported at once.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import (
    ACTIVATIONS,
    MODEL_TYPES,
    POOL_MODES,
    SELECT_STRATEGIES,
    TEXT_MODEL_TYPES,
    Architecture,
    TextArchitecture,
    VisionArchitecture,
)
from llavanext_cli.config.defaults import CLIP_DEFAULTS, IMAGE_TOKEN_DEFAULTS, TEXT_DEFAULTS, name_defaults
from llavanext_cli.config.rope import parse_rope_scaling, parse_rope_theta
from llavanext_cli.config.sections import MOST, MOST_LAYERS, SectionReader, is_int
from llavanext_cli.errors import CheckpointError

VISION_MODEL_TYPES = ("clip_vision_model",)
REFETCH = "Fetch the file again: `llavanext fetch` checks each file's size and digest."
JSON_LIMIT = 16 << 20
"""Bytes of a config.json, and of any other JSON file of a model."""
TOP_CLASSES = ("LlavaNextVideoForConditionalGeneration", "LlavaNextForConditionalGeneration")
TEXT_CLASSES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "LlamaModel", "MistralModel"),
    *("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"),  # the authors' own
)
VISION_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")


def read_config(folder: str | Path, name: str = "config.json") -> dict[str, Any]:
    """Parse a folder's `config.json`, or another of its files of settings.

    Raises:
        CheckpointError: there is none, or it holds no JSON object.
    """
    path = Path(folder) / name
    if path.exists() and not path.is_file():  # a pipe would be waited for
        raise CheckpointError(f"{path}: is no regular file", REFETCH)
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path}: more than {JSON_LIMIT} bytes", REFETCH)
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{folder}: no {name}", "Name a folder that holds a model: weights, config.json and tokenizer."
        ) from None
    except OSError as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error.strerror})", "Is it yours to read, and is the disk well?"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})", REFETCH) from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, not {type(config).__name__}", REFETCH)
    return config


def parse_architecture(config: Any, where: str) -> Architecture:
    """Read the architecture from the content of a Hugging Face config.json.

    Keys that the computation does not depend on are ignored, as transformers does; a value that would change the
    computation in a way the model cannot follow is refused by name.

    Args:
        config: the parsed JSON.
        where: the file's name, for the message.

    Raises:
        CheckpointError: with one line in `details` for each fault.
    """
    faults: list[str] = []
    if not isinstance(config, dict):
        raise CheckpointError(f"{where}: a JSON object is expected, not {type(config).__name__}", REFETCH)
    top = SectionReader(config, "", faults)
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        what = "is missing" if model_type is None else f"{model_type!r} is not supported"
        raise CheckpointError(
            f"{where}: this is no LLaVA-NeXT model",
            "`llavanext fetch --list` names the models that can be used.",
            details=[f"model_type: {what}; supported: {', '.join(MODEL_TYPES)}"],
        )
    for section in ("vision_config", "text_config"):
        if config.get(section) is not None and not isinstance(config[section], dict):
            top.fault(section, f"must be an object, not {config[section]!r}")
    top.names("architectures", TOP_CLASSES)
    vision = parse_vision_section(_section(config, "vision_config", faults))
    text = parse_text_section(_section(config, "text_config", faults))
    if config.get("tie_word_embeddings") is True and not text.tie_word_embeddings:
        top.fault("tie_word_embeddings", "is true while text_config.tie_word_embeddings is not; they must agree")
    # transformers always builds the newline; a model without it would need other feature tables.
    top.must_be("use_image_newline_parameter", True)
    if config.get("spatial_pool_mode") == "conv" and top.is_sound("vision_config.hidden_size"):
        top.must_be("spatial_pool_out_channels", vision.hidden_size)

    image_token = _token(top, "image_token", IMAGE_TOKEN_DEFAULTS[model_type], text.vocab_size)
    # A picture-only model has no token for clips. Its picture token stands in: what fills a position is decided by
    # the feature index, never by the id.
    video_default = 32000 if model_type == "llava_next_video" else image_token
    video_token = _token(top, "video_token", video_default, text.vocab_size)
    if model_type == "llava_next_video" and image_token == video_token:
        top.fault("video_token_index", f"is {video_token}, the same as image_token_index")

    if config.get("spatial_pool_mode") == "conv" and config.get("pool_before_projector") is False:
        top.fault("pool_before_projector", "is false, and a convolution pools what the tower gives, not the projector")
    stride = top.count("spatial_pool_stride", 2)
    if stride > vision.patches and top.is_sound("vision_config.image_size", "vision_config.patch_size"):
        top.fault("spatial_pool_stride", f"{stride} is more than the {vision.patches} patches along a tile")
    architecture = Architecture(
        vision=vision,
        text=text,
        image_token_index=image_token,
        video_token_index=video_token,
        image_grid_pinpoints=_parse_pinpoints(top, vision.image_size),
        projector_hidden_act=top.choice("projector_hidden_act", "gelu", ACTIVATIONS),
        multimodal_projector_bias=top.flag("multimodal_projector_bias", True),
        spatial_pool_mode=top.choice("spatial_pool_mode", "average", POOL_MODES),
        spatial_pool_stride=stride,
        vision_feature_layer=_parse_feature_layer(top, vision.num_hidden_layers),
        vision_feature_select_strategy=top.choice("vision_feature_select_strategy", "default", SELECT_STRATEGIES),
        pool_before_projector=top.flag("pool_before_projector", True),
    )
    raise_faults(faults, where, name_defaults(config, architecture, faults) if faults else ())
    return architecture


def raise_faults(faults: list[str], where: str, remarks: Sequence[str] = ()) -> None:
    """Raise CheckpointError with all the lines, if there are any; the remarks come first."""
    if faults:
        raise CheckpointError(
            f"{where}: {len(faults)} setting{'s' if len(faults) > 1 else ''} of this model cannot be used",
            "Only models whose every setting is understood are converted: a guess would give wrong answers.",
            [*remarks, *(line if len(line) <= 300 else f"{line[:297]}..." for line in faults[:20])],
        )


def _section(config: dict[str, Any], name: str, faults: list[str]) -> SectionReader:
    section = config.get(name)
    if name == "vision_config" and section is None:
        section = {f.name: f.default for f in fields(VisionArchitecture)}
    return SectionReader(section if isinstance(section, dict) else {}, f"{name}.", faults)


def _kind(reader: SectionReader, supported: tuple[str, ...], classes: tuple[str, ...]) -> str:
    """The model_type of a section, the first where it says none."""
    kind = reader.choice("model_type", supported[0], supported)
    if reader.is_sound("model_type"):
        reader.names("architectures", classes)
    return kind


def parse_vision_section(reader: SectionReader) -> VisionArchitecture:
    _kind(reader, VISION_MODEL_TYPES, VISION_CLASSES)
    reader.must_be("num_channels", 3)
    vision = VisionArchitecture(
        **{
            key: reader.count(key, default, most=MOST_LAYERS if key == "num_hidden_layers" else MOST)
            for key, default in CLIP_DEFAULTS.items()
        },
        hidden_act=reader.choice("hidden_act", "quick_gelu", ACTIVATIONS),
        layer_norm_eps=reader.positive("layer_norm_eps", 1e-5),
    )
    if reader.is_sound("hidden_size", "num_attention_heads") and vision.hidden_size % vision.num_attention_heads:
        reader.fault(
            "num_attention_heads", f"{vision.num_attention_heads} heads do not divide hidden_size {vision.hidden_size}"
        )
    if reader.is_sound("image_size", "patch_size") and vision.image_size % vision.patch_size:
        reader.fault("image_size", f"{vision.image_size} is not a multiple of patch_size {vision.patch_size}")
    return vision


def parse_text_section(reader: SectionReader) -> TextArchitecture:
    kind = _kind(reader, TEXT_MODEL_TYPES, TEXT_CLASSES)
    defaults = TEXT_DEFAULTS[kind]
    reader.choice("hidden_act", "silu", ("silu",))
    for key in ("attention_bias", "mlp_bias"):
        reader.must_be(key, False)
    heads = reader.count("num_attention_heads", 32)
    text = TextArchitecture(
        model_type=kind,
        hidden_size=reader.count("hidden_size", 4096),
        intermediate_size=reader.count("intermediate_size", defaults.get("intermediate_size", 11008)),
        num_hidden_layers=reader.count("num_hidden_layers", 32, most=MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=reader.count("num_key_value_heads", defaults.get("num_key_value_heads", heads)),
        vocab_size=reader.count("vocab_size", 32000),
        max_position_embeddings=reader.count("max_position_embeddings", defaults["max_position_embeddings"]),
        rms_norm_eps=reader.positive("rms_norm_eps", 1e-6),
        rope_theta=parse_rope_theta(reader),
        rope_scaling=parse_rope_scaling(reader),
        tie_word_embeddings=reader.flag("tie_word_embeddings", False),
        bos_token_id=_special(reader, "bos_token_id", 1),
        eos_token_id=_special(reader, "eos_token_id", 2),
        pad_token_id=_special(reader, "pad_token_id", 0),
    )
    if reader.is_sound("num_attention_heads", "num_key_value_heads") and heads % text.num_key_value_heads:
        reader.fault("num_key_value_heads", f"{text.num_key_value_heads} does not divide the {heads} attention heads")
    if not reader.is_sound("hidden_size", "num_attention_heads"):
        pass
    elif text.hidden_size % heads:
        reader.fault("num_attention_heads", f"{heads} heads do not divide hidden_size {text.hidden_size}")
    elif text.head_dim % 2:
        reader.fault("num_attention_heads", f"hidden_size {text.hidden_size} gives heads that have no halves to rotate")
    elif reader.section.get("head_dim") not in (None, text.head_dim):
        reader.fault("head_dim", f"{reader.section['head_dim']!r} is not hidden_size / heads = {text.head_dim}")
    window = reader.section.get("sliding_window", defaults.get("sliding_window"))
    covers = is_int(window) and window >= text.max_position_embeddings
    if kind == "mistral" and window is not None and not covers and reader.is_sound("max_position_embeddings"):
        # Full attention equals windowed attention only while the window covers every position.
        reader.fault(
            "sliding_window",
            f"{window!r} is not supported; supported: null, or at least max_position_embeddings "
            f"({text.max_position_embeddings})",
        )
    return text


def _special(reader: SectionReader, key: str, default: int) -> int:
    value = reader.section.get(key)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return default
    if not is_int(value) or value < -1:
        reader.fault(key, f"must be one token id, not {value!r}")
        return default
    return default if value == -1 else value  # -1 is an old way to say "none"


def _token(reader: SectionReader, name: str, default: int, vocab_size: int) -> int:
    """`image_token_index`, or `image_token_id` as transformers 5 spells it."""
    key = f"{name}_id" if reader.section.get(f"{name}_id") is not None else f"{name}_index"
    value = reader.count(key, default, least=0)
    if value >= vocab_size and reader.is_sound("text_config.vocab_size"):
        reader.fault(key, f"{value} is outside the vocabulary of {vocab_size} (text_config.vocab_size)")
    return value


def _parse_pinpoints(reader: SectionReader, image_size: int) -> tuple[tuple[int, int], ...]:
    points = reader.section.get("image_grid_pinpoints")
    if points is None:
        points = [list(point) for point in Architecture.image_grid_pinpoints]
    if not isinstance(points, list) or not points:
        reader.fault("image_grid_pinpoints", f"must be a list of [height, width], not {points!r}")
        return ()
    for point in points:
        if not (isinstance(point, list) and len(point) == 2 and all(is_int(n) and n > 0 for n in point)):
            reader.fault("image_grid_pinpoints", f"must hold [height, width] in pixels, not {point!r}")
            return ()
        if any(n % image_size for n in point) and reader.is_sound("vision_config.image_size"):
            reader.fault(
                "image_grid_pinpoints",
                f"{point} is not a multiple of the tile's {image_size} pixels (vision_config.image_size)",
            )
    return tuple((height, width) for height, width in points)


def _parse_feature_layer(reader: SectionReader, layers: int) -> int:
    """The index into the tower's hidden states (the embeddings first), or from their end."""
    value = reader.section.get("vision_feature_layer", -2)
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if not is_int(value):
        reader.fault("vision_feature_layer", f"{value!r} is not supported; supported: one layer")
        return -2
    if not -(layers + 1) <= value <= layers and reader.is_sound("vision_config.num_hidden_layers"):
        reader.fault("vision_feature_layer", f"{value} is outside a tower of {layers} layers")
        return -1
    return value


# ------------------------------------------------------------------------------------------- writing a config.json


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The content of a config.json that transformers and `parse_architecture` read back as the same model.

    For models that never had a config.json of their own; others keep theirs to the byte.
    """
    vision = {f.name: getattr(architecture.vision, f.name) for f in fields(VisionArchitecture)}
    text = {f.name: getattr(architecture.text, f.name) for f in fields(TextArchitecture)}
    config = {f.name: getattr(architecture, f.name) for f in fields(Architecture)}
    config["image_grid_pinpoints"] = [list(point) for point in architecture.image_grid_pinpoints]
    config["vision_config"] = {"model_type": "clip_vision_model", "projection_dim": 768} | vision
    kind = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[architecture.text.model_type]
    window = {"sliding_window": None} if text["model_type"] == "mistral" else {}  # its class would set one
    config["text_config"] = {"architectures": [kind], "hidden_act": "silu"} | window | text
    for ours in ("vision", "text"):
        del config[ours]
    if architecture.pool_before_projector:
        del config["pool_before_projector"]  # transformers knows no other order
    head = {"architectures": ["LlavaNextVideoForConditionalGeneration"], "model_type": "llava_next_video"}
    return head | config | {"tie_word_embeddings": architecture.text.tie_word_embeddings}
