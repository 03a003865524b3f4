"""The CPU's way of computing: one layer of tower and decoder, compiled once for a shape and called for all layers.

    tower     tiles of one image, or a few frames    one graph of a layer for each number of tiles (`PIECES`)
    prefill   a prompt, or what a cache lacks of it  one graph of a layer for each prompt bucket
    decode    one more token                         one graph of a layer for each batch and cache

Weights are graph inputs, mapped from the checkpoint (weights/mapped.py). Keys and values are NumPy arrays, which
MindSpore reads in place. Nothing here depends on what was asked before, so a question gets the same shapes, and with
them the same answer, whenever it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.inference.step import Step, round_up
from llavanext_cli.processing.sample_layout import collate
from llavanext_cli.signals import defer_signals

if TYPE_CHECKING:
    from llavanext_cli.config.architecture import Architecture, TextArchitecture
    from llavanext_cli.records import EncodedSample
    from llavanext_cli.weights.mapped import MappedWeights, Part

PIECES = (8, 5, 4, 3, 2, 1)
"""Tiles that one call of the tower takes: 3 to 5 are one image, 8 are frames."""
MASKED = -1e9
"""Added to the score of a key that may not be seen."""

TOWER_INPUT = ("class_embedding", "patch_embedding.weight", "position_embedding")
TOWER_LAYER = tuple(
    f"{part}.{kind}"
    for part in ("layer_norm1", "attention.qkv", "attention.out", "layer_norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
)
DECODER_LAYER = (
    "attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo",
    "ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3",
)  # fmt: skip
PROJECTOR = ("linear_1.weight", "linear_1.bias", "linear_2.weight", "linear_2.bias")
MODEL = "language_model.model"
EMBEDDING = f"{MODEL}.tok_embeddings.embedding_weight"
WORDS = 8016
"""Rows of a half-precision output matrix that are widened at a time; a fourth of LLaVA-NeXT's."""


