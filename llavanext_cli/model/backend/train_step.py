"""The training step on a CPU: MindFormers' own, with the two things replaced that only an Ascend or GPU has."""

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

_is_finite = C.MultitypeFuncGraph("is_finite")


@_is_finite.register("Tensor")
def _tensor_is_finite(grad):
    return F.cast(F.isfinite(F.reduce_sum(F.abs(grad))), mstype.float32)


@MindFormerRegister.register(MindFormerModuleType.WRAPPER)
class CPUTrainOneStepCell(MFTrainOneStepCell):
    """One optimizer step on one or several CPU workers.

    The network must return (sum of losses, number of supervised tokens). Both are summed over the workers before they
    are divided, so that the loss, and with it every gradient, is the average over the supervised tokens of the global
    batch, however unevenly they fall. The overflow check, for which MindSpore has no CPU kernel, asks whether every
    gradient is finite; a step that is not leaves the weights alone.
    """

    def __init__(self, network, optimizer, **kwargs):
        super().__init__(network, optimizer, **kwargs)
        self.parallel = _get_parallel_mode() == ParallelMode.DATA_PARALLEL and get_group_size() > 1
        if self.parallel:
            self.sum_over_workers = P.AllReduce()
        self.no_status = Tensor(0.0, mstype.float32)

    def start_overflow_check(self, pre_cond, compute_input):
        return self.no_status, compute_input

    def get_overflow_status(self, status, compute_output):
        finite = F.stack(self.hyper_map(_is_finite, compute_output))
        return F.reduce_min(finite) < 0.5

    def grads_for_legacy(self, scaling_sens, *inputs):
        total, tokens = self.network(*inputs)
        sensitivity = (F.ones_like(total) * F.cast(scaling_sens, F.dtype(total)), F.zeros_like(tokens))
        grads = self.grad(self.network, self.weights)(*inputs, sensitivity)
        if self.parallel:
            total, tokens = self.sum_over_workers(total), self.sum_over_workers(tokens)
        tokens = F.maximum(tokens, F.ones_like(tokens))  # a batch of skipped samples teaches nothing: no 0 / 0
        return total / tokens, grads, tokens
