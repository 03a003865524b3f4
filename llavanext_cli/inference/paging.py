"""Where the tokens of a batch stand in MindSpore's paged KV cache (Ascend).

cache     [block 0 | block 1 | …]           blocks of `block_size` slots, a slot for the keys or values of one token
tables    row b: the blocks of sequence b   b*n, b*n+1, … b*n+n-1
slots     of a token                        block * block_size + place in the block; -1: not kept
"""

from __future__ import annotations

import numpy as np


def block_tables(batch: int, blocks: int) -> np.ndarray:
    """`int32[B, blocks]`: every sequence has `blocks` blocks of its own."""
    return np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)


def prompt_slots(lengths: np.ndarray, padded: int, room: int) -> np.ndarray:
    """`int32[B * padded]`: slots of prompts of `lengths` tokens, padded on the right; padding is not kept.

    Args:
        lengths: `int[B]`.
        room: slots a sequence, its blocks times their size.
    """
    position = np.arange(padded)[None, :]
    slots = np.arange(len(lengths))[:, None] * room + position
    return np.where(position < np.asarray(lengths)[:, None], slots, -1).astype(np.int32).reshape(-1)


def next_slots(lengths: np.ndarray, room: int) -> np.ndarray:
    """`int32[B]`: the slot of one more token each, which `lengths` already count."""
    return (np.arange(len(lengths)) * room + np.asarray(lengths) - 1).astype(np.int32)