class CpuEngine:
    """Prefill and decoding on a CPU.

    Args:
        weights: of the checkpoint; of several workers, each its own part.
        arch: of the same checkpoint.
        batch: sequences computed at once.
        bucket: prompts are padded to a multiple of this many tokens.
        cache_step: a cache is as long as a multiple of this many tokens.
        workers: processes that share each layer.
    """

    def __init__(
        self, weights: MappedWeights, arch: Architecture, batch: int, bucket: int, cache_step: int, workers: int = 1
    ):
        from mindspore import dtype as mstype

        from llavanext_cli.model.backend.layers import CHUNK, DecoderLayer, Head, Projection, TowerInput, TowerLayer

        self.weights, self.arch, self.batch, self.bucket, self.cache_step = weights, arch, batch, bucket, cache_step
        text, self.chunk = arch.text, CHUNK
        self.kv_heads, self.heads = text.num_key_value_heads // workers, text.num_attention_heads // workers
        config = SimpleNamespace(architecture=arch, compute_dtype=mstype.float32, param_init_type=mstype.float32)
        self.tower_input, self.tower_layer = TowerInput(arch.vision), TowerLayer(arch.vision)
        self.projections = {is_video: Projection(config, is_video) for is_video in (False, True)}
        if arch.spatial_pool_mode == "conv":
            pooler = self.projections[True].pooler
            for name in ("weight", "bias"):
                getattr(pooler.conv, name).set_data(weights.tensor(f"pooler.conv.{name}"))
        self.layer, self.head = DecoderLayer(text, workers), Head(text)
        self.head_name = EMBEDDING if text.tie_word_embeddings else "language_model.lm_head.weight"
        self.rates = rotary_rates(text)
        self.length = 0
        self.caches: list[tuple[np.ndarray, np.ndarray]] = []

    def prefill(self, samples: Sequence[EncodedSample], room: int, limit: int, past: int = 0) -> Step:
        """Compute the prompts.

        Args:
            samples: up to `batch` of them.
            room: positions that prompt and answer take at most.
            limit: longest cache.
            past: tokens of the only sample that are in the cache already.
        """
        self.resize(self.cache_length(room, limit), past)
        longest = max(sample.length for sample in samples) - past
        bucket = min(round_up(longest, self.bucket), self.length - past)
        rows = [*samples, *[samples[0]] * (self.batch - len(samples))]
        last = np.array([sample.length - past - 1 for sample in rows], np.int32)
        return self.run(self.embed(rows, past, bucket), np.full(self.batch, past, np.int32), last)

    def decode(self, tokens: np.ndarray, lengths: np.ndarray) -> Step:
        """One more token `int32[B]` of each sequence; `lengths` count it."""
        hidden = self.weights.rows(EMBEDDING, tokens)[:, None]
        past = np.minimum(lengths, self.length).astype(np.int32) - 1
        return self.run(hidden, past, np.zeros(self.batch, np.int32))

    def cache_length(self, room: int, limit: int) -> int:
        return min(round_up(room, self.cache_step), limit)

    def resize(self, length: int, past: int) -> None:
        """Make caches of `length` positions, with what is cached of the first `past` ones."""
        if length == self.length:
            return
        shape = (self.batch, self.kv_heads, length, self.arch.text.head_dim)
        before, self.caches = self.caches, []
        for number in range(self.arch.text.num_hidden_layers):
            pair = np.zeros(shape, np.float32), np.zeros(shape, np.float32)
            if past:
                for new, old in zip(pair, before[number], strict=True):
                    new[:, :, :past] = old[:, :, :past]
            self.caches.append(pair)
        self.length = length

    def run(self, hidden: np.ndarray, past: np.ndarray, last: np.ndarray) -> Step:
        """All layers: `hidden float32[B, S, D]` at positions `past int32[B]` onwards; only row `last` is wanted."""
        from mindspore import Tensor

        length = hidden.shape[1]
        position = past[:, None] + np.arange(length, dtype=np.int32)  # [B, S]
        cos, sin = self.rotary(position)
        last_cos, last_sin = self.rotary(np.take_along_axis(position, last[:, None], 1))
        size = min(length, self.chunk)
        mask = Tensor(np.triu(np.full((size, size), MASKED, np.float32), 1))
        last_mask = Tensor(np.where(np.arange(length) > last[:, None], MASKED, 0).astype(np.float32))
        cache_mask = Tensor(np.where(np.arange(self.length) >= past[:, None], MASKED, 0).astype(np.float32))
        state = Tensor(hidden)
        names = self.layer_names()
        for number, group in enumerate(names):
            is_last = number == len(names) - 1
            weights = self.weights.group(group, names[0] if is_last else names[number + 1])
            cached = self.cached(number) if past.any() else (None, None)
            rows = (Tensor(last[:, None]), cos, sin, last_cos, last_sin) if is_last else (None, cos, sin, None, None)
            masks = (last_mask if is_last else mask, *cached, cache_mask if past.any() else None)
            state, key, value = self.call(self.layer, state, *rows, *masks, *weights)
            self.store(number, past, key.asnumpy(), value.asnumpy())
        return self.predict(state)

    def predict(self, state: Any) -> Step:
        """The last norm and the output matrix, a block of words at a time, for the last hidden state `[B, 1, D]`."""
        vocabulary = self.arch.text.vocab_size
        block = vocabulary if self.weights.is_wide(self.head_name) else min(vocabulary, WORDS)
        norm = self.weights.tensor(f"{MODEL}.norm_out.weight")
        logits = np.zeros((self.batch, vocabulary), np.float32)
        for begin in range(0, vocabulary, block):
            begin = min(begin, vocabulary - block)  # the last block overlaps, so that all have one shape
            weight = self.weights.block(self.head_name, begin, begin + block)
            logits[:, begin : begin + block] = self.call(self.head, state, norm, weight).asnumpy()
        return Step(logits.argmax(-1).astype(np.int32), lambda: logits)

    def layer_names(self) -> list[tuple[str, ...]]:
        count = self.arch.text.num_hidden_layers
        return [tuple(f"{MODEL}.layers.{number}.{name}.weight" for name in DECODER_LAYER) for number in range(count)]

    def rotary(self, position: np.ndarray) -> tuple[Any, Any]:
        """Cosines and sines of positions `[B, S]`, one for each head: `[B, heads, S, head_dim]` each."""
        from mindspore import Tensor

        angles = position[..., None].astype(np.float32) * self.rates  # [B, S, head_dim]
        whole = (np.repeat(of(angles)[:, None], self.heads, 1) for of in (np.cos, np.sin))
        cos, sin = map(Tensor.from_numpy, whole)
        return cos, sin

    def cached(self, number: int) -> tuple[Any, Any]:
        from mindspore import Tensor

        keys, values = self.caches[number]
        return Tensor.from_numpy(keys), Tensor.from_numpy(values)

    def store(self, number: int, past: np.ndarray, key: np.ndarray, value: np.ndarray) -> None:
        """Put keys and values `[B, kv_heads, S, head_dim]` into the cache, from each sequence's `past` on."""
        for cache, new in zip(self.caches[number], (key, value), strict=True):
            for row, begin in enumerate(past):
                end = min(begin + new.shape[2], self.length)
                cache[row, :, begin:end] = new[row, :, : end - begin]

    def embed(self, samples: Sequence[EncodedSample], past: int, bucket: int) -> np.ndarray:
        """Embeddings of tokens `past` onwards, with features in the places of media: `float32[B, bucket, D]`."""
        tiles = max(len(sample.tiles) for sample in samples)
        frames = max(len(sample.frames) for sample in samples)
        longest = max(past + bucket, *[sample.length for sample in samples])
        batch = collate(samples, longest, tiles, frames, self.arch)
        ids = batch.input_ids[:, past : past + bucket]
        index = batch.feature_index[:, past : past + bucket]
        count = tiles * self.arch.tile_features + frames * self.arch.frame_features  # N: row N is the newline
        hidden = self.weights.rows(EMBEDDING, ids)
        for row, sample in enumerate(samples):
            if (first := next((other for other in range(row) if samples[other] is sample), None)) is not None:
                hidden[row] = hidden[first]
                continue
            own = index[row]
            if own.min() > count:
                continue
            table = self.feature_table(batch.tiles[row], own, tiles)
            hidden[row][own <= count] = table[own[own <= count]]
        return hidden

    def feature_table(self, pixels: np.ndarray, index: np.ndarray, tiles: int) -> np.ndarray:
        """The rows of a feature table that `index` points at, whole tiles and frames of `pixels`, and the newline:
        `float32[N + 1, D]`; other rows are zero."""
        arch = self.arch
        images = tiles * arch.tile_features
        rows = images + (len(pixels) - tiles) * arch.frame_features
        table = np.zeros((rows + 1, arch.text.hidden_size), np.float32)
        table[rows] = self.weights.array("image_newline")
        for begin, count, size, first, is_video in (
            (0, tiles, arch.tile_features, 0, False),
            (images, len(pixels) - tiles, arch.frame_features, tiles, True),
        ):
            used = np.unique(index[(index >= begin) & (index < begin + count * size)] - begin) // size
            if len(used):
                for at, piece in pieces(int(used[0]), int(used[-1]) + 1):
                    features = self.encode_tiles(pixels[first + at : first + at + piece], is_video)
                    table[begin + at * size : begin + (at + piece) * size] = features
        return table

    def encode_tiles(self, tiles: np.ndarray, is_video: bool) -> np.ndarray:
        """Feature rows of a few tiles or frames, `float32[T * Q, D]`."""
        from mindspore import Tensor

        get = self.weights.group
        first = [f"vision_tower.embeddings.{name}" for name in TOWER_INPUT]
        first += [f"vision_tower.pre_layernorm.{kind}" for kind in ("weight", "bias")]
        hidden = self.call(self.tower_input, Tensor(np.ascontiguousarray(tiles)), *get(first))
        count = self.arch.vision_layers
        names = [tuple(f"vision_tower.layers.{number}.{name}" for name in TOWER_LAYER) for number in range(count)]
        for number, group in enumerate(names):
            hidden = self.call(self.tower_layer, hidden, *get(group, names[(number + 1) % count]))
            hidden.asnumpy()  # waits: the buffers of its weights are filled again
        weights = [*get([f"projector.{name}" for name in PROJECTOR if f"projector.{name}" in self.weights.specs])]
        if len(weights) == 2:  # no biases
            weights = [weights[0], None, weights[1], None]
        return self.call(self.projections[is_video], hidden, *weights).asnumpy()

    def call(self, cell: Any, *inputs: Any) -> Any:
        """Run one graph; an interrupt waits until it is compiled."""
        with defer_signals():
            return cell(*inputs)


