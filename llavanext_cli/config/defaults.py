"""What transformers fills in where a config.json says nothing, and the words for it when the result does not fit.

transformers leaves out of a nested config what equals its class's default, and old files lack the newer keys. So a
published config.json has gaps that are meant, and one that was cut by mistake looks the same.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.sections import is_int

CLIP_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
}
"""Of CLIPVisionConfig. A *whole* missing vision_config means CLIP ViT-L/14 at 336 pixels, `VisionArchitecture`'s."""
TEXT_DEFAULTS = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072,
        "sliding_window": 4096,
    },
}
IMAGE_TOKEN_DEFAULTS = {"llava_next_video": 32001, "llava_next": 32000}


def name_defaults(config: Mapping[str, Any], architecture: Architecture, faults: Sequence[str] = ()) -> list[str]:
    """One line for each section that a config.json leaves out, and one for the sizes that it leaves out of others.

    Args:
        config: the parsed config.json.
        architecture: what was read from it.
        faults: name only the sizes that one of these lines is about; without any, all.
    """
    lines, sizes = [], []
    for section, part in (("vision_config", architecture.vision), ("text_config", architecture.text)):
        given = config.get(section)
        taken = {key: value for key, value in vars(part).items() if is_int(value) and not key.endswith("token_id")}
        if given is None:
            listed = ", ".join(f"{key} {value}" for key, value in taken.items())
            lines.append(f"{section}: is not in config.json, so transformers' defaults hold: {listed}")
        elif isinstance(given, dict):
            sizes += [
                f"{section}.{key} {value}"
                for key, value in taken.items()
                if given.get(key) is None and (not faults or any(_is_about(line, section, key) for line in faults))
            ]
    sizes += [
        f"{token}_index {getattr(architecture, f'{token}_index')}"
        for token in ("image_token", "video_token")
        if config.get(f"{token}_index") is None
        and config.get(f"{token}_id") is None
        and any(line.startswith(f"{token}_index:") for line in faults)
    ]
    if sizes:
        lines.append(f"not in config.json, so transformers' defaults hold: {', '.join(sizes)}")
    return lines


def _is_about(fault: str, section: str, key: str) -> bool:
    """Whether a line is about a size, of its own section or by the size's full name."""
    name = rf"\b{key}\b" if fault.startswith(f"{section}.") else rf"\b{section}\.{key}\b"
    return re.search(name, fault) is not None
