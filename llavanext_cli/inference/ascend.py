"""The Ascend's way of computing: MindFormers' own prefill and increment graphs, with its paged cache.

    prefill     one prompt at a time     tokens to its own blocks of the cache, logits of its last position
    increment   one token of each        all sequences of the batch at once

MindFormers' prefill takes the prompts of a batch as one row of tokens without padding between them. One prompt fills
the NPU by itself, so each goes alone, padded to the smallest compiled shape that holds it without doubling its work,
else to a new bucket.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.inference.cpu import Step
from llavanext_cli.inference.paging import block_tables, next_slots, prompt_slots
from llavanext_cli.processing.packing import collate

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.records import Batch, EncodedSample

BUCKET = 64
"""Prompts are padded to a multiple of this many tokens."""


class AscendEngine:
    """Prefill and decoding through `LlavaNext.construct`.

    Args:
        network: a `LlavaNext` with a paged cache.
        arch: of the same checkpoint.
        batch: sequences computed at once.
        cache_tokens: positions of the cache of each.
        block_size: positions of one block of it.
    """

    def __init__(self, network: Any, arch: Architecture, batch: int, cache_tokens: int, block_size: int):
        self.network, self.arch, self.batch, self.cache_tokens = network, arch, batch, cache_tokens
        self.block_size, self.blocks = block_size, -(-cache_tokens // block_size)
        self.shapes: set[tuple[int, int, int]] = set()

    def start(self, samples: Sequence[EncodedSample], room: int, limit: int, past: int = 0) -> Step:
        """Prefill; the arguments of `CpuEngine.start`. This cache always begins anew: `past` is 0."""
        from mindspore import ops

        rows = [self.network(*self.prefill(*self._pad(sample), row)) for row, sample in enumerate(samples)]
        rows += [rows[0]] * (self.batch - len(rows))
        return _choose(ops.concat([row.reshape(1, -1) for row in rows]))

    def step(self, tokens: np.ndarray, lengths: np.ndarray) -> Step:
        """One more token `int32[B]` of each sequence; `lengths` count it."""
        return _choose(self.network(*self.increment(tokens, lengths)).reshape(self.batch, -1))

    def prefill(self, batch: Batch, frames: int, row: int = 0) -> tuple[Any, ...]:
        """Set the network to its prefill graph; what it is called with.

        Args:
            batch: one prompt.
            frames: how many of its tiles are frames.
            row: whose blocks of the cache it fills.
        """
        from mindspore import Tensor

        self.network.language_model.add_flags_custom(is_first_iteration=True)
        # One graph a shape. MindSpore keys graphs by phase alone when it is called "prefill" or "increment".
        self.network.phase = f"prefill {batch.input_ids.shape} {batch.tiles.shape[1]} {frames}"
        media: tuple = (None, None)
        if batch.tiles.shape[1]:
            media = (Tensor(batch.tiles), Tensor(batch.feature_index))
        room = self.blocks * self.block_size
        slots = prompt_slots(batch.lengths, batch.input_ids.shape[1], room)
        slots = np.where(slots < 0, slots, slots + row * room).astype(np.int32)
        tables = block_tables(self.batch, self.blocks)[row : row + 1]
        return self._inputs(batch.input_ids, *media, batch.lengths, tables, slots, frames)

    def increment(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[Any, ...]:
        """Set the network to its graph of one token `int32[B]`; what it is called with."""
        self.network.language_model.add_flags_custom(is_first_iteration=False)
        self.network.phase = "increment"
        slots = next_slots(lengths, self.blocks * self.block_size)
        tables = block_tables(self.batch, self.blocks)
        return self._inputs(tokens.reshape(-1, 1).astype(np.int32), None, None, lengths, tables, slots, 0)

    def _pad(self, sample: EncodedSample) -> tuple[Batch, int]:
        """A batch of one prompt, and how many of its tiles are frames."""
        length, tiles, frames = sample.length, len(sample.tiles), len(sample.frames)
        fitting = [s for s in self.shapes if s[0] >= length and s[1] >= tiles and s[2] >= frames]
        near = [s for s in fitting if s[0] <= 2 * length and s[1] + s[2] <= 2 * max(1, tiles + frames)]
        bucket = min(-(-length // BUCKET) * BUCKET, self.cache_tokens)
        shape = min(near, default=(bucket, tiles, frames))
        self.shapes.add(shape)
        return collate([sample], seq_length=shape[0], tiles=shape[1], frames=shape[2], arch=self.arch), shape[2]

    def _inputs(
        self,
        input_ids: np.ndarray,
        tiles: Any,
        index: Any,
        lengths: np.ndarray,
        tables: np.ndarray,
        slots: np.ndarray,
        frames: int,
    ) -> tuple[Any, ...]:
        from mindspore import Tensor

        return (
            Tensor(input_ids),
            tiles,
            index,
            None,
            Tensor(lengths.astype(np.int32)),
            Tensor(tables),
            Tensor(slots),
            frames,
        )


def _choose(logits: Any) -> Step:
    """`logits` are `[B, V]`."""
    return Step(logits.asnumpy().argmax(-1).astype(np.int32), logits)
