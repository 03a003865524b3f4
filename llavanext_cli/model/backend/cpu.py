"""CPU cells that replace Ascend operators in the vision tower and in MindFormers' `LlamaForCausalLM`.

Each keeps the signature of the cell or operator that it replaces, so that the code that calls it is the same on both.
On MindSpore's CPU backend, element-wise operators that broadcast are about twenty times slower than others: masks and
rotary tables are tiled to full size first (the compiler merges identical tiles of different layers). Answering with a
KV cache has its own decoder, decoder.py.
"""

from __future__ import annotations

import numpy as np
from mindformers.models.llama.llama_layer import LlamaRMSNorm
from mindformers.models.llama.llama_transformer import LLamaAttention
from mindformers.modules.layers import Linear
from mindspore import Tensor, nn, ops
from mindspore import dtype as mstype
from mindspore.ops import operations as P

from llavanext_cli.model import vision_tower
from llavanext_cli.model.backend.attention import Attention
from llavanext_cli.model.backend.norms import BiasAdd, LayerNorm, RMSNorm
from llavanext_cli.records import IGNORE_INDEX


def use_cpu_cells(network, config) -> None:
    """Replace the cells of `network` (a `LlavaNext`) that have no CPU kernel or a slow one."""
    vision, text = config.architecture.vision, config.architecture.text
    for _, cell in list(network.cells_and_names()):
        if isinstance(cell, Linear) and cell.has_bias:
            cell.bias_add = BiasAdd(cell.out_channels)
        elif isinstance(cell, vision_tower.LayerNorm):
            cell.norm = LayerNorm(vision.hidden_size, vision.layer_norm_eps)
        elif isinstance(cell, vision_tower.VisionAttention):
            cell.use_flash, cell.flash = True, Attention(cell.head_dim)
        elif isinstance(cell, LlamaRMSNorm):
            cell.norm, cell.rcast = RMSNorm(text.hidden_size, text.rms_norm_eps), P.Cast()
            cell.rms_norm = cell._rms_norm  # the branch with a fused operator
        elif isinstance(cell, LLamaAttention):
            cell.apply_rotary_emb = RotaryEmbedding()
            cell.use_flash_attention, cell.flash_attention = True, Attention(text.head_dim, causal=config.seq_length)
    language_model = network.language_model
    language_model.model.casual_mask = NoMask()
    # Not by an assignment, which would give the head's weight a second prefix.
    network.insert_child_to_cell("supervised_loss", SupervisedLoss(language_model.lm_head, text.vocab_size))


class NoMask(nn.Cell):
    """Replaces `LowerTriangularMaskWithDynamic`: attention builds its own mask, smaller than the full square."""

    def construct(self, tokens):
        return None


class SupervisedLoss(nn.Cell):
    """The language model's head and loss, only for positions that have a label: seldom more than a quarter.

    Args:
        head: from hidden states to logits.
        vocab: V.

    Inputs:
        - **hidden** - `[B, S, D]`, of the last layer.
        - **labels** - `int32[B, S]`, `IGNORE_INDEX` where there is no label.

    Outputs:
        `float32[1]` the sum of the losses, and `float32[1]` their number.
    """

    def __init__(self, head, vocab: int):
        super().__init__(auto_prefix=False)
        self.head = head
        self.log_softmax = P.LogSoftmax()
        self.loss = P.NLLLoss(reduction="sum", ignore_index=IGNORE_INDEX)
        self.weights = Tensor(np.ones(vocab, np.float32))
        self.dummy_row = Tensor([0], mstype.int64)
        self.no_label = Tensor([IGNORE_INDEX], mstype.int32)
        self.not_equal = P.NotEqual()
        self.non_zero = P.NonZero()
        self.gather = P.Gather()
        self.concat = P.Concat()
        self.reshape = P.Reshape()
        self.sum = P.ReduceSum()
        self.cast = P.Cast()

    def construct(self, hidden, labels):
        labels = ops.stop_gradient(self.reshape(labels, (-1,)))
        supervised = self.not_equal(labels, IGNORE_INDEX)
        place = self.reshape(
            self.non_zero(supervised), (-1,)
        )  # [K]; a row without label is added, as kernels reject 0 rows
        labels = self.concat((self.gather(labels, place, 0), self.no_label))
        rows = self.gather(self.reshape(hidden, (-1, hidden.shape[-1])), self.concat((place, self.dummy_row)), 0)
        logits = self.cast(self.head(rows), mstype.float32)  # [K + 1, V]
        total, _ = self.loss(self.log_softmax(logits), labels, self.weights)
        count = self.sum(self.cast(supervised, mstype.float32))
        return self.reshape(total, (1,)), self.reshape(count, (1,))


class RotaryEmbedding(nn.Cell):
    """Replaces MindFormers' cell of this name: rotates queries and keys `[B, heads, S, head_dim]` by position."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.apply_rotary = ApplyRotary()
        self.tile = P.Tile()
        self.shape = P.Shape()

    def construct(self, query, key, freqs_cis):
        cos, sin, _ = freqs_cis  # [1 or B, 1, S, head_dim]
        return self.rotate(query, cos, sin), self.rotate(key, cos, sin)

    def rotate(self, x, cos, sin):
        batch, heads = self.shape(x)[:2]
        times = (batch // self.shape(cos)[0], heads, 1, 1)
        return self.apply_rotary(x, self.tile(cos, times), self.tile(sin, times))


class ApplyRotary(nn.Cell):
    """`x cos + (-high, low) sin`, in float32; all of one shape. The gradient is the rotation by the opposite angle."""

    def __init__(self):
        super().__init__(auto_prefix=False)
        self.neg = P.Neg()
        self.split = P.Split(axis=-1, output_num=2)
        self.concat = P.Concat(axis=-1)
        self.mul = P.Mul()
        self.add = P.Add()
        self.cast = P.Cast()
        self.dtype = P.DType()

    def construct(self, x, cos, sin):
        wide = self.cast(x, mstype.float32)
        low, high = self.split(wide)
        swapped = self.concat((self.neg(high), low))
        return self.cast(self.add(self.mul(wide, cos), self.mul(swapped, sin)), self.dtype(x))

    def bprop(self, x, cos, sin, out, gradient):
        return self.construct(gradient, cos, self.neg(sin)), cos, sin  # the tables are constant
