"""The Ascend's way of computing: MindFormers' own prefill and increment graphs, with its paged cache.

    prefill     one prompt at a time         fills its own blocks of the cache, gives logits of its last position
    increment   one token of each sequence   all sequences of the batch at once

MindFormers' prefill takes the prompts of a batch as one row of tokens without padding between them. One prompt keeps
the NPU busy by itself, so prompts are prefilled one by one. Each is padded to a shape that depends on nothing but
itself, so that a question always gets the same answer. There are few such shapes, because each is a graph to compile.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.inference.paging import block_tables, next_slots, prompt_slots
from llavanext_cli.inference.step import BUCKET, Step, round_up
from llavanext_cli.processing.sample_layout import collate
from llavanext_cli.signals import defer_signals

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.records import Batch, EncodedSample


class AscendEngine:
    """Prefill and decoding through `LlavaNext.construct`.

    Args:
        network: a `LlavaNext` with a paged cache.
        arch: of the same checkpoint.
        batch: sequences computed at once.
        cache_tokens: positions of each sequence's cache.
        block_size: positions of one block of the cache.
    """

    def __init__(self, network: Any, arch: Architecture, batch: int, cache_tokens: int, block_size: int):
        self.network, self.arch, self.batch, self.cache_tokens = network, arch, batch, cache_tokens
        self.block_size, self.blocks = block_size, -(-cache_tokens // block_size)

    def prefill(self, samples: Sequence[EncodedSample], room: int, limit: int, past: int = 0) -> Step:
        """Arguments as for `CpuEngine.prefill`. Nothing is kept from the question before: `past` is 0."""
        from mindspore import ops

        rows = [self._call(self.prefill_inputs(*self._pad(sample), row)) for row, sample in enumerate(samples)]
        rows += [rows[0]] * (self.batch - len(rows))
        return _choose(ops.concat([row.reshape(1, -1) for row in rows]))

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Step:
        """One more token `int32[B]` of each sequence; `lengths` count it."""
        return _choose(self._call(self.decode_inputs(tokens, lengths)).reshape(self.batch, -1))

    def prefill_inputs(self, batch: Batch, frames: int, row: int = 0) -> tuple[Any, ...]:
        """Switch the network to its prefill graph; the arguments to call it with.

        Args:
            batch: one prompt.
            frames: how many of its tiles are frames.
            row: the sequence whose blocks of the cache it fills.
        """
        from mindspore import Tensor

        self.network.language_model.add_flags_custom(is_first_iteration=True)
        # One graph for each shape: MindSpore knows graphs by phase alone when that is "prefill" or "increment".
        self.network.phase = f"prefill {batch.input_ids.shape} {batch.tiles.shape[1]} {frames}"
        media: tuple = (None, None)
        if batch.tiles.shape[1]:
            media = (Tensor(batch.tiles), Tensor(batch.feature_index))
        room = self.blocks * self.block_size
        slots = prompt_slots(batch.lengths, batch.input_ids.shape[1], room)
        slots = np.where(slots < 0, slots, slots + row * room).astype(np.int32)
        tables = block_tables(self.batch, self.blocks)[row : row + 1]
        return self._inputs(batch.input_ids, *media, batch.lengths, tables, slots, frames)

    def decode_inputs(self, tokens: np.ndarray, lengths: np.ndarray) -> tuple[Any, ...]:
        """Switch the network to its graph of one token each, `int32[B]`; the arguments to call it with."""
        self.network.language_model.add_flags_custom(is_first_iteration=False)
        self.network.phase = "increment"
        slots = next_slots(lengths, self.blocks * self.block_size)
        tables = block_tables(self.batch, self.blocks)
        return self._inputs(tokens.reshape(-1, 1).astype(np.int32), None, None, lengths, tables, slots, 0)

    def _call(self, inputs: tuple[Any, ...]) -> Any:
        """Run one graph to its end."""
        with defer_signals():
            return self.network(*inputs)

    def _pad(self, sample: EncodedSample) -> tuple[Batch, int]:
        """A batch of one prompt, and how many of its tiles are frames."""
        length, frames = min(padded_length(sample.length), self.cache_tokens), len(sample.frames)
        tiles = round_up(len(sample.tiles), self.arch.max_tiles)
        return collate([sample], seq_length=length, tiles=tiles, frames=frames, arch=self.arch), frames

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


def padded_length(length: int) -> int:
    """Tokens that a prompt is padded to: a multiple of `BUCKET`; from 512 on one of four lengths between two powers of
    two, so that at most a quarter is padding."""
    octave = 1 << max(length - 1, 1).bit_length() - 1  # the largest power of two below it
    return round_up(length, max(BUCKET, octave // 4))


def _choose(logits: Any) -> Step:
    """`logits` are `[B, V]`."""
    return Step(logits.asnumpy().argmax(-1).astype(np.int32), logits.asnumpy)
