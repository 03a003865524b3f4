"""The model's layers for answering on a CPU: cells without parameters, whose weights are inputs.

The layers of a transformer are alike, so one graph serves all of them: it is compiled once for a shape, whatever the
depth, and called with the weights of one layer after another, straight from the memory-mapped checkpoint.

    TowerInput → TowerLayer x n → Projection                 tiles or frames → rows of the feature table
    DecoderLayer x (n - 1) → DecoderLayer of one row → Head   embeddings → logits

Nothing here needs MindFormers. Element-wise operators that broadcast over the inner axes are many times slower than
full ones on this backend, so masks and rotary tables come in full size, made once for all layers.

Source: as vision_tower.py, projector.py and MindFormers' Llama. Shapes: records.py.
"""

from __future__ import annotations

import math

from mindspore import nn
from mindspore.ops import operations as P

from llavanext_cli.model.activation import build_activation
from llavanext_cli.model.backend.attention import Attention
from llavanext_cli.model.backend.norms import LayerNorm, RMSNorm
from llavanext_cli.model.projector import Pooler

CHUNK = 256
"""Rows of one chunk of queries."""


class Dense(nn.Cell):
    """`x W^T + b`: `[..., in]` → `[..., out]`; without a bias where it is None."""

    def __init__(self):
        super().__init__()
        self.matmul = P.MatMul(transpose_b=True)
        self.bias_add = P.BiasAdd()
        self.reshape = P.Reshape()

    def construct(self, x, weight, bias=None):
        rows = self.matmul(self.reshape(x, (-1, x.shape[-1])), weight)
        if bias is not None:
            rows = self.bias_add(rows, bias)
        return self.reshape(rows, (*x.shape[:-1], weight.shape[0]))


class TowerInput(nn.Cell):
    """Patches behind the class token, with positions, normed: `float32[T, 3, R, R]` → `[T, P*P+1, Dv]`."""

    def __init__(self, vision):
        super().__init__()
        self.side, self.patch, self.width = vision.patches, vision.patch_size, vision.hidden_size
        self.dense = Dense()
        self.norm = LayerNorm(vision.hidden_size, vision.layer_norm_eps)
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.concat = P.Concat(axis=1)
        self.tile = P.Tile()
        self.add = P.Add()

    def construct(self, tiles, first, patch_weight, positions, norm, norm_bias):
        count, side, patch = tiles.shape[0], self.side, self.patch
        pixels = self.reshape(tiles, (count, 3, side, patch, side, patch))
        pixels = self.transpose(pixels, (0, 2, 4, 1, 3, 5))  # [T, P, P, 3, p, p]
        pixels = self.reshape(pixels, (count, side * side, 3 * patch * patch))
        patches = self.dense(pixels, self.reshape(patch_weight, (self.width, -1)))  # [T, P*P, Dv]
        hidden = self.concat((self.tile(self.reshape(first, (1, 1, self.width)), (count, 1, 1)), patches))
        hidden = self.add(hidden, self.tile(self.reshape(positions, (1, -1, self.width)), (count, 1, 1)))
        return self.norm(hidden, norm, norm_bias)[0]


class TowerLayer(nn.Cell):
    """A layer of the vision tower: `[T, L, Dv]` → the same."""

    def __init__(self, vision):
        super().__init__()
        self.heads, self.head_dim = vision.num_attention_heads, vision.hidden_size // vision.num_attention_heads
        self.dense = Dense()
        self.norm = LayerNorm(vision.hidden_size, vision.layer_norm_eps)
        self.attention = Attention(self.head_dim)
        self.activation = build_activation(vision.hidden_act)
        self.split_qkv = P.Split(axis=1, output_num=3)
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.add = P.Add()

    def construct(self, hidden, n1, n1_bias, qkv, qkv_bias, out, out_bias, n2, n2_bias, fc1, fc1_bias, fc2, fc2_bias):
        count, length, width = hidden.shape
        heads = self.dense(self.norm(hidden, n1, n1_bias)[0], qkv, qkv_bias)
        heads = self.transpose(self.reshape(heads, (count, length, 3 * self.heads, self.head_dim)), (0, 2, 1, 3))
        query, key, value = self.split_qkv(heads)  # [T, heads, L, head_dim]
        context = self.transpose(self.attention(query, key, value), (0, 2, 1, 3))
        hidden = self.add(hidden, self.dense(self.reshape(context, (count, length, width)), out, out_bias))
        inner = self.activation(self.dense(self.norm(hidden, n2, n2_bias)[0], fc1, fc1_bias))
        return self.add(hidden, self.dense(inner, fc2, fc2_bias))


