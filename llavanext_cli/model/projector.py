"""From vision features to the language model's width: the pooler for frames, and the two-layer projector.

Source: transformers' `LlavaNextVideoPooler` and `LlavaNextVideoMultiModalProjector`; the interpolating mode is the
original LLaVA-NeXT's bilinear pooling. Shapes: records.py.
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from mindspore.ops import operations as P

from llavanext_cli.model.activation import build_activation


class Projector(nn.Cell):
    """`[..., Dv]` → `[..., D]`: linear, activation, linear."""

    def __init__(self, config):
        super().__init__()
        from mindformers.modules.layers import Linear  # here: answering on a CPU does without MindFormers

        arch = config.architecture
        dtypes = {"compute_dtype": config.compute_dtype, "param_init_type": config.param_init_type}
        bias = arch.multimodal_projector_bias
        self.linear_1 = Linear(arch.vision.hidden_size, arch.text.hidden_size, has_bias=bias, **dtypes)
        self.linear_2 = Linear(arch.text.hidden_size, arch.text.hidden_size, has_bias=bias, **dtypes)
        self.activation = build_activation(arch.projector_hidden_act)

    def construct(self, features):
        return self.linear_2(self.activation(self.linear_1(features)))

    def shard(self, parallel_config):
        dp, mp = parallel_config.data_parallel, parallel_config.model_parallel
        self.linear_1.shard(((dp, 1), (mp, 1)), ((dp, mp), (mp,)))
        self.activation.shard((dp, 1, mp))
        self.linear_2.shard(((dp, mp), (1, mp)), ((dp, 1), (1,)))


class Pooler(nn.Cell):
    """Pools the P x P grid of a frame with `spatial_pool_stride`, for fewer features. `[T, Q, C]` → `[T, Qv, C]`.

    A class token (the "full" select strategy) is not part of the grid and is dropped.

    Average pooling and interpolation are linear in the grid, so both are one product with a constant `[Qv, P*P]`
    matrix: the fastest form on every backend.
    """

    def __init__(self, config, width: int):
        super().__init__()
        arch = config.architecture
        self.mode = arch.spatial_pool_mode
        self.side, self.out_side, self.width = arch.vision.patches, arch.frame_side, width
        stride = arch.spatial_pool_stride
        self.class_tokens = arch.tile_features - self.side**2
        self.slice = P.StridedSlice()
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.transpose_back = P.Transpose()
        self.shape = P.Shape()
        self.cast = P.Cast()
        self.dtype = config.compute_dtype
        if self.mode == "max":
            self.pool = nn.MaxPool2d(kernel_size=stride, stride=stride)
        elif self.mode == "conv":
            self.conv = nn.Conv2d(
                width, width, stride, stride, pad_mode="valid", has_bias=True, dtype=config.param_init_type
            )
        else:
            build = average_matrix if self.mode == "average" else interpolation_matrix
            self.matrix = Tensor(build(self.side, stride), config.compute_dtype)
            self.matmul = P.BatchMatMul()
            self.tile = P.Tile()

    def construct(self, features):
        count, length, width = self.shape(features)
        if self.class_tokens:
            features = self.slice(features, (0, self.class_tokens, 0), (count, length, width), (1, 1, 1))  # [T, P*P, C]
        if self.mode in ("average", "interpolate"):
            matrix = self.tile(self.reshape(self.matrix, (1, self.out_side**2, self.side**2)), (count, 1, 1))
            return self.matmul(matrix, features)  # [T, Qv, C]
        grid = self.reshape(features, (count, self.side, self.side, self.width))
        grid = self.transpose(grid, (0, 3, 1, 2))  # [T, C, P, P]
        grid = self.pool(grid) if self.mode == "max" else self.conv(grid)
        grid = self.transpose_back(grid, (0, 2, 3, 1))  # [T, P', P', C]
        return self.cast(self.reshape(grid, (count, self.out_side**2, self.width)), self.dtype)

    def shard(self, parallel_config):
        dp = parallel_config.data_parallel
        self.slice.shard(((dp, 1, 1),))
        self.transpose.shard(((dp, 1, 1, 1),))
        self.transpose_back.shard(((dp, 1, 1, 1),))
        if self.mode == "max":
            self.pool.max_pool.shard(((dp, 1, 1, 1),))
        elif self.mode == "conv":
            self.conv.conv2d.shard(((dp, 1, 1, 1), (1, 1, 1, 1)))
            self.conv.bias_add.shard(((dp, 1, 1, 1), (1,)))
        else:
            self.tile.shard(((dp, 1, 1),))
            self.matmul.shard(((dp, 1, 1), (dp, 1, 1)))


def average_matrix(side: int, stride: int) -> np.ndarray:
    """`float32[Qv, P*P]` that averages each stride x stride window; like `AvgPool2d`, it drops left-over rows and
    columns."""
    line = np.zeros((side // stride, side))
    for i in range(side // stride):
        line[i, i * stride : (i + 1) * stride] = 1 / stride
    return np.kron(line, line).astype(np.float32)


def interpolation_matrix(side: int, stride: int) -> np.ndarray:
    """`float32[Qv, P*P]` of bilinear resizing to ceil(side / stride), half-pixel centres, no
    anti-aliasing: the original's `interpolate(mode="bilinear")`."""
    out = -(-side // stride)
    line = np.zeros((out, side))
    centres = np.clip((np.arange(out) + 0.5) * side / out - 0.5, 0, side - 1)
    low = np.floor(centres).astype(int)
    high = np.minimum(low + 1, side - 1)
    line[np.arange(out), low] += 1 - (centres - low)
    line[np.arange(out), high] += centres - low
    return np.kron(line, line).astype(np.float32)
