"""Models that are not simply copied: the authors' own repositories, parts, and a base model made of two parts.

All of them know no `<video>` and `<image>`: the vocabulary grows by rows that are the mean of the others, and the
tokenizer's files learn the two names.

    CLIP folder ──part "vision"───┐
                                  ├──▶ base model: + projector and newline from a seed, + two tokens
    Llama folder ──part "language"┘
"""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import (
    Architecture,
    TextArchitecture,
    VisionArchitecture,
    architecture_to_hf,
    parse_architecture,
)
from llavanext_cli.config.hf_config import (
    REFETCH,
    parse_text_section,
    parse_vision_section,
    raise_faults,
    read_config,
)
from llavanext_cli.config.mindformers import PART_PREFIXES
from llavanext_cli.config.preprocessor import check_preprocessor, preprocessor_config
from llavanext_cli.config.sections import SectionReader
from llavanext_cli.errors import CheckpointError
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from llavanext_cli.weights import keymap
from llavanext_cli.weights.dtypes import NUMPY_NAMES, grow_rows, make_random
from llavanext_cli.weights.folder import MANIFEST
from llavanext_cli.weights.headers import read_json, read_object, short
from llavanext_cli.weights.plan import Plan, plan_folder
from llavanext_cli.weights.stream import PlannedTensor

VOCABULARY_STEP = 64
"""Rows are added up to a multiple of this: 32000 → 32064 as in the published models, and every device gets the same."""
PART_NAMES = {"vision": "a CLIP vision tower", "language": "a Llama language model"}


# ------------------------------------------------------------------------------------------------ one part of a model


def plan_part(source: Path, part: str) -> tuple[Plan, Architecture]:
    """Plan the parameters of one part, from a Hugging Face folder of CLIP or Llama, or from a part already converted.

    Args:
        part: "vision" or "language".

    Returns:
        The plan, and an architecture of which only that part counts.
    """
    config = read_config(source)
    where = str(source / "config.json")
    faults: list[str] = []
    architecture = Architecture()
    if part == "vision":
        architecture = replace(architecture, vision=_parse_clip(config, where, faults))
    else:
        if config.get("model_type") is None:
            faults.append("model_type: is missing; supported: llama, mistral")
        architecture = replace(architecture, text=parse_text_section(SectionReader(config, "", faults)))
    raise_faults(faults, where)
    if part == "vision":
        check_preprocessor(source, architecture)
    if (source / MANIFEST).is_file():
        return _plan_converted_part(source, part, architecture), architecture
    return plan_folder(source, architecture, part), architecture


def _parse_clip(config: Mapping[str, Any], where: str, faults: list[str]) -> VisionArchitecture:
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{where}: this is no CLIP model",
            "Name a folder such as openai/clip-vit-large-patch14-336.",
            [f"model_type: {kind!r} is not supported; supported: clip, clip_vision_model"],
        )
    section, name = config, ""
    if kind == "clip":
        # Old files hold what differs from the defaults a second time, and that one counts.
        parts = [config.get(key) or {} for key in ("vision_config", "vision_config_dict")]
        if not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"{where}: vision_config must be an object, not {short(parts)}", REFETCH)
        section = {**parts[0], **parts[1]}
        section, name = section | {"model_type": "clip_vision_model"}, "vision_config."
    return parse_vision_section(SectionReader(dict(section), name, faults))


def _plan_converted_part(source: Path, part: str, architecture: Architecture) -> Plan:
    from llavanext_cli.weights.checkpoint import read_listed
    from llavanext_cli.weights.plan import compare_shapes, extent

    manifest = read_json(source / MANIFEST)
    if not isinstance(manifest, dict) or manifest.get("part") != part or manifest.get("format") != "safetensors":
        raise CheckpointError(
            f"{source}: a checkpoint, but not one of {PART_NAMES[part]} alone",
            f"`llavanext convert SRC DST --from-{part}` makes one; a Hugging Face folder can be named directly.",
        )
    specs, carried = read_listed(source, manifest, "tensors"), read_listed(source, manifest, "carried")
    prefix = PART_PREFIXES[part]
    wanted = {n: s for n, s in keymap.expected_parameters(architecture).items() if n.startswith(prefix)}
    compare_shapes({n: s.shape for n, s in specs.items()}, wanted, str(source), "Convert the part again.")

    def planned(specs: Mapping[str, Any]) -> tuple[PlannedTensor, ...]:
        return tuple(PlannedTensor(n, s.dtype, s.shape, (extent(s),), n) for n, s in specs.items())

    ordered = {name: specs[name] for name in wanted}
    return Plan(planned(ordered), planned(carried), layout="converted")


