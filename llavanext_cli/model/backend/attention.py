"""Attention on a CPU, in the tower and in training: only the causal half of the scores, and its own gradient.

    chunk 1  ████            Each chunk of query rows attends only to keys up to its own last row: with many chunks,
    chunk 2  ████████        little more than half of the full square is computed.
    chunk 3  ████████████

With the weights P, the output O and its gradient dO, the gradient of the scores is

    dS = P * (dO V^T - rowsum(dO * O))

where rowsum(dO * O) = rowsum(P * dO V^T), but adds head_dim numbers instead of S. Subtracting the sum from every column
takes one more column in the product, [dO, -sum] [V, 1]^T, and then one pass over the square: sums and differences that
broadcast are many times slower than products on this backend.

Source: Dao et al. 2022 (FlashAttention), appendix B.4.
"""

from __future__ import annotations

import math

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P

MASKED = -1e9
"""Added to the score of a masked key."""
CHUNK = 256
"""Rows of one chunk of queries."""


class Attention(nn.Cell):
    """Replaces MindFormers' `FlashAttention`.

    Padding is on the right, where no token of the sample attends to it, so a causal mask is enough.

    Args:
        head_dim: of a query or key.
        causal: the greatest S if a position attends to itself and those before it; None if it attends to all.

    Inputs:
        - **query** - `[B, heads, S, head_dim]`.
        - **key**, **value** - `[B, kv_heads, S, head_dim]`; heads / kv_heads query heads share each of them.
        - **mask** - None; the mask is built here.

    Outputs:
        `[B, heads, S, head_dim]`.
    """

    def __init__(self, head_dim: int, causal: int | None = None):
        super().__init__(auto_prefix=False)
        self.scale = 1 / math.sqrt(head_dim)
        self.attend = ScaledAttention(head_dim, causal)
        self.mul = P.Mul()

    def construct(self, query, key, value, mask=None):
        return self.attend(self.mul(query, self.scale), key, value)[0]


class ScaledAttention(nn.Cell):
    """`Attention` of scaled queries. Besides the output it returns what the gradient needs: the weights of each chunk
    of c rows, `[B, kv_heads, group * c, end]`."""

    def __init__(self, head_dim: int, causal: int | None):
        super().__init__(auto_prefix=False)
        self.causal = causal is not None
        self.positions = Tensor(np.arange(causal or 1, dtype=np.int32))
        self.ones_column = Tensor(np.ones((head_dim, 1), np.float32))
        self.product = P.BatchMatMul()
        self.product_nt = P.BatchMatMul(transpose_b=True)
        self.product_tn = P.BatchMatMul(transpose_a=True)
        self.matmul = P.MatMul()
        self.softmax = P.Softmax()
        self.greater = P.Greater()
        self.add = P.Add()
        self.mul = P.Mul()
        self.neg = P.Neg()
        self.ones = P.Ones()
        self.zeros = P.Zeros()
        self.tile = P.Tile()
        self.slice = P.StridedSlice()
        self.join_rows = P.Concat(axis=2)
        self.join_columns = P.Concat(axis=-1)
        self.reshape = P.Reshape()
        self.shape = P.Shape()
        self.cast = P.Cast()
        self.dtype = P.DType()

    def construct(self, query, key, value):
        batch, heads, length, dim = self.shape(query)
        kv_heads = self.shape(key)[1]
        chunk = CHUNK if self.causal else length
        contexts, all_weights = (), ()
        for begin in range(0, length, chunk):
            end = min(begin + chunk, length)
            seen = end if self.causal else length
            rows = self.reshape(self.rows(query, begin, end), (batch, kv_heads, -1, dim))
            scores = self.product_nt(rows, self.rows(key, 0, seen))
            if self.causal:
                mask = self.causal_mask(begin, end, self.dtype(query))
                scores = self.add(scores, self.tile(mask, (batch, kv_heads, heads // kv_heads, 1)))
            weights = self.cast(self.softmax(self.cast(scores, mstype.float32)), self.dtype(value))
            context = self.product(weights, self.rows(value, 0, seen))
            contexts += (self.reshape(context, (batch, heads, end - begin, dim)),)
            all_weights += (weights,)
        return self.join(contexts), all_weights

    def bprop(self, query, key, value, out, gradients):
        batch, heads, length, dim = self.shape(query)
        kv_heads, dtype = self.shape(key)[1], self.dtype(query)
        context, all_weights = out
        gradient = gradients[0]
        wide = self.cast(self.mul(gradient, context), mstype.float32)
        total = self.matmul(self.reshape(wide, (-1, dim)), self.ones_column)
        total = self.cast(self.neg(self.reshape(total, (batch, heads, length, 1))), dtype)
        left = self.join_columns((gradient, total))  # [dO, -sum]
        right = self.join_columns((value, self.ones((batch, kv_heads, length, 1), dtype)))  # [V, 1]
        queries, keys, values, begin = (), None, None, 0
        for weights in all_weights:
            group_rows, seen = self.shape(weights)[2:]
            end = begin + group_rows * kv_heads // heads
            shape = (batch, kv_heads, group_rows, -1)
            scores = self.product_nt(self.reshape(self.rows(left, begin, end), shape), self.rows(right, 0, seen))
            scores = self.mul(weights, scores)
            part = self.product(scores, self.rows(key, 0, seen))
            queries += (self.reshape(part, (batch, heads, end - begin, dim)),)
            key_part = self.product_tn(scores, self.reshape(self.rows(query, begin, end), shape))
            value_part = self.product_tn(weights, self.reshape(self.rows(gradient, begin, end), shape))
            keys, values = self.accumulate(keys, key_part, length), self.accumulate(values, value_part, length)
            begin = end
        return self.join(queries), keys, values

    def join(self, parts):
        """All chunks as one, along the rows."""
        return self.join_rows(parts) if len(parts) > 1 else parts[0]

    def accumulate(self, total, part, length):
        """`total` (None for zero) plus `part`, which covers the first positions: `[B, kv_heads, S, head_dim]`."""
        batch, heads, rows, dim = self.shape(part)
        if rows < length:
            part = self.join_rows((part, self.zeros((batch, heads, length - rows, dim), self.dtype(part))))
        return part if total is None else self.add(total, part)

    def rows(self, x, begin, end):
        """Positions `begin` to `end` of `[B, heads, S, d]`."""
        batch, heads, length, dim = self.shape(x)
        if end - begin == length:
            return x
        return self.slice(x, (0, 0, begin, 0), (batch, heads, end, dim), (1, 1, 1, 1))

    def causal_mask(self, begin, end, dtype):
        """Added to the scores of rows `begin` to `end` with keys up to `end`: `[1, 1, c, end]`."""
        keys = self.reshape(self.slice(self.positions, (0,), (end,), (1,)), (1, end))
        queries = self.reshape(self.slice(self.positions, (begin,), (end,), (1,)), (end - begin, 1))
        mask = self.mul(self.cast(self.greater(keys, queries), dtype), MASKED)
        return self.reshape(mask, (1, 1, end - begin, end))
