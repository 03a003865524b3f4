"""The authors' own repositories: liuhaotian/llava-v1.6-*, lmms-lab/LLaVA-NeXT-*.

They name their tower, use other keys in config.json, and have no `<video>` and `<image>` in their vocabulary.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.hf_config import parse_architecture, parse_text, unsupported
from llavanext_cli.weights import keymap
from llavanext_cli.weights.compose import companion_files, grow_vocabulary, with_media_tokens
from llavanext_cli.weights.plan import Plan, plan_folder

ORIGINAL_TYPES = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral"}
ORIGINAL_TOWER = "clip-vit-large-patch14-336"
PINPOINTS_LIMIT = 10_000
"""Characters of a string that holds a list of sizes."""
_FIXED = {
    "mm_projector_type": ("mlp2x_gelu",),
    "mm_patch_merge_type": ("spatial_unpad",),
    "image_aspect_ratio": ("anyres",),
    "mm_use_im_start_end": (False,),
    "mm_resampler_type": ("spatial_pool", None),
}


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether a config.json comes from the authors' own code."""
    return "mm_vision_tower" in config and "vision_config" not in config


def plan_original(source: Path, config: Mapping[str, Any]) -> tuple[Plan, Architecture]:
    """Plan our parameters from one of the authors' repositories."""
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
    if faults:
        raise unsupported(where, faults)
    text = dict(config) | {"model_type": ORIGINAL_TYPES[config["model_type"]]}
    old = parse_text(text, where)
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
    before = replace(architecture, text=replace(architecture.text, vocab_size=old.vocab_size))
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


def _select(feature: Any) -> Any:
    return {"patch": "default", "cls_patch": "full"}.get(feature, feature) if isinstance(feature, str) else feature


def _pinpoints(points: Any) -> Any:
    """The authors write (width, height), sometimes in a string that holds a list."""
    if isinstance(points, str) and len(points) <= PINPOINTS_LIMIT:
        try:
            points = ast.literal_eval(points)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return points
    if isinstance(points, (list, tuple)):
        return [list(point)[::-1] if isinstance(point, (list, tuple)) else point for point in points]
    return points
