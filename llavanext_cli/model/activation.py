"""The activations a LLaVA-NeXT config.json may name (config.architecture.ACTIVATIONS)."""

from __future__ import annotations

from mindspore import dtype as mstype
from mindspore import nn
from mindspore.ops import operations as P


class QuickGELU(nn.Cell):
    """`x * sigmoid(1.702 x)`, as CLIP was trained with."""

    def __init__(self):
        super().__init__()
        self.scale = P.Mul()
        self.sigmoid = P.Sigmoid()
        self.mul = P.Mul()

    def construct(self, x):
        return self.mul(x, self.sigmoid(self.scale(x, 1.702)))

    def shard(self, strategy):
        self.scale.shard((strategy, ()))
        self.sigmoid.shard((strategy,))
        self.mul.shard((strategy, strategy))


class GELU(nn.Cell):
    """The exact form, `x/2 * (1 + erf(x / sqrt 2))`, computed in float32."""

    def __init__(self):
        super().__init__()
        self.scale = P.Mul()
        self.erf = P.Erf()
        self.add = P.Add()
        self.half = P.Mul()
        self.mul = P.Mul()
        self.cast = P.Cast()
        self.dtype = P.DType()

    def construct(self, x):
        wide = self.cast(x, mstype.float32)
        gate = self.half(self.add(self.erf(self.scale(wide, 0.7071067811865476)), 1.0), 0.5)
        return self.cast(self.mul(wide, gate), self.dtype(x))

    def shard(self, strategy):
        self.cast.shard((strategy,))
        self.scale.shard((strategy, ()))
        self.erf.shard((strategy,))
        self.add.shard((strategy, ()))
        self.half.shard((strategy, ()))
        self.mul.shard((strategy, strategy))


def build_activation(name: str) -> nn.Cell:
    """The cell for a config.json's `hidden_act`; names were checked when the checkpoint was opened."""
    return {"quick_gelu": QuickGELU, "gelu": GELU}[name]()