# ------------------------------------------------------------------------------------------- a base model of two parts


def plan_base(vision_folder: Path, language_folder: Path, seed: int) -> tuple[Plan, Architecture]:
    """Plan a complete LLaVA-NeXT-Video out of CLIP and Llama: projector and newline are random, the rest is copied.

    Args:
        seed: of the projector (uniform ±1/√inputs, as torch's Linear begins) and the newline (deviation 1/√width).
    """
    vision, vision_architecture = plan_part(vision_folder, "vision")
    language, language_architecture = plan_part(language_folder, "language")
    text = language_architecture.text
    size = vision_architecture.vision.image_size
    grid = Architecture.image_grid_pinpoints
    unit = VisionArchitecture.image_size
    architecture = with_media_tokens(
        replace(
            Architecture(),
            vision=vision_architecture.vision,
            text=text,
            image_grid_pinpoints=tuple((h // unit * size, w // unit * size) for h, w in grid),
        )
    )
    dtype = next(t.dtype for t in language.tensors if t.name == keymap.WORD_EMBEDDING)
    by_name = {t.name: t for t in (*vision.tensors, *grow_vocabulary(language.tensors, architecture))}
    expected = keymap.expected_parameters(architecture)
    for number, name in enumerate(n for n in expected if n not in by_name):
        by_name[name] = make_random(name, dtype, expected[name], (seed, number), _bound(name, architecture))
    plan = Plan(
        tensors=tuple(by_name[name] for name in expected),
        carried=vision.carried,
        dropped=(*vision.dropped, *language.dropped),
        layout=f"{vision.layout} + {language.layout}",
        notes=vision.notes,
        facts=("projector and newline are random: they learn in the first stage of training",),
        files=companion_files(language_folder, architecture, dtype),
    )
    return plan, architecture


def _bound(name: str, architecture: Architecture) -> float:
    if name == "image_newline":
        return math.sqrt(3 / architecture.text.hidden_size)  # uniform, with the deviation 1/√width
    first = name.startswith("projector.linear_1")
    return 1 / math.sqrt(architecture.vision.hidden_size if first else architecture.text.hidden_size)


def with_media_tokens(architecture: Architecture) -> Architecture:
    """The same model with `<video>` and `<image>` behind the vocabulary, which grows to the next full step."""
    old = architecture.text.vocab_size
    rows = -(-(old + 2) // VOCABULARY_STEP) * VOCABULARY_STEP
    text = replace(architecture.text, vocab_size=rows)
    return replace(architecture, text=text, video_token_index=old, image_token_index=old + 1)


def grow_vocabulary(tensors: tuple[PlannedTensor, ...], architecture: Architecture) -> tuple[PlannedTensor, ...]:
    rows = architecture.text.vocab_size
    tables = (keymap.WORD_EMBEDDING, keymap.WORD_HEAD)
    return tuple(grow_rows(t, rows) if t.name in tables and t.shape[0] < rows else t for t in tensors)


def companion_files(source: Path, architecture: Architecture, dtype: str) -> dict[str, Any]:
    """config.json, the preprocessor's settings, and the tokenizer's files with the two tokens added."""
    files: dict[str, Any] = {
        "config.json": architecture_to_hf(architecture) | {"torch_dtype": NUMPY_NAMES[dtype]},
        "preprocessor_config.json": preprocessor_config(architecture),
    }
    ids = {VIDEO_PLACEHOLDER: architecture.video_token_index, IMAGE_PLACEHOLDER: architecture.image_token_index}
    return files | _tokenizer_files(source, ids)


def _tokenizer_files(source: Path, ids: dict[str, int]) -> dict[str, Any]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    files: dict[str, Any] = {"added_tokens.json": read_object(source / "added_tokens.json") | ids}
    path = source / "tokenizer_config.json"
    config = read_object(path)
    if isinstance(config.get("added_tokens_decoder"), dict):
        tokens = {str(number): {"content": name, **flags} for name, number in ids.items()}
        files[path.name] = config | {"added_tokens_decoder": config["added_tokens_decoder"] | tokens}
    path = source / "tokenizer.json"
    if path.is_file():
        fast = read_object(path)
        there = fast.get("added_tokens") or []
        if not isinstance(there, list):
            raise CheckpointError(f"{path}: added_tokens must be a list, not {short(there)}", REFETCH)
        entries = [{"id": number, "content": name, **flags} for name, number in ids.items()]
        files[path.name] = fast | {"added_tokens": [*there, *entries]}
    return files


# -------------------------------------------------------------------------------------------- the authors' repositories

ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
ORIGINAL_TOWER = "clip-vit-large-patch14-336"
PINPOINTS_LIMIT = 10_000
"""Characters of a text that holds a list of sizes."""
_FIXED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "image_aspect_ratio": ("anyres",),
    "mm_use_im_start_end": (False,),
    "mm_resampler_type": ("spatial_pool", None),
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json comes from the authors' own code, which describes the tower by its name."""
    return "mm_vision_tower" in config and "vision_config" not in config


def plan_original(source: Path, config: Mapping[str, Any]) -> tuple[Plan, Architecture]:
    """Plan our parameters from one of the authors' repositories (liuhaotian/llava-v1.6-*, lmms-lab/LLaVA-NeXT-*)."""
    where = str(source / "config.json")
    faults = [
        f"{key}: {config[key]!r} is not supported; supported: {', '.join(repr(v) for v in values)}"
        for key, values in _FIXED.items()
        if key in config and config[key] not in values
    ]
    if str(config.get("model_type")) not in ORIGINAL_TYPES:
        faults.append(f"model_type: {config.get('model_type')!r}; supported: {', '.join(ORIGINAL_TYPES)}")
    if not str(config["mm_vision_tower"]).rstrip("/").endswith(ORIGINAL_TOWER):
        faults.append(f"mm_vision_tower: {config['mm_vision_tower']!r} is not supported; supported: {ORIGINAL_TOWER}")
    raise_faults(faults, where)
    text = dict(config) | {"model_type": ORIGINAL_TYPES[config["model_type"]]}
    old = parse_text_section(SectionReader(text, "", faults))
    raise_faults(faults, where)
    grown = with_media_tokens(replace(Architecture(), text=old))
    hf = {
        "model_type": "llava_next_video",
        "text_config": text | {"vocab_size": grown.text.vocab_size},
        "tie_word_embeddings": old.tie_word_embeddings,
        "video_token_index": grown.video_token_index,
        "image_token_index": grown.image_token_index,
        "vision_feature_layer": config.get("mm_vision_select_layer", -2),
        "vision_feature_select_strategy": _select(config.get("mm_vision_select_feature", "patch")),
        "image_grid_pinpoints": _pinpoints(config.get("image_grid_pinpoints")),
        "spatial_pool_mode": config.get("mm_spatial_pool_mode", "average"),
        "spatial_pool_stride": config.get("mm_spatial_pool_stride", 2),
        "spatial_pool_out_channels": config.get("mm_spatial_pool_out_channels"),
    }
    architecture = parse_architecture(hf, where)
    before = replace(architecture, text=_with_vocabulary(architecture.text, old.vocab_size))
    plan = plan_folder(source, before)
    dtype = next(t.dtype for t in plan.tensors if t.name == keymap.WORD_EMBEDDING)
    return (
        replace(
            plan,
            tensors=grow_vocabulary(plan.tensors, architecture),
            files=companion_files(source, architecture, dtype),
        ),
        architecture,
    )


def _with_vocabulary(text: TextArchitecture, size: int) -> TextArchitecture:
    return replace(text, vocab_size=size)


def _select(feature: Any) -> Any:
    return {"patch": "default", "cls_patch": "full"}.get(feature, feature) if isinstance(feature, str) else feature


def _pinpoints(points: Any) -> Any:
    """The authors write (width, height), sometimes as a text that holds a list."""
    if isinstance(points, str) and len(points) <= PINPOINTS_LIMIT:
        try:
            points = ast.literal_eval(points)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return points
    if isinstance(points, (list, tuple)):
        return [list(point)[::-1] if isinstance(point, (list, tuple)) else point for point in points]
    return points
