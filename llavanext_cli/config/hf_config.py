"""A Hugging Face config.json, read into an `Architecture` and written from one.

Reading gives every section transformers' defaults, `validation.build` checks each value, `rules` what goes together.
Keys that do not change the computation are ignored, as transformers does; a value that the model cannot compute is
refused by name. `model_folder.py` opens the files.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from llavanext_cli.config.architecture import Architecture, TextArchitecture, VisionArchitecture
from llavanext_cli.config.rules import Findings, below, joint_rules, text_rules, vision_rules
from llavanext_cli.config.validation import Problems, build, has_problem, is_int, join, shown
from llavanext_cli.errors import CheckpointError

FETCH_HINT = "`llavanext fetch --list` names models that are supported"
IMAGE_TOKENS = {"llava_next_video": 32001, "llava_next": 32000}
"""model_type → transformers' default of image_token_index."""

# transformers leaves out of a nested config what equals its class's default, and old files lack the newer keys.
CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
"""Of CLIPVisionConfig. A *whole* missing vision_config means CLIP ViT-L/14 at 336 pixels, `VisionArchitecture`'s."""
LLAMA_DEFAULTS = {"vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
MISTRAL_DEFAULTS = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
SLIDING_WINDOW = 4096
"""Mistral's default."""

# Settings that `Architecture` has no field for, as only one value is supported.
FIXED = {"use_image_newline_parameter": True}
VISION_FIXED = {"model_type": "clip_vision_model", "num_channels": 3}
TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
CLASSES = ("LlavaNextVideoForConditionalGeneration", "LlavaNextForConditionalGeneration")
VISION_CLASSES = ("CLIPVisionModel", "CLIPVisionModelWithProjection", "CLIPModel")
TEXT_CLASSES = (
    *("LlamaForCausalLM", "MistralForCausalLM", "LlamaModel", "MistralModel"),
    *("LlavaLlamaForCausalLM", "LlavaMistralForCausalLM"),  # the authors' own
)


class _Faults:
    """What is wrong with a config.json."""

    def __init__(self) -> None:
        self.problems: Problems = []
        self.keys_read: set[str] = set()
        """By the rules that found a problem."""

    def add(self, key: str, text: str) -> None:
        self.problems.append((key, text))

    def is_valid(self, key: str) -> bool:
        return not has_problem([key], self.problems)

    def add_findings(self, findings: Findings) -> None:
        """Add what rules found, unless a value that they read is invalid by itself."""
        for keys, text in [(keys, text) for keys, text in findings if not has_problem(keys, self.problems)]:
            self.add(keys[0], text)
            self.keys_read.update(keys)

    def raise_if_any(self, where: str, remarks: Sequence[str] = ()) -> None:
        """Raise a `CheckpointError` with all of them; the remarks come first."""
        if self.problems:
            raise unsupported(where, [f"{key}: {text}" for key, text in self.problems], remarks)


def unsupported(where: str, problems: Sequence[str], remarks: Sequence[str] = ()) -> CheckpointError:
    """The error of a model whose settings are not supported; the remarks come first."""
    some = "a setting of this model is" if len(problems) == 1 else f"{len(problems)} settings of this model are"
    lines = [line if len(line) <= 300 else f"{line[:297]}..." for line in (*remarks, *problems[:20])]
    return CheckpointError(f"{where}: {some} not supported", FETCH_HINT, lines)


# ------------------------------------------------------------------------------------------------------------ reading


def parse_architecture(config: Any, where: str) -> Architecture:
    """Read the architecture from the parsed content of a config.json.

    Args:
        where: the file's name, for the message.

    Raises:
        CheckpointError: with one line in `details` for each problem.
    """
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str) or kind not in IMAGE_TOKENS:
        raise CheckpointError(
            f"{where}: this is not a LLaVA-NeXT model",
            FETCH_HINT,
            [f"model_type: expected {' or '.join(IMAGE_TOKENS)}, not {shown(kind)}"],
        )
    faults = _Faults()
    vision = _build_vision(config.get("vision_config"), "vision_config", faults)
    text = _build_text(config.get("text_config"), "text_config", faults)
    given = {key: value for key, value in config.items() if value is not None and key not in ("vision", "text")}
    for name in ("image_token", "video_token"):
        if f"{name}_id" in given:  # as transformers 5 writes it
            given.setdefault(f"{name}_index", given[f"{name}_id"])
    given.setdefault("image_token_index", IMAGE_TOKENS[kind])
    if kind == "llava_next":  # has no token for videos; which feature fills a position does not depend on the id
        given.setdefault("video_token_index", given["image_token_index"])
    if "vision_feature_layer" in given:
        given["vision_feature_layer"] = _only(given["vision_feature_layer"])
    architecture: Architecture = build(Architecture, given, faults.problems)
    architecture = replace(architecture, vision=vision, text=text)

    fixed: dict[str, Any] = FIXED
    if architecture.spatial_pool_mode == "conv" and faults.is_valid("vision_config.hidden_size"):
        fixed = FIXED | {"spatial_pool_out_channels": vision.hidden_size}
    _check_fixed(given, fixed, CLASSES, "", faults)
    if config.get("tie_word_embeddings") is True and not text.tie_word_embeddings:
        faults.add("tie_word_embeddings", "is true while text_config.tie_word_embeddings is not; they must agree")
    if kind == "llava_next_video" and architecture.image_token_index == architecture.video_token_index:
        faults.add("video_token_index", f"is {architecture.video_token_index}, the same as image_token_index")
    faults.add_findings(joint_rules(architecture, "vision_config", "text_config"))
    faults.raise_if_any(where, name_defaults(config, architecture, faults.keys_read) if faults.keys_read else ())
    return architecture


