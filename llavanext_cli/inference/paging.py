"""The slots that the tokens of a batch take in MindSpore's paged KV cache (Ascend).

cache     [block 0 | block 1 | …]           blocks of `block_size` slots, a slot for the keys or values of one token
tables    row b: the blocks of sequence b   b*n, b*n+1, … b*n+n-1
slots     of a token                        block * block_size + position in the block; -1: not kept
"""

from __future__ import annotations

import numpy as np


def block_tables(batch: int, blocks: int) -> np.ndarray:
    """`int32[B, blocks]`: every sequence has `blocks` blocks of its own."""
    return np.arange(batch * blocks, dtype=np.int32).reshape(batch, blocks)


def prompt_slots(lengths: np.ndarray, padded: int, room: int) -> np.ndarray:
    """`int32[B * padded]`: slots of prompts, padded on the right; padding is not kept.

    Args:
        lengths: `int[B]`.
        room: slots of each sequence: its blocks times their size.
    """
    position = np.arange(padded)[None, :]
    slots = np.arange(len(lengths))[:, None] * room + position
    return np.where(position < np.asarray(lengths)[:, None], slots, -1).astype(np.int32).reshape(-1)


def next_slots(lengths: np.ndarray, room: int) -> np.ndarray:
    """`int32[B]`: the slot of each sequence's newest token, which `lengths` count."""
    return (np.arange(len(lengths)) * room + np.asarray(lengths) - 1).astype(np.int32)