def pieces(begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Tiles `begin` to `end` in calls of the tower: (first tile, number of tiles)."""
    while begin < end:
        piece = next(number for number in PIECES if number <= end - begin)
        yield begin, piece
        begin += piece


def rotary_rates(text: TextArchitecture) -> np.ndarray:
    """Angle of one position for each element of a head, `float32[head_dim]` (Su et al. 2021). Linear scaling divides it
    (Chen et al. 2023)."""
    rates = 1.0 / text.rope_theta ** (np.arange(0, text.head_dim, 2, dtype=np.float32) / text.head_dim)
    scaling = text.rope_scaling.factor if text.rope_scaling else 1.0
    return np.tile(rates, 2).astype(np.float32) / np.float32(scaling)


def worker_parts(arch: Architecture, rank: int, workers: int) -> dict[str, Part]:
    """What worker `rank` keeps of each layer's weights `[out, in]`: rows of those that make heads and hidden units,
    columns of those that use them. Tower, embeddings and output matrix are whole on every worker."""
    text = arch.text
    heads, kv_heads, hidden = text.num_attention_heads, text.num_key_value_heads, text.intermediate_size
    sizes = {
        "attention.wq": (0, heads * text.head_dim),
        "attention.wk": (0, kv_heads * text.head_dim),
        "attention.wv": (0, kv_heads * text.head_dim),
        "attention.wo": (1, heads * text.head_dim),
        "feed_forward.w1": (0, hidden),
        "feed_forward.w2": (1, hidden),
        "feed_forward.w3": (0, hidden),
    }
    return {
        f"{MODEL}.layers.{layer}.{name}.weight": (axis, rank * size // workers, (rank + 1) * size // workers)
        for layer in range(text.num_hidden_layers)
        for name, (axis, size) in sizes.items()
    }
