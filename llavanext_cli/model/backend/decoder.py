"""Answering on a CPU: MindFormers' Llama layers, called by our own code around a KV cache.

    prefill  a whole prompt: S tokens, nothing cached     attends to itself, in the chunks of rows of attention.py
    decode   S more tokens, one or a whole turn           attends to the cache, itself included

Both end with the logits of one position of each sequence and its likeliest token, found on the device. The last layer
computes keys and values of all positions, and the rest of that position only. Padding is on the right: only later
positions attend to a key, so what is written after the end of a sequence has no effect, and is overwritten when the
sequence gets there. Sequences of a batch differ in length.

The weights are the network's own parameters. As in cpu.py, masks and rotary tables are tiled to full size first, once
for all layers.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from llavanext_cli.model.backend.attention import MASKED
from llavanext_cli.model.backend.cpu import ApplyRotary
from llavanext_cli.model.backend.norms import RMSNorm

CHUNK = 512
"""Rows of one chunk of queries."""


class MediaEncoder(nn.Cell):
    """Tiles or frames to rows of the feature table: `float32[T, 3, R, R]` → `[T * Q, D]` (frames: `[T * Qv, D]`)."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network
        self.reshape = P.Reshape()
        self.width = network.width

    def construct(self, tiles, frames):
        count = tiles.shape[0]
        features = self.network.features(tiles.reshape((1, *tiles.shape)), count if frames else 0)
        return self.reshape(features, (-1, self.width))


class Embedder(nn.Cell):
    """Token embeddings, some replaced by rows of a feature table `[B, N, D]`: `int32[B, S]` → `[B, S, D]`."""

    def __init__(self, network):
        super().__init__(auto_prefix=False)
        self.network = network
        self.dtype = network.config.compute_dtype
        self.cast = P.Cast()

    def construct(self, input_ids, table=None, feature_index=None):
        words = self.cast(self.network.language_model.to_embeddings(input_ids), self.dtype)
        if table is None:
            return words
        return self.network.fusion(words, table, self.network.image_newline, feature_index)


