"""One part of a model, CLIP or Llama, and a base model that is built of both.

The vocabulary of a Llama has no `<video>` and `<image>`: it grows by rows that are the mean of the others, and the
two names are added to the tokenizer's files.

    CLIP folder ──part "vision"───┐
                                  ├──▶ base model: + projector and newline from a seed, + two tokens
    Llama folder ──part "language"┘
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

from llavanext_cli.config.architecture import PART_PREFIXES, Architecture, VisionArchitecture
from llavanext_cli.config.hf_config import architecture_to_hf, parse_text, parse_vision
from llavanext_cli.config.model_folder import (
    REFETCH,
    check_preprocessor,
    preprocessor_config,
    read_config,
    read_optional,
)
from llavanext_cli.errors import CheckpointError
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER
from llavanext_cli.weights import keymap
from llavanext_cli.weights.checkpoint import read_listed
from llavanext_cli.weights.dtypes import NUMPY_NAMES, copy_tensor, generate_random, grow_rows
from llavanext_cli.weights.folder import MANIFEST
from llavanext_cli.weights.plan import Plan, compare_shapes, plan_folder
from llavanext_cli.weights.tensors import PlannedTensor
from llavanext_cli.weights.untrusted import short

VOCABULARY_STEP = 64
"""Rows are added up to a multiple of this: 32000 → 32064 as in the published models, and every device gets the same."""
PART_NAMES = {"vision": "a CLIP vision tower", "language": "a Llama language model"}


def plan_part(source: Path, part: str) -> tuple[Plan, Architecture]:
    """Plan the parameters of one part: from a Hugging Face folder of CLIP or Llama, or from a converted part.

    Args:
        part: "vision" or "language".

    Returns:
        The plan, and an architecture in which only that part is read from the folder.
    """
    config = read_config(source)
    where = str(source / "config.json")
    architecture = Architecture()
    if part == "vision":
        architecture = replace(architecture, vision=_parse_clip(config, where))
        check_preprocessor(source, architecture)
    else:
        architecture = replace(architecture, text=parse_text(config, where))
    if (source / MANIFEST).is_file():
        return _plan_converted_part(source, part, architecture), architecture
    return plan_folder(source, architecture, part), architecture


def _parse_clip(config: dict[str, Any], where: str) -> VisionArchitecture:
    kind = config.get("model_type")
    if kind not in ("clip", "clip_vision_model"):
        raise CheckpointError(
            f"{where}: not a CLIP model",
            "name a folder such as openai/clip-vit-large-patch14-336",
            [f"model_type: {kind!r} is not supported; supported: clip, clip_vision_model"],
        )
    section = config
    if kind == "clip":
        # Old files repeat what differs from the defaults in vision_config_dict, which transformers prefers.
        parts = [config.get(key) or {} for key in ("vision_config", "vision_config_dict")]
        if not all(isinstance(part, dict) for part in parts):
            raise CheckpointError(f"{where}: vision_config must be an object, not {short(parts)}", REFETCH)
        section = {**parts[0], **parts[1], "model_type": "clip_vision_model"}
        where = f"{where}: vision_config"
    return parse_vision(section, where)


def _plan_converted_part(source: Path, part: str, architecture: Architecture) -> Plan:
    manifest = read_config(source, MANIFEST)
    if manifest.get("part") != part or manifest.get("format") != "safetensors":
        raise CheckpointError(
            f"{source}: a checkpoint, but not one of {PART_NAMES[part]} alone",
            f"`llavanext convert SRC DST --from-{part}` writes one; a Hugging Face folder can be named directly",
        )
    specs, carried = read_listed(source, manifest, "tensors"), read_listed(source, manifest, "carried")
    prefix = PART_PREFIXES[part]
    wanted = {n: s for n, s in keymap.expected_parameters(architecture).items() if n.startswith(prefix)}
    compare_shapes({n: s.shape for n, s in specs.items()}, wanted, str(source), "convert the part again")
    return Plan(
        tensors=tuple(copy_tensor(specs[name], name, name) for name in wanted),
        carried=tuple(copy_tensor(spec, name, name) for name, spec in carried.items()),
        naming="converted",
    )


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
        by_name[name] = generate_random(name, dtype, expected[name], (seed, number), _bound(name, architecture))
    plan = Plan(
        tensors=tuple(by_name[name] for name in expected),
        carried=vision.carried,
        dropped=(*vision.dropped, *language.dropped),
        naming=f"{vision.naming} + {language.naming}",
        notes=vision.notes,
        facts=("projector and newline are random; the first stage of training trains them",),
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
    """The same tensors, with as many rows in the embedding and the head as the architecture has words."""
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
    files: dict[str, Any] = {"added_tokens.json": read_optional(source, "added_tokens.json") | ids}
    name = "tokenizer_config.json"
    config = read_optional(source, name)
    if isinstance(config.get("added_tokens_decoder"), dict):
        tokens = {str(number): {"content": token, **flags} for token, number in ids.items()}
        files[name] = config | {"added_tokens_decoder": config["added_tokens_decoder"] | tokens}
    name = "tokenizer.json"
    if fast := read_optional(source, name):
        added = fast.get("added_tokens") or []
        if not isinstance(added, list):
            raise CheckpointError(f"{source / name}: added_tokens must be a list, not {short(added)}", REFETCH)
        entries = [{"id": number, "content": token, **flags} for token, number in ids.items()]
        files[name] = fast | {"added_tokens": [*added, *entries]}
    return files
