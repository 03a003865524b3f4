"""The training step on a CPU: MindFormers' own, without operators that only Ascend has or that are slow on a CPU."""

from __future__ import annotations

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Tensor
from mindspore import dtype as mstype
from mindspore.communication import get_group_size
from mindspore.context import ParallelMode
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.parallel._utils import _get_parallel_mode

LARGE = 1 << 20
"""From this number of elements on, several threads sum the squares of a gradient."""
PARTS = 8
"""Parts of such a gradient, for the threads to share."""

_square_sum = C.MultitypeFuncGraph("square_sum")
_scale = C.MultitypeFuncGraph("scale")


@_square_sum.register("Tensor")
def _square_sum_of(gradient):
    """A product of the gradient with itself: MindSpore's sums over a large tensor are several times slower."""
    wide = F.cast(gradient, mstype.float32)
    if gradient.size < LARGE or gradient.size % PARTS:
        flat = F.reshape(wide, (1, -1))
        return F.reshape(P.MatMul(transpose_b=True)(flat, flat), (1,))
    flat = F.reshape(wide, (PARTS, 1, -1))
    return F.reshape(P.ReduceSum()(P.BatchMatMul(transpose_b=True)(flat, flat)), (1,))


@_scale.register("Tensor", "Tensor")
def _scale_by(factor, gradient):
    return gradient * F.cast(factor, F.dtype(gradient))


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class CPUTrainOneStepCell(MFTrainOneStepCell):
    """One optimizer step on one or several CPU workers.

    The network must return (sum of losses, number of supervised tokens). Both are summed over the workers before they
    are divided, so that the loss, and with it every gradient, is the average over the supervised tokens of the global
    batch, however unevenly workers have them. A step whose gradients have no finite norm changes no weights:
    MindSpore's overflow check has no CPU kernel.

    Inputs:
        Those of the network.

    Outputs:
        As MindFormers' own: loss, whether gradients were not finite, loss scale, learning rate, and norm of the
        gradients before they were clipped to `max_grad_norm`.
    """

    def __init__(self, network, optimizer, max_grad_norm=1.0, **kwargs):
        super().__init__(network, optimizer, max_grad_norm=max_grad_norm, **kwargs)
        self.max_norm = Tensor([max_grad_norm], mstype.float32)
        self.parallel = _get_parallel_mode() == ParallelMode.DATA_PARALLEL and get_group_size() > 1
        if self.parallel:
            self.sum_over_workers = P.AllReduce()

    def construct(self, *inputs):
        total, tokens = self.network(*inputs)
        sensitivity = (F.ones_like(total) * F.cast(self.scale_sense, F.dtype(total)), F.zeros_like(tokens))
        gradients = self.grad_reducer(self.grad(self.network, self.weights)(*inputs, sensitivity))
        if self.parallel:
            total, tokens = self.sum_over_workers(total), self.sum_over_workers(tokens)
        tokens = F.maximum(tokens, F.ones_like(tokens))  # a batch of skipped samples only: no 0 / 0
        factor = 1 / (tokens * self.scale_sense)
        norm = factor * F.sqrt(F.addn(self.hyper_map(_square_sum, gradients)))
        overflow = F.logical_not(F.isfinite(norm))
        if self.use_clip_grad:
            factor = factor * self.max_norm / F.maximum(norm, self.max_norm)
        gradients = self.hyper_map(F.partial(_scale, F.reshape(factor, ())), gradients)  # the one pass over all
        rate = self.learning_rate
        if self.optimizer.dynamic_lr:
            if self.use_grouped_lr:
                rate = self.default_lr
            elif self.optimizer.is_group_lr:
                rate = rate[-1]
            rate = rate(self.optimizer.global_step).reshape(())
        loss = total / tokens
        if not overflow:
            loss = F.depend(loss, self.optimizer(gradients))
        return loss, overflow, self.scale_sense, rate, norm