class Decoder(nn.Cell):
    """The language model with a cache.

    Args:
        network: `LlavaNext`, built for the CPU.
        batch: sequences.
        length: positions of the cache (C).
        workers: processes that share each layer, see sharing.py.

    Inputs:
        - **hidden** - `[B, S, D]` embeddings.
        - **past** - `int32[B]`, number of cached positions; zeros for a prefill.
        - **last** - `int32[B]`, index of each sequence's last position among the S.
        - **is_prefill** (bool) - a constant of the graph: nothing is cached.

    Outputs:
        `int32[B]` likeliest tokens and `[B, V]` logits after position `last`.
    """

    def __init__(self, network, batch: int, length: int, workers: int = 1):
        super().__init__(auto_prefix=False)
        llama, config = network.language_model, network.config
        text = config.architecture.text
        self.batch, self.length = batch, length
        self.heads, self.kv_heads = text.num_attention_heads // workers, text.num_key_value_heads // workers
        self.head_dim = text.head_dim
        self.group = self.heads // self.kv_heads
        self.cos, self.sin = llama.model.freqs_mgr.freqs_cos, llama.model.freqs_mgr.freqs_sin
        cells = [CachedLayer(layer, config, batch, length, n, workers) for n, layer in enumerate(llama.model.layers)]
        self.layers = nn.CellList(cells, auto_prefix=False)
        self.count = len(cells)
        self.norm_out, self.lm_head = llama.model.norm_out, llama.lm_head
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.positions = Tensor(np.arange(max(length, 1), dtype=np.int32))
        self.first_row = Tensor(np.arange(batch * self.kv_heads, dtype=np.int32).reshape(-1, 1) * length)
        self.dtype = config.compute_dtype
        self.gather = P.Gather()
        self.pick = P.Gather(batch_dims=1)
        self.tile = P.Tile()
        self.reshape = P.Reshape()
        self.cast = P.Cast()
        self.mul = P.Mul()
        self.greater = P.Greater()
        self.argmax = P.Argmax(axis=-1, output_type=mstype.int32)

    def construct(self, hidden, past, last, is_prefill):
        batch, length, width = hidden.shape
        position = self.reshape(past, (batch, 1)) + self.reshape(self.positions[:length], (1, length))  # [B, S]
        final = self.reshape(past + last, (batch, 1))
        rows = self.cache_rows(position, length)
        rope, final_rope = self.rope(position, length), self.rope(final, 1)
        masks = self.causal_masks(position, length) if is_prefill else self.cache_masks(position, length)
        final_mask = self.cache_mask(final, 1)
        for i in range(self.count - 1):
            hidden = self.layers[i](hidden, None, rope, rope, rows, masks, is_prefill)
        end = self.pick(hidden, self.reshape(last, (batch, 1)), 1)  # [B, 1, D]
        end = self.layers[self.count - 1](hidden, end, rope, final_rope, rows, (final_mask,), False)
        logits = self.lm_head(self.norm(self.reshape(end, (batch, width)), self.norm_out.weight)[0])
        return self.argmax(logits), logits

    def rope(self, position, length):
        """Cosines and sines of positions `[B, S]`, one for each head: `[B, heads, S, head_dim]` each."""
        flat = self.reshape(position, (-1,))
        shape, times = (self.batch, 1, length, self.head_dim), (1, self.heads, 1, 1)
        cos = self.tile(self.reshape(self.gather(self.cos, flat, 0), shape), times)
        return cos, self.tile(self.reshape(self.gather(self.sin, flat, 0), shape), times)

    def cache_rows(self, position, length):
        """Row `(b * kv_heads + head) * C + p` of the cache for each head and position: `int32[B * kv_heads * S]`."""
        position = self.reshape(position, (self.batch, 1, length))
        position = self.reshape(self.tile(position, (1, self.kv_heads, 1)), (-1, length))
        return self.reshape(position + self.first_row, (-1,))

    def causal_masks(self, position, length):
        """For each chunk of rows, added to its scores with keys up to its last row: `[B, kv_heads, group * c, end]`."""
        masks = ()
        line = self.reshape(position[0], (1, length))
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            future = self.greater(line[:, :end], self.reshape(line[:, begin:end], (-1, 1)))
            mask = self.reshape(self.mul(self.cast(future, self.dtype), MASKED), (1, 1, end - begin, end))
            masks += (self.tile(mask, (self.batch, self.kv_heads, self.group, 1)),)
        return masks

    def cache_masks(self, position, length):
        """`cache_mask` of each chunk of rows: a tuple of `[B, kv_heads, group * c, C]`."""
        masks = ()
        for begin in range(0, length, CHUNK):
            end = min(begin + CHUNK, length)
            masks += (self.cache_mask(position[:, begin:end], end - begin),)
        return masks

    def cache_mask(self, position, length):
        """Added to the scores of queries at positions `[B, c]` with all of the cache: `[B, kv_heads, group * c, C]`."""
        keys = self.tile(self.reshape(self.positions, (1, 1, self.length)), (self.batch, length, 1))
        queries = self.tile(self.reshape(position, (self.batch, length, 1)), (1, 1, self.length))
        mask = self.mul(self.cast(self.greater(keys, queries), self.dtype), MASKED)
        mask = self.reshape(mask, (self.batch, 1, length, self.length))
        return self.tile(mask, (1, self.kv_heads, self.group, 1))


