"""LoRA on MindFormers' Llama: trained low-rank matrices beside chosen projections, whose own weights are frozen.

MindFormers' own adapter is not used: it drops the sharding strategy of a matrix product's output, so that every device
would gather the sum of the two products.

Source: Hu et al. 2021 (LoRA); initial values as in the authors' code.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from mindspore import Parameter, Tensor, nn
from mindspore import dtype as mstype
from mindspore.context import ParallelMode
from mindspore.ops import operations as P
from mindspore.parallel._utils import _get_parallel_mode


def add_lora(language_model, lora: Mapping[str, Any]) -> None:
    """Replace every projection that is a target by a `LoraLinear`.

    Args:
        language_model: a `LlamaForCausalLM` whose parameters have their final names.
        lora: rank, alpha, dropout, targets and seed.
    """
    for layer in language_model.model.layers:
        for cell in (layer.attention, layer.feed_forward):
            for name in lora["targets"]:
                if hasattr(cell, name):
                    # Not by an assignment, which would give the weight a second prefix.
                    cell.insert_child_to_cell(name, LoraLinear(getattr(cell, name), lora))


class LoraLinear(nn.Cell):
    """Replaces MindFormers' `Linear` without a bias: `W x + alpha / rank * B A x`, then its activation.

    A (`lora_a`, `float32[rank, in]`) starts with random values that depend only on seed and name, B (`lora_b`,
    `float32[out, rank]`) with zeros: the first step sees the unchanged model.

    Args:
        base: the `Linear`, whose weight, operators and sharding strategies are reused.
        lora: rank, alpha, dropout and seed.

    Inputs:
        - **x** - `[..., in]`.

    Outputs:
        `[..., out]`, of the type of x.
    """

    def __init__(self, base, lora: Mapping[str, Any]):
        super().__init__(auto_prefix=False)
        self.in_channels, self.out_channels, self.dtype = base.in_channels, base.out_channels, base.dtype
        self.weight, self.matmul, self.activation = base.weight, base.matmul, base.activation
        self.scale = lora["alpha"] / lora["rank"]
        name = base.weight.name.removesuffix(".weight")
        bound = 1 / math.sqrt(base.in_channels)
        random = np.random.default_rng([lora["seed"], zlib.crc32(name.encode())])
        down = random.uniform(-bound, bound, (lora["rank"], base.in_channels))
        up = np.zeros((base.out_channels, lora["rank"]))
        self.lora_a = Parameter(Tensor(down, mstype.float32), name=f"{name}.lora_a")
        self.lora_b = Parameter(Tensor(up, mstype.float32), name=f"{name}.lora_b")
        self.dropout = nn.Dropout(p=lora["dropout"]) if lora["dropout"] else None
        self.matmul_a = P.MatMul(transpose_b=True)
        self.matmul_b = P.MatMul(transpose_b=True)
        self.mul = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        self.reshape = P.Reshape()
        self.shape = P.Shape()
        self.type_of = P.DType()
        if _get_parallel_mode() in (ParallelMode.SEMI_AUTO_PARALLEL, ParallelMode.AUTO_PARALLEL):
            self.shard(base.matmul.in_strategy, getattr(base.matmul, "out_strategy", None))

    def construct(self, x):
        shape, dtype = self.shape(x), self.type_of(x)
        x = self.cast(self.reshape(x, (-1, self.in_channels)), self.dtype)  # [T, in]
        y = self.matmul(x, self.cast(self.weight, self.dtype))  # [T, out]
        if self.dropout is not None:
            x = self.dropout(x)
        low = self.matmul_a(x, self.cast(self.lora_a, self.dtype))  # [T, rank]
        low = self.mul(low, self.scale)
        y = self.add(y, self.matmul_b(low, self.cast(self.lora_b, self.dtype)))
        if self.activation is not None:
            y = self.activation(y)
        return self.reshape(self.cast(y, dtype), (*shape[:-1], self.out_channels))

    def shard(self, strategy, out_strategy):
        """Shard like the base's product: inputs `((rows, in), (out, in))`, output `((rows, out),)` or None."""
        (rows, inner), (outer, _) = strategy
        # Where `in` is split, devices sum their parts of A x, and may then split the sum by rows.
        rows_after = out_strategy[0][0] if out_strategy else rows
        self.matmul_a.shard(((rows, inner), (1, inner)), ((rows_after, 1),) if inner > 1 else None)
        self.mul.shard(((rows_after, 1), ()))
        self.matmul_b.shard(((rows_after, 1), (outer, 1)))
        self.add.shard(((rows_after, outer), (rows_after, outer)))
        if self.dropout is not None:
            self.dropout.dropout.shard(((rows, inner),))
