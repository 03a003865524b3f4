"""The memory that answering on a CPU takes, known before anything is loaded.

libraries     Python, NumPy and MindSpore
weights       two layers that are widened from half precision in turn, or all weights where they are kept wide;
              float32 weights are mapped from the file and take none
cache         keys and values of every layer
activations   of one layer: the prompt's rows, a chunk of attention, and the tower's tiles
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llavanext_cli.errors import RuntimeMissingError
from llavanext_cli.machine.memory import available_memory
from llavanext_cli.units import format_memory

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.weights.checkpoint import Checkpoint

LIBRARIES = 350 << 20
FLOAT = 4
CHUNK = 256
"""Rows of one chunk of attention, as in model/backend/layers.py."""


@dataclass(frozen=True)
class AskMemory:
    """Bytes of anonymous memory by use, the bytes of the checkpoint's files, and those that are free."""

    parts: dict[str, int]
    files: int
    available: int

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def plan_ask_memory(checkpoint: Checkpoint, preset: Preset, batch: int, tokens: int) -> AskMemory:
    """What an ask preset takes on a CPU.

    Args:
        batch: questions at once.
        tokens: positions of the cache.
    """
    arch, workers = checkpoint.architecture, preset.parallel.devices
    text, vision = arch.text, arch.vision
    specs = checkpoint.parameters.values()
    half = [spec for spec in specs if spec.dtype != "F32"]
    if preset.runtime.parameter_dtype == "float32":
        weights = sum(FLOAT * math.prod(spec.shape) for spec in half) // workers
    else:
        layer = sum(math.prod(spec.shape) for spec in half if ".layers.0." in spec.name)
        weights = 2 * FLOAT * layer // workers
    cache = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * batch * tokens * FLOAT // workers
    rows = batch * tokens * (8 * text.hidden_size + 4 * text.intermediate_size // workers)
    attention = 4 * batch * text.num_attention_heads // workers * min(CHUNK, tokens) * tokens
    patches = vision.patches**2 + 1
    tower = 8 * patches * (8 * vision.hidden_size + 3 * vision.intermediate_size)
    tower += 2 * 8 * vision.num_attention_heads * patches**2
    logits = 2 * batch * text.vocab_size
    activations = FLOAT * (max(rows + attention, tower) + logits)
    parts = {"libraries": LIBRARIES, "weights": weights, "cache": cache, "activations": activations}
    return AskMemory(parts, sum(spec.nbytes for spec in specs), available_memory())


def check_ask_memory(plan: AskMemory) -> None:
    """Refuse what would be killed half-way.

    Raises:
        RuntimeMissingError: less memory is free than the answer needs.
    """
    if plan.total <= plan.available:
        return
    uses = ", ".join(f"{name} {format_memory(size)}" for name, size in plan.parts.items())
    largest = max(plan.parts, key=lambda name: plan.parts[name])
    advice = {
        "weights": "give --set runtime.parameter_dtype=stored",
        "cache": "give fewer --frames or --max-new-tokens, or a smaller --batch-size",
        "activations": "give fewer --frames, or a smaller --batch-size",
    }.get(largest, "close other programs")
    raise RuntimeMissingError(
        f"asking needs {format_memory(plan.total)} of memory ({uses}), "
        f"but only {format_memory(plan.available)} are free",
        f"{advice}, or use a machine with more memory",
    )