class Projection(nn.Cell):
    """Features of tiles or frames to rows of the feature table: `[T, P*P+1, Dv]` → `[T * Q, D]`, frames `[T * Qv, D]`.

    Args:
        config: what `Pooler` reads.
        is_video: pool the features, as those of frames are.
    """

    def __init__(self, config, is_video: bool):
        super().__init__()
        architecture = config.architecture
        self.skip_class = architecture.vision_feature_select_strategy == "default"
        self.pool_first = architecture.pool_before_projector
        self.dense = Dense()
        self.activation = build_activation(architecture.projector_hidden_act)
        width = architecture.vision.hidden_size if self.pool_first else architecture.text.hidden_size
        self.pooler = Pooler(config, width) if is_video else None
        self.reshape = P.Reshape()

    def construct(self, features, weight_1, bias_1, weight_2, bias_2):
        if self.skip_class:
            features = features[:, 1:]
        if self.pooler is not None and self.pool_first:
            features = self.pooler(features)
        features = self.dense(self.activation(self.dense(features, weight_1, bias_1)), weight_2, bias_2)
        if self.pooler is not None and not self.pool_first:
            features = self.pooler(features)
        return self.reshape(features, (-1, features.shape[-1]))


class DecoderLayer(nn.Cell):
    """A layer of the language model, with or without keys and values of earlier positions.

        chunk 1  ██▒▒               Each chunk of query rows attends to what is cached (█), to the chunks before it,
        chunk 2  ██████▒▒           and to its own rows under a triangular mask (▒).
        chunk 3  ██████████▒▒

    Padding is on the right: a key is seen by later positions and by no others.

    Args:
        text: architecture of the language model.
        workers: processes that share each layer (tensor parallelism, Shoeybi et al. 2019): each has some heads and some
            of the hidden units, and an all-reduce adds up what they compute.

    Inputs:
        - **hidden** - `[B, S, D]`.
        - **last** - `int32[B, 1]`, the only row of each sequence that is wanted; None: all of them.
        - **cos**, **sin** - `[B, heads, S, head_dim]`; **last_cos**, **last_sin** - `[B, heads, 1, head_dim]` or None.
        - **mask** - `[c, c]`, added to the scores of a chunk's own keys, where c is the lesser of S and `CHUNK`; or,
          with `last`, `[B, S]`, added to those of the one row.
        - **keys**, **values** - `[B, kv_heads, C, head_dim]` of earlier positions, or None.
        - **cache_mask** - `[B, C]`, added to the scores of those keys, or None.
        - the weights, in the order of `keymap`'s layer.

    Outputs:
        `[B, S, D]` (with `last` `[B, 1, D]`), and keys and values of these positions, `[B, kv_heads, S, head_dim]`.
    """

    def __init__(self, text, workers: int = 1):
        super().__init__()
        self.heads, self.kv_heads = text.num_attention_heads // workers, text.num_key_value_heads // workers
        self.head_dim, self.group = text.head_dim, text.num_attention_heads // text.num_key_value_heads
        self.scale = 1 / math.sqrt(self.head_dim)
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.dense = Dense()
        self.sigmoid = P.Sigmoid()
        self.all_reduce = P.AllReduce() if workers > 1 else None
        self.pick = P.Gather(batch_dims=1)
        self.scores = P.BatchMatMul(transpose_b=True)
        self.mix = P.BatchMatMul()
        self.softmax = P.Softmax()
        self.halves = P.Split(axis=-1, output_num=2)
        self.join = P.Concat(axis=-1)
        self.join_rows = P.Concat(axis=2)
        self.neg = P.Neg()
        self.mul = P.Mul()
        self.add = P.Add()
        self.tile = P.Tile()
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()

    def construct(
        self,
        hidden, last, cos, sin, last_cos, last_sin, mask, keys, values, cache_mask,
        attention_norm, wq, wk, wv, wo, ffn_norm, w1, w2, w3,
    ):  # fmt: skip
        normed = self.norm(hidden, attention_norm)[0]
        residual, asking, query_cos, query_sin = hidden, normed, cos, sin
        if last is not None:
            residual, asking = self.pick(hidden, last, 1), self.pick(normed, last, 1)
            query_cos, query_sin = last_cos, last_sin
        query = self.mul(self.rotate(self.split(self.dense(asking, wq)), query_cos, query_sin), self.scale)
        key = self.rotate(self.split(self.dense(normed, wk)), cos, sin)
        value = self.split(self.dense(normed, wv))
        context = self.attend(query, key, value, mask, keys, values, cache_mask)
        residual = self.add(residual, self.sum_up(self.dense(context, wo)))
        normed = self.norm(residual, ffn_norm)[0]
        gate = self.dense(normed, w1)
        inner = self.mul(self.mul(gate, self.sigmoid(gate)), self.dense(normed, w3))
        return self.add(residual, self.sum_up(self.dense(inner, w2))), key, value

    def sum_up(self, part):
        """The sum of what all workers' heads or hidden units give."""
        return part if self.all_reduce is None else self.all_reduce(part)

    def split(self, x):
        """`[B, S, heads * head_dim]` → `[B, heads, S, head_dim]`."""
        batch, length, _ = x.shape
        return self.transpose(self.reshape(x, (batch, length, -1, self.head_dim)), (0, 2, 1, 3))

    def rotate(self, x, cos, sin):
        """Rotary embedding of `[B, heads, S, head_dim]` (Su et al. 2021), by halves."""
        low, high = self.halves(x)
        heads = x.shape[1]
        if heads < self.heads:
            cos, sin = cos[:, :heads], sin[:, :heads]
        return self.add(self.mul(x, cos), self.mul(self.join((self.neg(high), low)), sin))

    def attend(self, query, key, value, mask, keys, values, cache_mask):
        """`[B, heads, T, head_dim]` against the keys of `[B, kv_heads, S, head_dim]` and the cache → `[B, T, D]`."""
        batch, heads, length, dim = query.shape
        cached = 0 if keys is None else keys.shape[2]
        is_last = length < key.shape[2]  # one row, which sees all keys before it
        parts = ()
        for begin in range(0, length, CHUNK):
            count = min(CHUNK, length - begin)
            before, end = (0, key.shape[2]) if is_last else (begin, begin + count)
            rows = self.reshape(query[:, :, begin : begin + count], (batch, self.kv_heads, self.group * count, dim))
            scores = ()
            if cached:
                scores += (self.add(self.scores(rows, keys), self.spread_row(cache_mask, count)),)
            if before:
                scores += (self.scores(rows, key[:, :, :before]),)
            own = self.spread_row(mask, count) if is_last else self.spread_square(mask[:count, :count], batch)
            scores += (self.add(self.scores(rows, key[:, :, before:end]), own),)
            weights = self.softmax(scores[0] if len(scores) == 1 else self.join(scores))
            if cached:
                part = self.mix(weights[:, :, :, :cached], values)
                part = self.add(part, self.mix(weights[:, :, :, cached:], value[:, :, :end]))
            else:
                part = self.mix(weights, value[:, :, :end])
            parts += (self.reshape(part, (batch, heads, count, dim)),)
        context = parts[0] if len(parts) == 1 else self.join_rows(parts)
        return self.reshape(self.transpose(context, (0, 2, 1, 3)), (batch, length, heads * dim))

    def spread_row(self, mask, count):
        """`[B, K]`, the same for `count` rows of each head → `[B, kv_heads, group * count, K]`."""
        batch, keys = mask.shape
        return self.tile(self.reshape(mask, (batch, 1, 1, keys)), (1, self.kv_heads, self.group * count, 1))

    def spread_square(self, mask, batch):
        """`[c, c]`, the same for each head → `[B, kv_heads, group * c, c]`."""
        return self.tile(self.reshape(mask, (1, 1, *mask.shape)), (batch, self.kv_heads, self.group, 1))


class Head(nn.Cell):
    """The last norm and some rows of the output matrix: `[B, 1, D]` → logits `[B, rows]`."""

    def __init__(self, text):
        super().__init__()
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.matmul = P.MatMul(transpose_b=True)
        self.reshape = P.Reshape()

    def construct(self, hidden, norm, weight):
        rows = self.reshape(hidden, (hidden.shape[0], hidden.shape[2]))
        return self.matmul(self.norm(rows, norm)[0], weight)
