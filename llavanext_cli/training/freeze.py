"""Which parameters learn: the four parts of the model that a preset's `train.trainable` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavanext_cli.config.mindformers import PART_PREFIXES
from llavanext_cli.weights.adapter import is_adapter

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Train


def part_of(parameter: str) -> str:
    """The part a parameter belongs to: "vision", "projector" (pooler included), "newline" or "language"."""
    for part, prefixes in PART_PREFIXES.items():
        if parameter.startswith(prefixes):
            return part
    raise ValueError(f"parameter {parameter} belongs to no part")


def learns(parameter: str, train: Train) -> bool:
    """Whether a parameter is trained. With LoRA, of the language model only the low-rank matrices are."""
    part = part_of(parameter)
    held = part == "language" and train.method == "lora" and not is_adapter(parameter)
    return part in train.trainable and not held


def freeze(network, train: Train) -> dict[str, int]:
    """Let only what `learns` learn.

    Returns:
        Number of trained weights of each part.
    """
    counts = dict.fromkeys(train.trainable, 0)
    for parameter in network.get_parameters():
        parameter.requires_grad = learns(parameter.name, train)
        if parameter.requires_grad:
            counts[part_of(parameter.name)] += parameter.size
    return counts
