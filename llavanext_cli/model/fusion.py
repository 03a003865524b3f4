"""Media features replace token embeddings: one gather, driven by an index that the host computes.

    table  [ image tiles G*Q   | frames F*Qv | newline | text ]      N + 2 rows, records.py
    index  [ text text 0 1 2 … 575 newline … text text ]             sample_layout.py
    out    [ emb  emb  table[0] … table[N] …  emb  emb ]

The device knows nothing of anyres: unpadding, newlines, frames and several images are all in the index.
"""

from __future__ import annotations

from mindspore import nn
from mindspore.common.initializer import initializer
from mindspore.ops import operations as P


class Fusion(nn.Cell):
    """Replace embeddings by features where the index says so.

    Inputs:
        - **embeddings** - `[B, S, D]` token embeddings.
        - **features** - `[B, N, D]` feature table without its last two rows.
        - **newline** - `[D]`.
        - **index** - `int32[B, S]`, rows of the table; N is the newline, N+1 keeps the embedding.

    Outputs:
        `[B, S, D]`.
    """

    def __init__(self, config):
        super().__init__()
        width = config.architecture.text.hidden_size
        self.width = width
        self.dtype = config.compute_dtype
        self.blank = initializer("zeros", (1, 1, width), config.compute_dtype).init_data()
        self.gather = P.Gather(batch_dims=1)
        self.concat = P.Concat(axis=1)
        self.tile = P.Tile()
        self.tile_mask = P.Tile()
        self.reshape = P.Reshape()
        self.expand = P.ExpandDims()
        self.cast_newline = P.Cast()
        self.cast_mask = P.Cast()
        self.equal = P.Equal()
        self.mul = P.Mul()
        self.add = P.Add()
        self.shape = P.Shape()

    def construct(self, embeddings, features, newline, index):
        batch, rows, _ = self.shape(features)
        length = self.shape(index)[1]
        newline = self.reshape(self.expand(newline, 0), (1, 1, self.width))
        newline = self.tile(self.cast_newline(newline, self.dtype), (batch, 1, 1))
        table = self.concat((features, newline, self.tile(self.blank, (batch, 1, 1))))  # [B, N+2, D]
        is_text = self.reshape(self.cast_mask(self.equal(index, rows + 1), self.dtype), (batch, length, 1))
        kept = self.mul(embeddings, self.tile_mask(is_text, (1, 1, self.width)))  # full size, see backend/cpu.py
        return self.add(kept, self.gather(table, index, 1))  # the "text" row is zero

    def shard(self, parallel_config):
        dp = parallel_config.data_parallel
        rows = (dp, 1, 1)
        self.expand.shard(((1,),))
        self.cast_newline.shard(((1, 1, 1),))
        self.tile.shard((rows,))
        self.gather.shard((rows, (dp, 1)))
        self.concat.shard((rows, rows, rows))
        self.equal.shard(((dp, 1), ()))
        self.cast_mask.shard(((dp, 1),))
        self.tile_mask.shard((rows,))
        self.mul.shard((rows, rows))
        self.add.shard((rows, rows))
