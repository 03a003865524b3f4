"""CPU cells that take the places of Ascend operators inside MindFormers' `LlamaForCausalLM`.

Each keeps the signature of the cell it replaces, so that the Llama code above it is the same on both machines.
Element-wise operators that broadcast are about twenty times slower than full ones on MindSpore's CPU backend: masks
and rotary tables are tiled to full size first (identical tiles of different layers become one in the compiled graph).
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Parameter, Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import functional as F
from mindspore.ops import operations as P

MASKED = -1e9
"""Added to the score of a key that may not be seen."""


def use_cpu_cells(language_model, config) -> None:
    """Swap the cells of `language_model` (a `LlamaForCausalLM`) that have no CPU kernel or a slow one."""
    text = config.architecture.text
    model = language_model.model
    model.casual_mask = CausalMask(config, text.num_attention_heads)
    for number, layer in enumerate(model.layers):
        if config.use_past:
            layer.attention.infer_attention = CachedAttention(config)
            layer.attention.infer_attention.update_parameters_name(f"layers.{number}.")
        else:
            layer.attention.apply_rotary_emb = Rotary(text.head_dim)


class CausalMask(nn.Cell):
    """In the place of `LowerTriangularMaskWithDynamic`: `[B, heads, S, S]` to be added to scores.

    Padding is on the right, where no token that counts can see it, so causality is all there is to mask.
    """

    def __init__(self, config, heads: int):
        super().__init__()
        self.heads = heads
        self.row = Tensor(np.arange(config.seq_length, dtype=np.int32))
        self.expand = P.ExpandDims()
        self.slice = P.StridedSlice()
        self.greater = P.Greater()
        self.mul = P.Mul()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.tile = P.Tile()
        self.shape = P.Shape()
        self.dtype = config.compute_dtype

    def construct(self, tokens):
        batch, length = self.shape(tokens)
        row = self.slice(self.row, (0,), (length,), (1,))
        future = self.greater(self.expand(row, 0), self.expand(row, 1))  # [S, S], key after query
        mask = self.mul(self.cast(future, self.dtype), MASKED)
        return self.tile(self.reshape(mask, (1, 1, length, length)), (batch, self.heads, 1, 1))


class Rotary(nn.Cell):
    """In the place of `RotaryEmbedding`: rotate queries and keys `[B, heads, S, head_dim]` by their positions."""

    def __init__(self, head_dim: int):
        super().__init__(auto_prefix=False)
        self.half = head_dim // 2
        self.neg = P.Neg()
        self.slice = P.StridedSlice()
        self.concat = P.Concat(axis=-1)
        self.mul = P.Mul()
        self.add = P.Add()
        self.tile = P.Tile()
        self.shape = P.Shape()
        self.cast = P.Cast()
        self.dtype = P.DType()

    def construct(self, query, key, freqs_cis):
        cos, sin, _ = freqs_cis  # [1 or B, 1, S, head_dim]
        return self.rotate(query, cos, sin), self.rotate(key, cos, sin)

    def rotate(self, x, cos, sin):
        batch, heads, length, dim = self.shape(x)
        times = (batch // self.shape(cos)[0], heads, 1, 1)
        wide = self.cast(x, mstype.float32)
        low = self.slice(wide, (0, 0, 0, 0), (batch, heads, length, self.half), (1, 1, 1, 1))
        high = self.slice(wide, (0, 0, 0, self.half), (batch, heads, length, dim), (1, 1, 1, 1))
        turned = self.concat((self.neg(high), low))
        out = self.add(self.mul(wide, self.tile(cos, times)), self.mul(turned, self.tile(sin, times)))
        return self.cast(out, self.dtype(x))


class CachedAttention(nn.Cell):
    """In the place of `InferAttention`: attention with a KV cache.

    The cache is one row a position: `[B * kv_heads * cache_length, head_dim]`. Sequence b owns the rows of b; its
    token at position p goes to row `(b * kv_heads + head) * cache_length + p`. Prefill writes positions 0 to S-1 of
    every sequence (right padding is written too, never seen, and overwritten when the answer gets there); a decoding
    step writes the position `batch_valid_length - 1` and reads all of the cache.
    """

    def __init__(self, config):
        super().__init__()
        text = config.architecture.text
        self.heads, self.kv_heads, self.head_dim = text.num_attention_heads, text.num_key_value_heads, text.head_dim
        self.group = self.heads // self.kv_heads
        self.width = text.hidden_size
        self.batch, self.length = config.batch_size, config.seq_length
        self.dtype = config.compute_dtype
        self.is_first_iteration = True
        rows = self.batch * self.kv_heads
        shape = (rows * self.length, self.head_dim)
        self.key_cache = Parameter(ops.zeros(shape, self.dtype), name="key_cache", requires_grad=False)
        self.value_cache = Parameter(ops.zeros(shape, self.dtype), name="value_cache", requires_grad=False)
        self.paged_attention_mgr = _NoPages()
        self.first_row = Tensor(np.arange(rows, dtype=np.int32).reshape(rows, 1) * self.length)
        self.position = Tensor(np.arange(self.length, dtype=np.int32).reshape(1, self.length))
        self.rotary = Rotary(self.head_dim)
        self.scale = Tensor(1 / math.sqrt(self.head_dim), self.dtype)
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.scores = P.BatchMatMul(transpose_b=True)
        self.mix = P.BatchMatMul()
        self.mul = P.Mul()
        self.add = P.Add()
        self.tile = P.Tile()
        self.softmax = P.Softmax()
        self.update = P.ScatterUpdate()
        self.greater_equal = P.GreaterEqual()
        self.slice = P.StridedSlice()
        self.cast = P.Cast()
        self.shape = P.Shape()

    def construct(
        self,
        query,
        key,
        value,
        batch_valid_length,
        block_tables,
        slot_mapping,
        freqs_cis,
        attn_mask=None,
        alibi_mask=None,
        prefix_keys_values=None,
        q_seq_lens=None,
    ):
        """Query `[B, S, D]`, key and value `[B, S, kv_heads * head_dim]` → `[B, S, D]`; S is 1 when decoding."""
        batch, length, _ = self.shape(query)
        query, key = self.split(query, self.heads), self.split(key, self.kv_heads)
        value = self.split(value, self.kv_heads)
        cos, sin, rest = freqs_cis
        table = (batch, 1, length, self.head_dim)
        query, key = self.rotary(query, key, (self.reshape(cos, table), self.reshape(sin, table), rest))
        if self.is_first_iteration:
            rows = self.add(self.tile(self.first_row, (1, length)), self.prompt_positions(length))
            written = self.write(key, value, rows)
            context = self.attend(query, self.repeat(key), self.repeat(value), attn_mask)
            context = F.depend(context, written)
        else:
            last = self.reshape(batch_valid_length, (batch, 1)) - 1
            rows = self.add(self.first_row, self.reshape(self.tile(last, (1, self.kv_heads)), (-1, 1)))
            written = self.write(key, value, rows)
            context = self.attend_cache(query, last, written)
        context = self.transpose(context, (0, 2, 1, 3))  # [B, S, heads, head_dim]
        return self.reshape(context, (batch, length, self.width))

    def split(self, x, heads):
        batch, length, _ = self.shape(x)
        return self.transpose(self.reshape(x, (batch, length, heads, self.head_dim)), (0, 2, 1, 3))

    def prompt_positions(self, length):
        position = self.slice(self.position, (0, 0), (1, length), (1, 1))
        return self.tile(position, (self.batch * self.kv_heads, 1))

    def write(self, key, value, rows):
        """Put keys and values `[B, kv_heads, S, head_dim]` into their rows `int32[B * kv_heads, S]`."""
        rows = self.reshape(rows, (-1,))
        keys = self.update(self.key_cache, rows, self.reshape(key, (-1, self.head_dim)))
        values = self.update(self.value_cache, rows, self.reshape(value, (-1, self.head_dim)))
        return keys, values

    def repeat(self, x):
        """Every key-value head as often as query heads share it."""
        if self.group == 1:
            return x
        batch, heads, length, dim = self.shape(x)
        x = self.tile(self.reshape(x, (batch, heads, 1, length * dim)), (1, 1, self.group, 1))
        return self.reshape(x, (batch, heads * self.group, length, dim))

    def attend(self, query, key, value, mask):
        scores = self.add(self.scores(self.mul(query, self.scale), key), mask)
        weights = self.cast(self.softmax(self.cast(scores, mstype.float32)), self.dtype)
        return self.mix(weights, value)

    def attend_cache(self, query, last, written):
        """One query a sequence against its whole cache; query heads that share a key head are rows of one product."""
        keys, values = written
        batch = self.batch
        cache = (batch, self.kv_heads, self.length, self.head_dim)
        query = self.reshape(query, (batch, self.kv_heads, self.group, self.head_dim))
        unwritten = self.greater_equal(self.tile(self.position, (batch, 1)), self.tile(last, (1, self.length)) + 1)
        mask = self.mul(self.cast(unwritten, self.dtype), MASKED)  # [B, cache_length]
        mask = self.tile(self.reshape(mask, (batch, 1, 1, self.length)), (1, self.kv_heads, self.group, 1))
        context = self.attend(query, self.reshape(keys, cache), self.reshape(values, cache), mask)
        return self.reshape(context, (batch, self.heads, 1, self.head_dim))


class _NoPages(nn.Cell):
    """`LlamaForCausalLM.add_flags_custom` looks for a page manager; this backend's cache is in the cell above."""

    def construct(self):
        return None