class CachedLayer(nn.Cell):
    """One of MindFormers' decoder layers with its cache.

    The cache has one row a head and position: `[B * kv_heads * C, head_dim]`, see `Decoder.cache_rows`.
    """

    def __init__(self, layer, config, batch: int, length: int, number: int, workers: int = 1):
        super().__init__(auto_prefix=False)
        text = config.architecture.text
        self.layer = layer
        self.batch, self.length = batch, length
        self.heads, self.kv_heads = text.num_attention_heads // workers, text.num_key_value_heads // workers
        self.head_dim = text.head_dim
        self.is_shared = workers > 1
        self.sum_up = P.AllReduce() if self.is_shared else None
        self.group = self.heads // self.kv_heads
        shape = (batch * self.kv_heads * length, self.head_dim)
        self.keys = Parameter(ops.zeros(shape, config.compute_dtype), name=f"cache.{number}.keys", requires_grad=False)
        self.values = Parameter(
            ops.zeros(shape, config.compute_dtype), name=f"cache.{number}.values", requires_grad=False
        )
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.scale = 1 / math.sqrt(self.head_dim)
        self.dtype = config.compute_dtype
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.apply_rotary = ApplyRotary()
        self.scores = P.BatchMatMul(transpose_b=True)
        self.weighted_sum = P.BatchMatMul()
        self.mul = P.Mul()
        self.add = P.Add()
        self.softmax = P.Softmax()
        self.update = P.ScatterUpdate()
        self.join = P.Concat(axis=2)
        self.cast = P.Cast()

    def construct(self, hidden, residual, rope, residual_rope, rows, masks, is_prefill):
        """`[B, T, D]`: the layer's output for the rows `residual [B, T, D]` (None: all of `hidden`); keys and values
        come from `hidden [B, S, D]`."""
        attention = self.layer.attention
        normed = self.norm(hidden, self.layer.attention_norm.weight)[0]
        query = normed
        if residual is None:
            residual = hidden
        else:
            query = self.norm(residual, self.layer.attention_norm.weight)[0]
        query = self.rotate(self.split_heads(attention.wq(query), self.heads), residual_rope)
        query = self.mul(query, self.scale)
        key = self.rotate(self.split_heads(attention.wk(normed), self.kv_heads), rope)
        value = self.split_heads(attention.wv(normed), self.kv_heads)
        keys = self.update(self.keys, rows, self.reshape(key, (-1, self.head_dim)))
        values = self.update(self.values, rows, self.reshape(value, (-1, self.head_dim)))
        if not is_prefill:
            shape = (self.batch, self.kv_heads, self.length, self.head_dim)
            key, value = self.reshape(keys, shape), self.reshape(values, shape)
        context = self.attend(query, key, value, masks)
        if is_prefill:
            context = ops.depend(context, (keys, values))
        residual = self.add(residual, self.all_reduce(attention.wo(context)))
        normed = self.norm(residual, self.layer.ffn_norm.weight)[0]
        return self.add(residual, self.all_reduce(self.layer.feed_forward(normed)))

    def all_reduce(self, part):
        """The sum over the workers' heads or hidden units."""
        return self.sum_up(part) if self.is_shared else part

    def attend(self, query, key, value, masks):
        """`[B, heads, T, head_dim]` against `[B, kv_heads, K, head_dim]`, a chunk of rows at a time → `[B, T, D]`."""
        batch, heads, length, dim = query.shape
        parts, begin = (), 0
        for mask in masks:
            count = mask.shape[2] // self.group
            seen = mask.shape[3]
            rows = query if count == length else query[:, :, begin : begin + count]
            rows = self.reshape(rows, (batch, self.kv_heads, self.group * count, dim))
            is_part = seen < key.shape[2]
            scores = self.scores(rows, key[:, :, :seen] if is_part else key)
            weights = self.softmax(self.cast(self.add(scores, mask), mstype.float32))
            part = self.weighted_sum(self.cast(weights, self.dtype), value[:, :, :seen] if is_part else value)
            parts += (self.reshape(part, (batch, heads, count, dim)),)
            begin += count
        context = self.join(parts) if len(parts) > 1 else parts[0]
        return self.reshape(self.transpose(context, (0, 2, 1, 3)), (batch, length, heads * dim))

    def split_heads(self, x, heads):
        """`[B, S, heads * head_dim]` → `[B, heads, S, head_dim]`."""
        batch, length, _ = x.shape
        return self.transpose(self.reshape(x, (batch, length, heads, self.head_dim)), (0, 2, 1, 3))

    def rotate(self, x, rope):
        """Rotary embedding of `[B, heads, S, head_dim]`."""
        heads = x.shape[1]
        cos, sin = rope
        if heads < self.heads:
            cos, sin = cos[:, :heads], sin[:, :heads]
        return self.apply_rotary(x, cos, sin)
