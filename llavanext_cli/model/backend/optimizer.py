"""AdamW on a CPU: MindFormers' parameters and schedules, and fused kernels.

MindFormers' AdamW is a dozen element-wise operators a weight, each a pass over memory. MindSpore has two fused kernels,
and neither is AdamW; with rate r, decay d and t steps done,

    AdamWeightDecay   w - r' (m / (sqrt(v) + eps') + d' w)    one slow kernel: for small weights
    Adam              w' - r' m / (sqrt(v) + eps')            fast, after w' = (1 - r d) w: for large weights

    both give         w - r d w - r (m / c1) / (sqrt(v / c2) + eps)

    c1 = 1 - beta1^t    c2 = 1 - beta2^t    r' = r sqrt(c2) / c1    eps' = eps sqrt(c2)    d' = d c1 / sqrt(c2)

Source: Loshchilov & Hutter 2019 (AdamW); Kingma & Ba 2015, section 2, for the efficient order.
"""

from __future__ import annotations

from mindformers.core.optim.adamw import AdamW
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

LARGE = 1 << 16
"""From this number of elements on, three fast kernels cost less than the slow one."""

_update = C.MultitypeFuncGraph("fused_adamw")
_small, _large, _assign = P.AdamWeightDecay(), P.Adam(), P.Assign()


@_update.register(
    "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
    "Bool",
)  # fmt: skip
def _update_one(power1, power2, beta1, beta2, epsilon, rate, decay, weight, gradient, first, second, is_trainable):
    if is_trainable:
        if weight.size < LARGE:
            ratio = F.sqrt(1 - power2) / (1 - power1)
            _small(weight, first, second, rate * ratio, beta1, beta2, epsilon, decay / ratio, gradient)
        else:
            _assign(weight, weight * (1 - rate * decay))
            _large(weight, first, second, power1, power2, rate, beta1, beta2, epsilon, gradient)
    return is_trainable


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER)
class CPUAdamW(AdamW):
    """`AdamW` of MindFormers, with its arguments, parameters and groups, for float32 weights on a CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.power = P.Pow()
        self.sqrt = P.Sqrt()
        self.scalar = P.Reshape()

    def construct(self, gradients):
        decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.scalar(self.global_step, ())
        beta1, beta2 = self.scalar(self.beta1, ()), self.scalar(self.beta2, ())
        power1, power2 = self.power(beta1, step), self.power(beta2, step)
        eps = self.scalar(self.eps, ()) * self.sqrt(1 - power2)
        weights, moments, is_trainable = self._parameters, (self.exp_avg, self.exp_avg_sq), self.optim_filter
        if self.is_group_lr:
            update = F.partial(_update, power1, power2, beta1, beta2, eps)
            return self.hyper_map(update, rate, decay, weights, gradients, moments[0], moments[1], is_trainable)
        if self.is_group:
            update = F.partial(_update, power1, power2, beta1, beta2, eps, rate)
            return self.hyper_map(update, decay, weights, gradients, moments[0], moments[1], is_trainable)
        update = F.partial(_update, power1, power2, beta1, beta2, eps, rate, decay)
        return self.hyper_map(update, weights, gradients, moments[0], moments[1], is_trainable)
