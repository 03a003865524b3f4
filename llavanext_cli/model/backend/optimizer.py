"""AdamW on a CPU: MindFormers' parameters and schedules, and a fused kernel for each weight.

MindFormers' AdamW is a dozen element-wise operators a weight, each a pass over memory. MindSpore's `Adam` is one pass,
with the correction of the moments' bias in its rate and not in its epsilon; and the decay is a pass of its own (its
`AdamWeightDecay` does both in one, and takes three times as long). With rate r, decay d and t steps done,

    w  <-  (1 - r d) w
    w  <-  w - r' m / (sqrt(v) + eps')        =  w - r (m / c1) / (sqrt(v / c2) + eps)

    c1 = 1 - beta1^t    c2 = 1 - beta2^t    r' = r sqrt(c2) / c1    eps' = eps sqrt(c2)

Source: Loshchilov & Hutter 2019 (AdamW); Kingma & Ba 2015, section 2, for the efficient order.
"""

from __future__ import annotations

from mindformers.core.optim.adamw import AdamW
from mindformers.tools.register import MindFormerModuleType, MindFormerRegister
from mindspore.ops import composite as C
from mindspore.ops import functional as F
from mindspore.ops import operations as P

_update = C.MultitypeFuncGraph("fused_adamw")


@_update.register(
    "Function", "Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
    "Tensor", "Tensor", "Bool",
)  # fmt: skip
def _update_one(
    kernel, assign, power1, power2, beta1, beta2, epsilon, rate, decay, weight, gradient, first, second, learns
):
    if learns:
        assign(weight, weight * (1 - rate * decay))
        kernel(weight, first, second, power1, power2, rate, beta1, beta2, epsilon, gradient)
    return learns


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER)
class CPUAdamW(AdamW):
    """`AdamW` of MindFormers, with its arguments, parameters and groups, for float32 weights on a CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernel = P.Adam()
        self.assign = P.Assign()
        self.power = P.Pow()
        self.root = P.Sqrt()
        self.scalar = P.Reshape()

    def construct(self, gradients):
        decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        step = self.scalar(self.global_step, ())
        beta1, beta2 = self.scalar(self.beta1, ()), self.scalar(self.beta2, ())
        power1, power2 = self.power(beta1, step), self.power(beta2, step)
        eps = self.scalar(self.eps, ()) * self.root(1 - power2)
        weights, moments, learns = self._parameters, (self.exp_avg, self.exp_avg_sq), self.optim_filter
        if self.is_group_lr:
            update = F.partial(_update, self.kernel, self.assign, power1, power2, beta1, beta2, eps)
            return self.hyper_map(update, rate, decay, weights, gradients, moments[0], moments[1], learns)
        if self.is_group:
            update = F.partial(_update, self.kernel, self.assign, power1, power2, beta1, beta2, eps, rate)
            return self.hyper_map(update, decay, weights, gradients, moments[0], moments[1], learns)
        update = F.partial(_update, self.kernel, self.assign, power1, power2, beta1, beta2, eps, rate, decay)
        return self.hyper_map(update, weights, gradients, moments[0], moments[1], learns)
