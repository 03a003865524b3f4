"""The CPU's way of computing: graphs of static shapes around one network, each compiled when it is first needed.

    tower     tiles of one image, or a few frames              one graph for each number of tiles (`PIECES`)
    embed     words and features to embeddings                 one for each prompt bucket and feature table
    prefill   a prompt, or the part that the cache lacks       one for each prompt bucket
    decode    one more token                                   one for each batch and cache

Shapes never depend on earlier questions, so a question always gets the same shapes and with them the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.inference.step import Step, round_up
from llavanext_cli.processing.sample_layout import collate
from llavanext_cli.signals import defer_signals

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.inference.graphs import GraphStore
    from llavanext_cli.records import EncodedSample

PIECES = (8, 5, 4, 3, 2, 1)
"""Tiles that one call of the tower takes: 3 to 5 are one image, 8 are frames."""


class CpuEngine:
    """Prefill and decoding on a CPU.

    Args:
        network: a `LlavaNext` without a cache of its own.
        arch: of the same checkpoint.
        batch: sequences computed at once.
        bucket: prompts are padded to a multiple of this many tokens.
        cache_step: a cache is as long as a multiple of this many tokens.
        graphs: keeps compiled graphs; None: they are not kept.
        workers: processes that share each layer.
    """

    def __init__(
        self,
        network: Any,
        arch: Architecture,
        batch: int,
        bucket: int,
        cache_step: int,
        graphs: GraphStore | None = None,
        workers: int = 1,
    ):
        from llavanext_cli.model.backend.decoder import Embedder, Tower

        self.network, self.arch, self.batch, self.bucket, self.cache_step = network, arch, batch, bucket, cache_step
        self.tower, self.embedder = Tower(network), Embedder(network)
        self.decoders: dict[int, Any] = {}  # never emptied: MindSpore knows cells by `id`, even after they are deleted
        self.length = 0
        self.graphs, self.workers = graphs, workers

    def prefill(self, samples: Sequence[EncodedSample], room: int, limit: int, past: int = 0) -> Step:
        """Compute the prompts and fill the cache.

        Args:
            samples: up to `batch` of them.
            room: most positions that prompt and answer take.
            limit: longest cache.
            past: tokens of the only sample that are in the cache already.
        """
        self.length = self.cache_length(room, limit)
        decoder = self.decoder(self.length)
        longest = max(sample.length for sample in samples) - past
        bucket = min(round_up(longest, self.bucket), self.length - past)
        rows = [*samples, *[samples[0]] * (self.batch - len(samples))]
        hidden = self.embed(rows, past, bucket)
        last = np.array([sample.length - past - 1 for sample in rows], np.int32)
        phase = f"prefill {bucket} {past == 0}"
        return self._run(decoder, phase, hidden, np.full(self.batch, past, np.int32), last, past == 0)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Step:
        """One more token `int32[B]` of each sequence; `lengths` count it."""
        from mindspore import Tensor

        decoder = self.decoders[self.length]
        hidden = self._call(self.embedder, "words 1", Tensor(tokens.reshape(-1, 1).astype(np.int32)))
        past = np.minimum(lengths, self.length).astype(np.int32) - 1
        return self._run(decoder, "decode", hidden, past, np.zeros(self.batch, np.int32), False)

    def cache_length(self, room: int, limit: int) -> int:
        return min(round_up(room, self.cache_step), limit)

    def decoder(self, length: int) -> Any:
        from llavanext_cli.model.backend.decoder import Decoder

        if length not in self.decoders:
            self.decoders[length] = Decoder(self.network, self.batch, length, self.workers)
            self.decoders[length].set_train(False)
        return self.decoders[length]

    def embed(self, samples: Sequence[EncodedSample], past: int, bucket: int) -> Any:
        """Embeddings of tokens `past` onwards, `[B, bucket, D]`."""
        from mindspore import Tensor

        tiles = max(len(sample.tiles) for sample in samples)
        frames = max(len(sample.frames) for sample in samples)
        longest = max(past + bucket, *[sample.length for sample in samples])
        batch = collate(samples, longest, tiles, frames, self.arch)
        ids = np.ascontiguousarray(batch.input_ids[:, past : past + bucket])
        index = np.ascontiguousarray(batch.feature_index[:, past : past + bucket])
        rows = tiles * self.arch.tile_features + frames * self.arch.frame_features
        if index.min() > rows:
            return self._call(self.embedder, f"words {bucket}", Tensor(ids))
        table = np.zeros((len(samples), rows, self.arch.text.hidden_size), np.float32)
        own = len({id(sample) for sample in samples})  # the rows that fill up the batch repeat the first sample
        for row in range(own):
            self.fill_feature_table(table[row], batch.tiles[row], index[row], tiles)
        table[own:] = table[0]
        return self._call(self.embedder, f"media {bucket} {rows}", Tensor(ids), Tensor(table), Tensor(index))

    def fill_feature_table(self, table: np.ndarray, pixels: np.ndarray, index: np.ndarray, tiles: int) -> None:
        """Compute the rows of a feature table `[N, D]` that `index` points at: whole tiles and frames of `pixels`."""
        for begin, count, size, first, is_video in (
            (0, tiles, self.arch.tile_features, 0, False),
            (tiles * self.arch.tile_features, len(pixels) - tiles, self.arch.frame_features, tiles, True),
        ):
            used = np.unique(index[(index >= begin) & (index < begin + count * size)] - begin) // size
            if not len(used):
                continue
            at, end = int(used[0]), int(used[-1]) + 1
            while at < end:
                piece = next(number for number in PIECES if number <= end - at)
                rows = self.encode_tiles(pixels[first + at : first + at + piece], is_video)
                table[begin + at * size : begin + (at + piece) * size] = rows
                at += piece

    def encode_tiles(self, tiles: np.ndarray, is_video: bool) -> np.ndarray:
        """Feature rows of a few tiles or frames, `float32[T * Q, D]`."""
        from mindspore import Tensor

        phase = f"tower {len(tiles)} {is_video}"
        return self._call(self.tower, phase, Tensor(np.ascontiguousarray(tiles)), is_video).asnumpy()

    def _run(self, decoder: Any, phase: str, hidden: Any, past: np.ndarray, last: np.ndarray, first: bool) -> Step:
        from mindspore import Tensor

        tokens, logits = self._call(decoder, phase, hidden, Tensor(past), Tensor(last), first)
        return Step(tokens.asnumpy(), logits)

    def _call(self, cell: Any, phase: str, *inputs: Any) -> Any:
        """Run one graph to its end. MindSpore knows it by phase, which must not be plain "prefill" or "increment"."""
        cell.phase = phase
        key = f"{type(cell).__name__} {phase} of {self.batch} x {self.length if cell in self.decoders.values() else 0}"
        with defer_signals(), self.graphs.compiling(key) if self.graphs else nullcontext():
            return cell(*inputs)
