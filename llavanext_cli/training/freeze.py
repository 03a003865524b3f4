"""Which parameters are trained: the parts of the model that a preset's `train.trainable` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llavanext_cli.config.architecture import PART_PREFIXES
from llavanext_cli.weights.adapter import is_adapter

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Train


def part_of(parameter: str) -> str:
    """The part a parameter belongs to: "vision", "projector" (pooler included), "newline" or "language"."""
    for part, prefixes in PART_PREFIXES.items():
        if parameter.startswith(prefixes):
            return part
    raise ValueError(f"{parameter} belongs to no part of the model")


def is_trainable(parameter: str, train: Train) -> bool:
    """Whether a parameter is trained. With LoRA, of the language model only the low-rank matrices are."""
    part = part_of(parameter)
    frozen = part == "language" and train.method == "lora" and not is_adapter(parameter)
    return part in train.trainable and not frozen


def freeze(network, train: Train) -> dict[str, int]:
    """Train only the parameters that are trainable.

    Returns:
        Part → number of its trained values.
    """
    counts = dict.fromkeys(train.trainable, 0)
    for parameter in network.get_parameters():
        parameter.requires_grad = is_trainable(parameter.name, train)
        if parameter.requires_grad:
            counts[part_of(parameter.name)] += parameter.size
    return counts