def parse_vision(config: dict[str, Any], where: str) -> VisionArchitecture:
    """Read the config.json of a CLIP vision tower. Errors as `parse_architecture`."""
    faults = _Faults()
    vision = _build_vision(config, "", faults)
    faults.raise_if_any(where)
    return vision


def parse_text(config: dict[str, Any], where: str) -> TextArchitecture:
    """Read the config.json of a Llama or Mistral. Errors as `parse_architecture`."""
    faults = _Faults()
    if config.get("model_type") is None:
        faults.add("model_type", "missing: llama or mistral")
    text = _build_text(config, "", faults)
    faults.raise_if_any(where)
    return text


def _build_vision(config: Any, prefix: str, faults: _Faults) -> VisionArchitecture:
    given = _given(config, prefix, faults)
    vision: VisionArchitecture = build(
        VisionArchitecture, {} if config is None else CLIP_DEFAULTS | given, faults.problems, prefix
    )
    _check_fixed(given, VISION_FIXED, VISION_CLASSES, prefix, faults)
    faults.add_findings(below(prefix, vision_rules(vision)))
    return vision


def _build_text(config: Any, prefix: str, faults: _Faults) -> TextArchitecture:
    given = _given(config, prefix, faults)
    heads = given.get("num_attention_heads", TextArchitecture.num_attention_heads)
    is_mistral = given.get("model_type") == "mistral"
    defaults = {"num_key_value_heads": heads} | LLAMA_DEFAULTS | (MISTRAL_DEFAULTS if is_mistral else {})
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if name in given:
            given[name] = _only(given[name])
            if given[name] == -1:  # an old way to say "none"
                del given[name]
    text: TextArchitecture = build(
        TextArchitecture, defaults | given | _rope(given, prefix, faults), faults.problems, prefix
    )
    fixed = TEXT_FIXED | ({"head_dim": text.head_dim} if faults.is_valid(join(prefix, "num_attention_heads")) else {})
    _check_fixed(given, fixed, TEXT_CLASSES, prefix, faults)
    faults.add_findings(below(prefix, text_rules(text)))
    if is_mistral:
        faults.add_findings(below(prefix, _window_rule(config.get("sliding_window", SLIDING_WINDOW), text)))
    return text


def _window_rule(window: Any, text: TextArchitecture) -> Findings:
    """Full attention equals windowed attention only while the window covers every position."""
    if window is not None and not (is_int(window) and window >= text.max_position_embeddings):
        yield (
            ("sliding_window", "max_position_embeddings"),
            f"expected null, or at least max_position_embeddings ({text.max_position_embeddings}), not {shown(window)}",
        )


