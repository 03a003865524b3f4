"""The CLIP vision tower, up to the layer whose features LLaVA-NeXT uses, and without a head.

Source: Radford et al. 2021 (CLIP); names and numerics of transformers' `CLIPVisionModel`. Shapes: records.py.
"""

from __future__ import annotations

import math

import numpy as np
from mindformers.modules.flash_attention import FlashAttention
from mindformers.modules.layers import Linear
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype
from mindspore.common.initializer import Normal, initializer
from mindspore.ops import operations as P

from llavanext_cli.model.activation import build_activation


class VisionTower(nn.Cell):
    """Tiles in, patch features out.

    Args:
        config: `LlavaNextConfig`.

    Inputs:
        - **tiles** - `[T, 3, R, R]` normalised pixels; T is batch times tiles.

    Outputs:
        `[T, Q, Dv]`: hidden state of layer `vision_feature_layer`; the class token is dropped under the "default"
        select strategy and kept first under "full".
    """

    def __init__(self, config):
        super().__init__()
        arch = config.architecture
        layers = arch.vision_layers
        self.embeddings = VisionEmbeddings(config)
        self.pre_layernorm = LayerNorm(arch.vision)
        self.layers = nn.CellList([VisionLayer(config) for _ in range(layers)])
        self.num_layers = layers
        self.skip_class = arch.vision_feature_select_strategy == "default"
        self.slice = P.StridedSlice()
        self.shape = P.Shape()

    def construct(self, tiles):
        hidden = self.pre_layernorm(self.embeddings(tiles))  # [T, P*P+1, Dv]
        for i in range(self.num_layers):
            hidden = self.layers[i](hidden)
        if self.skip_class:
            count, length, width = self.shape(hidden)
            hidden = self.slice(hidden, (0, 1, 0), (count, length, width), (1, 1, 1))  # [T, P*P, Dv]
        return hidden

    def shard(self, parallel_config):
        self.embeddings.shard(parallel_config)
        self.pre_layernorm.shard(parallel_config)
        for layer in self.layers:
            layer.shard(parallel_config)
        self.slice.shard(((parallel_config.data_parallel, 1, 1),))


class VisionEmbeddings(nn.Cell):
    """Patch embedding, class token first, learned positions added. `[T, 3, R, R]` → `[T, P*P+1, Dv]`."""

    def __init__(self, config):
        super().__init__()
        vision = config.architecture.vision
        width, dtype = vision.hidden_size, config.param_init_type
        positions = vision.patches**2 + 1
        self.patch_embedding = PatchEmbedding(config)
        self.class_embedding = Parameter(initializer(Normal(0.02), (width,), dtype), name="class_embedding")
        self.position_embedding = Parameter(
            initializer(Normal(0.02), (positions, width), dtype), name="position_embedding"
        )
        self.dtype = config.compute_dtype
        self.width = width
        self.reshape = P.Reshape()
        self.tile = P.Tile()
        self.tile_positions = P.Tile()
        self.expand_class = P.ExpandDims()
        self.expand_positions = P.ExpandDims()
        self.concat = P.Concat(axis=1)
        self.add = P.Add()
        self.cast = P.Cast()
        self.shape = P.Shape()

    def construct(self, tiles):
        patches = self.patch_embedding(tiles)  # [T, P*P, Dv]
        count = self.shape(patches)[0]
        first = self.reshape(self.expand_class(self.class_embedding, 0), (1, 1, self.width))
        hidden = self.concat((self.tile(self.cast(first, self.dtype), (count, 1, 1)), patches))  # [T, P*P+1, Dv]
        positions = self.expand_positions(self.position_embedding, 0)  # [1, P*P+1, Dv]
        return self.add(hidden, self.tile_positions(self.cast(positions, self.dtype), (count, 1, 1)))

    def shard(self, parallel_config):
        rows = (parallel_config.data_parallel, 1, 1)
        self.patch_embedding.shard(parallel_config)
        self.expand_class.shard(((1,),))
        self.expand_positions.shard(((1, 1),))
        self.cast.shard(((1, 1, 1),))
        self.tile.shard((rows,))
        self.tile_positions.shard((rows,))
        self.concat.shard((rows, rows))
        self.add.shard((rows, rows))


