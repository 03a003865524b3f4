"""What an engine gives for one step, and the sizes to which prompts and caches are rounded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np

BUCKET = 64
"""Prompts are padded to a multiple of this many tokens."""
BATCH_BUCKET = 128
"""The same for batches on a CPU: fewer graphs to compile."""
CACHE_STEP = 256
"""A CPU's cache is as long as prompt and answer need, rounded up to this many tokens."""
CHAT_STEP = 1024
"""The same for a chat, which grows: a longer cache is another graph, and the whole conversation is computed again."""


def round_up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


@dataclass(frozen=True)
class Step:
    """Result of a prefill or of one step of decoding.

    Attributes:
        tokens: the likeliest tokens, `int32[B]`.
        logits: called for `float32[B, V]`, which stay on the device until somebody needs them.
    """

    tokens: np.ndarray
    logits: Callable[[], np.ndarray]
