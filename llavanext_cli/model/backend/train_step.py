"""The training step on a CPU: MindFormers' own, without what only an Ascend has or what is slow here."""

from __future__ import annotations

from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindformers.wrapper import MFTrainOneStepCell
from mindspore import Tensor, nn
from mindspore import dtype as mstype
from mindspore.communication import get_group_size
from mindspore.context import ParallelMode
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P
from mindspore.parallel._utils import _get_parallel_mode

_square_sum = C.MultitypeFuncGraph("square_sum")
_scale = C.MultitypeFuncGraph("scale")


@_square_sum.register("Tensor")
def _square_sum_of(gradient):
    """A product of the gradient with itself: MindSpore's sums over a large tensor are several times slower."""
    flat = F.reshape(F.cast(gradient, mstype.float32), (1, -1))
    return F.reshape(P.MatMul(transpose_b=True)(flat, flat), (1,))


@_scale.register("Tensor", "Tensor")
def _scale_by(factor, gradient):
    return gradient * F.cast(factor, F.dtype(gradient))


class ClipGradNorm(nn.Cell):
    """In the place of MindFormers' cell: gradients of a global norm above `max_norm` are scaled down to it."""

    def __init__(self, max_norm: float):
        super().__init__()
        self.max_norm = Tensor([max_norm], mstype.float32)
        self.hyper_map = C.HyperMap()

    def construct(self, gradients):
        norm = F.sqrt(F.addn(self.hyper_map(_square_sum, gradients)))
        factor = F.reshape(self.max_norm / F.maximum(norm, self.max_norm), ())
        return self.hyper_map(F.partial(_scale, factor), gradients), norm


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class CPUTrainOneStepCell(MFTrainOneStepCell):
    """One optimizer step on one or several CPU workers.

    The network must return (sum of losses, number of supervised tokens). Both are summed over the workers before they
    are divided, so that the loss, and with it every gradient, is the average over the supervised tokens of the global
    batch, however unevenly they fall. The overflow check, for which MindSpore has no CPU kernel, asks whether the
    gradients' norm is finite; a step whose is not leaves the weights alone.
    """

    def __init__(self, network, optimizer, max_grad_norm=1.0, **kwargs):
        super().__init__(network, optimizer, max_grad_norm=max_grad_norm, **kwargs)
        self.clip_grad_norm = ClipGradNorm(max_grad_norm)
        self.parallel = _get_parallel_mode() == ParallelMode.DATA_PARALLEL and get_group_size() > 1
        if self.parallel:
            self.sum_over_workers = P.AllReduce()
        self.no_status = Tensor(0.0, mstype.float32)

    def start_overflow_check(self, pre_cond, compute_input):
        return self.no_status, compute_input

    def get_overflow_status(self, status, compute_output):
        return F.logical_not(F.isfinite(F.addn(self.hyper_map(_square_sum, compute_output))))

    def grads_for_legacy(self, scaling_sens, *inputs):
        total, tokens = self.network(*inputs)
        sensitivity = (F.ones_like(total) * F.cast(scaling_sens, F.dtype(total)), F.zeros_like(tokens))
        grads = self.grad(self.network, self.weights)(*inputs, sensitivity)
        if self.parallel:
            total, tokens = self.sum_over_workers(total), self.sum_over_workers(tokens)
        tokens = F.maximum(tokens, F.ones_like(tokens))  # a batch of skipped samples teaches nothing: no 0 / 0
        return total / tokens, grads, tokens