class PatchEmbedding(nn.Cell):
    """The convolution with stride = kernel = patch, written as one matrix product: every pixel is read once.

    Weight `[Dv, 3, p, p]`, no bias. `[T, 3, R, R]` → `[T, P*P, Dv]`.
    """

    def __init__(self, config):
        super().__init__()
        vision = config.architecture.vision
        self.side, self.patch, self.width = vision.patches, vision.patch_size, vision.hidden_size
        shape = (self.width, 3, self.patch, self.patch)
        self.weight = Parameter(initializer(Normal(0.02), shape, config.param_init_type), name="weight")
        self.dtype = config.compute_dtype
        self.reshape = P.Reshape()
        self.transpose = P.Transpose()
        self.expand = P.ExpandDims()
        self.matmul = P.MatMul(transpose_b=True)
        self.cast = P.Cast()
        self.cast_weight = P.Cast()
        self.shape = P.Shape()

    def construct(self, tiles):
        count, side, patch = self.shape(tiles)[0], self.side, self.patch
        pixels = self.reshape(self.cast(tiles, self.dtype), (count, 3, side, patch, side, patch))
        pixels = self.transpose(pixels, (0, 2, 4, 1, 3, 5))  # [T, P, P, 3, p, p]
        pixels = self.reshape(pixels, (count * side * side, 3 * patch * patch))
        weight = self.reshape(self.expand(self.weight, 0), (self.width, 3 * patch * patch))
        weight = self.cast_weight(weight, self.dtype)
        return self.reshape(self.matmul(pixels, weight), (count, side * side, self.width))

    def shard(self, parallel_config):
        dp = parallel_config.data_parallel
        self.cast.shard(((dp, 1, 1, 1),))
        self.expand.shard(((1, 1, 1, 1),))
        self.transpose.shard(((dp, 1, 1, 1, 1, 1),))
        self.matmul.shard(((dp, 1), (1, 1)))


class VisionLayer(nn.Cell):
    """Pre-norm transformer layer. `[T, L, Dv]` → the same."""

    def __init__(self, config):
        super().__init__()
        vision = config.architecture.vision
        self.layer_norm1 = LayerNorm(vision)
        self.attention = VisionAttention(config)
        self.layer_norm2 = LayerNorm(vision)
        self.mlp = VisionMLP(config)
        self.add = P.Add()

    def construct(self, hidden):
        hidden = self.add(hidden, self.attention(self.layer_norm1(hidden)))
        return self.add(hidden, self.mlp(self.layer_norm2(hidden)))

    def shard(self, parallel_config):
        rows = (parallel_config.data_parallel, 1, 1)
        self.layer_norm1.shard(parallel_config)
        self.attention.shard(parallel_config)
        self.layer_norm2.shard(parallel_config)
        self.mlp.shard(parallel_config)
        self.add.shard((rows, rows))


