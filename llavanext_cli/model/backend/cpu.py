"""CPU cells that take the places of Ascend operators inside MindFormers' `LlamaForCausalLM`.

Each keeps the signature of the cell it replaces, so that the Llama code above it is the same on both machines.
Element-wise operators that broadcast are about twenty times slower than full ones on MindSpore's CPU backend: masks
and rotary tables are tiled to full size first (identical tiles of different layers become one in the compiled graph).
Answering with a KV cache has a decoder of its own, decoder.py.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P

MASKED = -1e9
"""Added to the score of a key that may not be seen."""


def use_cpu_cells(language_model, config) -> None:
    """Swap the cells of `language_model` (a `LlamaForCausalLM`) that have no CPU kernel or a slow one."""
    text = config.architecture.text
    model = language_model.model
    model.casual_mask = CausalMask(config, text.num_attention_heads)
    for layer in model.layers:
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
