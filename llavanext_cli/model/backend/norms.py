"""Layer norms and biases on a CPU, with their own gradients.

MindSpore's operators that broadcast or reduce, and its layer norm kernels, are several times slower on a CPU than
products. So a sum along rows or columns is written as a product with a vector, and a broadcast as an outer product.

With the rows c (centred, for a layer norm), r = 1 / sqrt(mean(c^2) + eps) of each row, the weight w and the gradient g
of the output,

    out = c * (r w^T) + b
    dc  = g * (r w^T) - c * (r^3 s 1^T)     where s = mean of each row of g * c * w
    dw  = (g * c)^T r     db = g^T 1     dx = dc - mean of each row of dc (a layer norm), or dc (RMSNorm)

Source: Ba et al. 2016 (layer normalisation); Zhang & Sennrich 2019 (RMSNorm).
"""

from __future__ import annotations

import numpy as np
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.ops import operations as P


class Rows(nn.Cell):
    """`[..., W]` as N rows, their sums and outer products."""

    def __init__(self, width: int):
        super().__init__(auto_prefix=False)
        self.width = width
        self.mean = Tensor(np.full((width, 1), 1 / width, np.float32))
        self.flat = Tensor(np.ones((1, width), np.float32))
        self.matmul = P.MatMul()
        self.matmul_tn = P.MatMul(transpose_a=True)
        self.ones = P.Ones()
        self.sub = P.Sub()
        self.mul = P.Mul()
        self.rsqrt = P.Rsqrt()
        self.bias_add = P.BiasAdd()
        self.reshape = P.Reshape()
        self.shape = P.Shape()
        self.cast = P.Cast()
        self.dtype = P.DType()

    def rows(self, x):
        """`[..., W]` → `float32[N, W]`."""
        return self.reshape(self.cast(x, mstype.float32), (-1, self.width))

    def row(self, weight):
        """`[W]` → `float32[1, W]`."""
        return self.reshape(self.cast(weight, mstype.float32), (1, self.width))

    def restore(self, rows, x):
        """`[N, W]` → the shape and type of x."""
        return self.reshape(self.cast(rows, self.dtype(x)), self.shape(x))

    def means(self, rows):
        """`[N, W]` → the mean of each row, repeated along the row: `[N, W]`."""
        return self.matmul(self.matmul(rows, self.mean), self.flat)

    def sum_rows(self, rows, weights, x):
        """The weighted sum of the rows: `[N, W]` and `[N, 1]` → `[W]`, of the type of x."""
        return self.cast(self.reshape(self.matmul_tn(weights, rows), (self.width,)), self.dtype(x))

    def scale(self, rows, weight, eps):
        """`r` and `r w^T`: `[N, 1]` and `[N, W]`."""
        factor = self.rsqrt(self.matmul(self.mul(rows, rows), self.mean) + eps)
        return factor, self.matmul(factor, self.row(weight))

    def scale_gradient(self, gradient, rows, weight, factor, scale):
        """`dc` and `dw`."""
        product = self.mul(gradient, rows)
        means = self.matmul(product, self.reshape(self.row(weight), (self.width, 1))) * (1 / self.width)
        cubed = self.mul(self.mul(factor, factor), factor)
        correction = self.matmul(self.mul(cubed, means), self.flat)
        inner = self.sub(self.mul(gradient, scale), self.mul(rows, correction))
        return inner, self.sum_rows(product, factor, weight)


class RMSNorm(Rows):
    """Replaces the operator `RmsNorm`: `x * weight / sqrt(mean(x^2) + eps)` in float32.

    Inputs:
        - **x** - `[..., W]`.
        - **weight** - `[W]`.

    Outputs:
        The norm, of the shape and type of x, and two tensors for its gradient: `float32[N, 1]` and `[N, W]`.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width)
        self.eps = eps

    def construct(self, x, weight):
        rows = self.rows(x)
        factor, scale = self.scale(rows, weight, self.eps)
        return self.restore(self.mul(rows, scale), x), factor, scale

    def bprop(self, x, weight, out, gradients):
        _, factor, scale = out
        inner, weight_gradient = self.scale_gradient(self.rows(gradients[0]), self.rows(x), weight, factor, scale)
        return self.restore(inner, x), weight_gradient


class LayerNorm(Rows):
    """Replaces the operator `LayerNorm` over the last axis, in float32.

    Inputs:
        - **x** - `float32[..., W]`.
        - **weight**, **bias** - `float32[W]`.

    Outputs:
        The norm, of the shape of x, and three tensors for its gradient: `float32[N, W]`, `[N, 1]` and `[N, W]`.
    """

    def __init__(self, width: int, eps: float):
        super().__init__(width)
        self.eps = eps

    def construct(self, x, weight, bias):
        rows = self.rows(x)
        centred = self.sub(rows, self.means(rows))
        factor, scale = self.scale(centred, weight, self.eps)
        return self.restore(self.bias_add(self.mul(centred, scale), bias), x), centred, factor, scale

    def bprop(self, x, weight, bias, out, gradients):
        _, centred, factor, scale = out
        gradient = self.rows(gradients[0])
        inner, weight_gradient = self.scale_gradient(gradient, centred, weight, factor, scale)
        bias_gradient = self.sum_rows(gradient, self.ones(self.shape(factor), mstype.float32), bias)
        return self.restore(self.sub(inner, self.means(inner)), x), weight_gradient, bias_gradient


class BiasAdd(Rows):
    """Replaces the operator `Add` in MindFormers' `Linear`: `[N, W]` and `[W]` → `[N, W]`."""

    def construct(self, x, bias):
        return self.bias_add(x, bias)

    def bprop(self, x, bias, out, gradient):
        rows = self.rows(gradient)
        return gradient, self.sum_rows(rows, self.ones((self.shape(rows)[0], 1), mstype.float32), bias)
