"""The low-rank matrices of LoRA: their names and shapes, and how they are merged into the weights that they adapt.

    language_model.model.layers.3.attention.wq.weight   W, [out, in]
    language_model.model.layers.3.attention.wq.lora_a   A, [rank, in]
    language_model.model.layers.3.attention.wq.lora_b   B, [out, rank]      merged: W + alpha / rank * B A

Source: Hu et al. 2021 (LoRA).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

from llavanext_cli.weights.dtypes import from_bytes, round_to, to_bytes
from llavanext_cli.weights.keymap import expected_parameters
from llavanext_cli.weights.stream import read_chunks
from llavanext_cli.weights.tensors import GeneratedBytes, PlannedTensor

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.config.schema import Lora
    from llavanext_cli.records import Float32Array

MATRICES = (".lora_a", ".lora_b")


def is_adapter(name: str) -> bool:
    """Whether a parameter is one of LoRA's matrices."""
    return name.endswith(MATRICES)


def adapted_weights(architecture: Architecture, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Name → shape of every weight that gets low-rank matrices."""
    return {
        name: shape
        for name, shape in expected_parameters(architecture).items()
        if name.startswith("language_model.model.layers.") and name.split(".")[-2] in lora.targets
    }


def adapter_parameters(architecture: Architecture, lora: Lora) -> dict[str, tuple[int, ...]]:
    """Name → shape of all low-rank matrices."""
    matrices: dict[str, tuple[int, ...]] = {}
    for name, (rows, columns) in adapted_weights(architecture, lora).items():
        cell = name.removesuffix(".weight")
        matrices |= {f"{cell}.lora_a": (lora.rank, columns), f"{cell}.lora_b": (rows, lora.rank)}
    return matrices


def merge_adapter(tensors: Mapping[str, PlannedTensor], lora: Lora) -> dict[str, PlannedTensor]:
    """The weights that have low-rank matrices, with these added; computed in float32, one at a time, when written.

    Args:
        tensors: weights and matrices by name.

    Returns:
        Name → merged weight, of the type that it had.
    """
    merged = {}
    for name, weight in tensors.items():
        a, b = (tensors.get(name.removesuffix(".weight") + end) for end in MATRICES)
        if a is not None and b is not None:
            merged[name] = _merged(weight, a, b, lora.alpha / lora.rank)
    return merged


def _merged(weight: PlannedTensor, a: PlannedTensor, b: PlannedTensor, scale: float) -> PlannedTensor:
    def chunks() -> Iterator[memoryview]:
        wide = _read(weight) + (_read(b) * scale) @ _read(a)
        yield to_bytes(round_to(wide, weight.dtype)[0])

    return replace(weight, pieces=(GeneratedBytes(weight.nbytes, chunks),), origin=f"{weight.origin} + LoRA")


def _read(tensor: PlannedTensor) -> Float32Array:
    data = b"".join(chunk for piece in tensor.pieces for chunk in read_chunks(piece))
    return from_bytes(data, tensor.dtype, "float32").reshape(tensor.shape)