class VisionAttention(nn.Cell):
    """Full self-attention over the patches of one tile; q, k, v in one projection. `[T, L, Dv]` → the same."""

    def __init__(self, config):
        super().__init__()
        vision = config.architecture.vision
        width, self.heads = vision.hidden_size, vision.num_attention_heads
        self.width, self.head_dim = width, width // vision.num_attention_heads
        self.qkv = _linear(config, width, 3 * width)
        self.out = _linear(config, width, width)
        self.dtype = config.compute_dtype
        self.use_flash = config.use_flash_attention
        scale = 1.0 / math.sqrt(self.head_dim)
        if self.use_flash:
            self.flash = FlashAttention(
                head_num=self.heads, scale_value=scale, input_layout="BNSD", use_attention_mask=False
            )
        self.scale = Tensor(scale, config.compute_dtype)
        self.reshape = P.Reshape()
        self.split_heads = P.Transpose()
        self.merge_heads = P.Transpose()
        self.split_qkv = P.Split(axis=1, output_num=3)
        self.scores = P.BatchMatMul(transpose_b=True)
        self.mul = P.Mul()
        self.softmax = P.Softmax()
        self.weighted_sum = P.BatchMatMul()
        self.cast = P.Cast()
        self.shape = P.Shape()

    def construct(self, hidden):
        count, length, _ = self.shape(hidden)
        qkv = self.reshape(self.qkv(hidden), (count, length, 3 * self.heads, self.head_dim))
        qkv = self.split_heads(qkv, (0, 2, 1, 3))  # [T, 3*heads, L, head_dim]
        query, key, value = self.split_qkv(qkv)  # [T, heads, L, head_dim]
        if self.use_flash:
            context = self.flash(query, key, value, None)
        else:
            scores = self.scores(self.mul(query, self.scale), key)  # [T, heads, L, L]
            weights = self.cast(self.softmax(self.cast(scores, mstype.float32)), self.dtype)
            context = self.weighted_sum(weights, value)
        context = self.reshape(self.merge_heads(context, (0, 2, 1, 3)), (count, length, self.width))
        return self.out(context)

    def shard(self, parallel_config):
        dp = parallel_config.data_parallel
        rows = (dp, 1, 1, 1)
        self.qkv.shard(((dp, 1), (1, 1)), ((dp, 1), (1,)))
        self.out.shard(((dp, 1), (1, 1)), ((dp, 1), (1,)))
        self.split_heads.shard((rows,))
        self.merge_heads.shard((rows,))
        self.split_qkv.shard((rows,))
        self.scores.shard((rows, rows))
        self.mul.shard((rows, ()))
        self.cast.shard((rows,))
        self.softmax.shard((rows,))
        self.weighted_sum.shard((rows, rows))
        if self.use_flash:
            self.flash.shard(data_parallel_only(parallel_config))


class VisionMLP(nn.Cell):
    """`[T, L, Dv]` → `[T, L, 4*Dv]` → `[T, L, Dv]`."""

    def __init__(self, config):
        super().__init__()
        vision = config.architecture.vision
        self.fc1 = _linear(config, vision.hidden_size, vision.intermediate_size)
        self.fc2 = _linear(config, vision.intermediate_size, vision.hidden_size)
        self.activation = build_activation(vision.hidden_act)

    def construct(self, hidden):
        return self.fc2(self.activation(self.fc1(hidden)))

    def shard(self, parallel_config):
        dp = parallel_config.data_parallel
        self.fc1.shard(((dp, 1), (1, 1)), ((dp, 1), (1,)))
        self.fc2.shard(((dp, 1), (1, 1)), ((dp, 1), (1,)))
        self.activation.shard((dp, 1, 1))


class LayerNorm(nn.Cell):
    """Layer normalisation in float32 over the last axis; weight and bias `[Dv]`."""

    def __init__(self, vision):
        super().__init__()
        width = vision.hidden_size
        self.weight = Parameter(Tensor(np.ones(width, np.float32)), name="weight", parallel_optimizer=False)
        self.bias = Parameter(Tensor(np.zeros(width, np.float32)), name="bias", parallel_optimizer=False)
        self.norm = P.LayerNorm(begin_norm_axis=-1, begin_params_axis=-1, epsilon=vision.layer_norm_eps)
        self.cast = P.Cast()
        self.dtype = P.DType()

    def construct(self, hidden):
        out, _, _ = self.norm(self.cast(hidden, mstype.float32), self.weight, self.bias)
        return self.cast(out, self.dtype(hidden))

    def shard(self, parallel_config):
        rows = (parallel_config.data_parallel, 1, 1)
        self.cast.shard((rows,))
        self.norm.shard((rows, (1,), (1,)))


def data_parallel_only(parallel_config):
    """The parallel configuration without tensor parallelism: the tower is small and is never split."""
    from mindformers.modules.transformer import TransformerOpParallelConfig

    return TransformerOpParallelConfig(data_parallel=parallel_config.data_parallel)


def _linear(config, inputs: int, outputs: int) -> Linear:
    return Linear(inputs, outputs, compute_dtype=config.compute_dtype, param_init_type=config.param_init_type)