def _given(config: Any, prefix: str, faults: _Faults) -> dict[str, Any]:
    """The keys of a section that have a value."""
    if config is not None and not isinstance(config, dict):
        faults.add(prefix, f"expected a mapping, not {shown(config)}")
        return {}
    return {key: value for key, value in (config or {}).items() if value is not None}


def _only(value: Any) -> Any:
    """The value, or that of a list with one."""
    return value[0] if isinstance(value, list) and len(value) == 1 else value


def _rope(given: dict[str, Any], prefix: str, faults: _Faults) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`, which transformers 5 writes into one section, `rope_parameters`."""
    key = "rope_parameters" if "rope_parameters" in given else "rope_scaling"
    rope = given.get(key)
    if not isinstance(rope, dict):
        return {"rope_scaling": rope}
    rope = {name: value for name, value in rope.items() if value is not None}
    theta = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if "rope_type" in rope:
        rope["type"] = rope["rope_type"]
    if rope.get("type") == "default" or not rope.keys() & {"type", "factor"}:
        return theta | {"rope_scaling": None}
    _check_fixed(rope, {"partial_rotary_factor": 1.0}, (), join(prefix, key), faults)
    return theta | {"rope_scaling": rope}


def _check_fixed(
    given: Mapping[str, Any], fixed: Mapping[str, Any], classes: Sequence[str], prefix: str, faults: _Faults
) -> None:
    """Settings of which one value is supported, and names of the classes that compute what our model computes."""
    for key, only in fixed.items():
        if given.get(key, only) != only:
            faults.add(join(prefix, key), f"only {shown(only)} is supported, not {shown(given[key])}")
    names = given.get("architectures", [])
    if faults.is_valid(join(prefix, "model_type")) and not (
        isinstance(names, list) and all(n in classes for n in names)
    ):
        faults.add(join(prefix, "architectures"), f"only {', '.join(classes)} are supported, not {shown(names)}")


def name_defaults(config: Mapping[str, Any], architecture: Architecture, keys: Collection[str] = ()) -> list[str]:
    """One line that names the sizes which a config.json leaves to transformers' defaults, if there are any.

    A published config.json has gaps that are meant, and a damaged one looks the same: only what does not fit shows it.

    Args:
        config: the parsed config.json.
        architecture: what was read from it.
        keys: name these only; without them all but token ids.
    """
    parts = {"": architecture, "vision_config": architecture.vision, "text_config": architecture.text}
    sizes = []
    for section, part in parts.items():
        given = config.get(section) if section else config
        missing = [name for name in vars(part) if not isinstance(given, dict) or given.get(name) is None]
        values = {join(section, name): getattr(part, name) for name in missing if keys or "token" not in name}
        sizes += [f"{key} {value}" for key, value in values.items() if is_int(value) and (not keys or key in keys)]
    return [f"not in config.json, so transformers' defaults are used: {', '.join(sizes)}"] if sizes else []


# ------------------------------------------------------------------------------------------------------------ writing


def architecture_to_hf(architecture: Architecture) -> dict[str, Any]:
    """The content of a config.json that transformers and `parse_architecture` read back as the same model.

    For models that never had a config.json of their own; others keep theirs to the byte.
    """
    config = asdict(architecture)
    vision, text = config.pop("vision"), config.pop("text")
    config["image_grid_pinpoints"] = [list(point) for point in architecture.image_grid_pinpoints]
    config["vision_config"] = {"model_type": "clip_vision_model", "projection_dim": 768} | vision
    kind = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}[architecture.text.model_type]
    window = {"sliding_window": None} if text["model_type"] == "mistral" else {}  # its class would set one
    config["text_config"] = {"architectures": [kind], "hidden_act": "silu"} | window | text
    if architecture.pool_before_projector:
        del config["pool_before_projector"]  # transformers knows no other order
    head = {"architectures": ["LlavaNextVideoForConditionalGeneration"], "model_type": "llava_next_video"}
    return head | config | {"tie_word_embeddings": architecture.text.tie_word_embeddings}
