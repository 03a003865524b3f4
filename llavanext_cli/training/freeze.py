"""Which parameters learn: the four parts of the model that a preset's `train.trainable` names."""

from __future__ import annotations

from collections.abc import Iterable

_PREFIXES = {
    "vision_tower.": "vision",
    "projector.": "projector",
    "pooler.": "projector",
    "image_newline": "newline",
    "language_model.": "language",
}


def part_of(parameter: str) -> str:
    """The part a parameter belongs to: "vision", "projector" (pooler included), "newline" or "language"."""
    for prefix, part in _PREFIXES.items():
        if parameter.startswith(prefix):
            return part
    raise ValueError(f"parameter {parameter} belongs to no part")


def freeze(network, trainable: Iterable[str]) -> dict[str, int]:
    """Let only the named parts learn.

    Returns:
        Number of trained weights of each part.
    """
    counts = dict.fromkeys(trainable, 0)
    for parameter in network.get_parameters():
        part = part_of(parameter.name)
        parameter.requires_grad = part in counts
        if parameter.requires_grad:
            counts[part] += parameter.size
    return counts
