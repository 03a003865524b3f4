"""AdamW on a CPU: MindFormers' parameters and schedules, and one fused kernel for each weight.

MindFormers' AdamW is a dozen element-wise operators a weight, each a pass over memory. MindSpore's `AdamWeightDecay`
is one pass, without the correction of the moments' bias; that correction is the same for every element, and so fits
into the learning rate, epsilon and decay it is given (t steps done, rate r, decay d):

    w - r d w - r (m / c1) / (sqrt(v / c2) + eps)  =  w - r' (m / (sqrt(v) + eps') + d' w)

    c1 = 1 - beta1^t    c2 = 1 - beta2^t    r' = r sqrt(c2) / c1    eps' = eps sqrt(c2)    d' = d c1 / sqrt(c2)

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
    "Function", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor", "Tensor",
    "Tensor", "Bool",
)  # fmt: skip
def _update_one(kernel, beta1, beta2, epsilon, c1, root_c2, rate, decay, weight, gradient, first, second, learns):
    if learns:
        kernel(weight, first, second, rate * root_c2 / c1, beta1, beta2, epsilon, decay * c1 / root_c2, gradient)
    return learns


@MindFormerRegister.register(MindFormerModuleType.OPTIMIZER)
class CPUAdamW(AdamW):
    """`AdamW` of MindFormers, with its arguments, parameters and groups, for float32 weights on a CPU."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.kernel = P.AdamWeightDecay()
        self.power = P.Pow()
        self.root = P.Sqrt()
        self.scalar = P.Reshape()

    def construct(self, gradients):
        decay, rate = self.get_weight_decay(), self.get_lr()
        self.assignadd(self.global_step, self.global_step_increase_tensor)
        beta1, beta2 = self.scalar(self.beta1, ()), self.scalar(self.beta2, ())
        step = self.scalar(self.global_step, ())
        c1 = 1 - self.power(beta1, step)
        root_c2 = self.root(1 - self.power(beta2, step))
        eps = self.scalar(self.eps, ()) * root_c2
        weights, moments, learns = self._parameters, (self.exp_avg, self.exp_avg_sq), self.optim_filter
        if self.is_group_lr:
            update = F.partial(_update, self.kernel, beta1, beta2, eps, c1, root_c2)
            return self.hyper_map(update, rate, decay, weights, gradients, moments[0], moments[1], learns)
        if self.is_group:
            update = F.partial(_update, self.kernel, beta1, beta2, eps, c1, root_c2, rate)
            return self.hyper_map(update, decay, weights, gradients, moments[0], moments[1], learns)
        update = F.partial(_update, self.kernel, beta1, beta2, eps, c1, root_c2, rate, decay)
        return self.hyper_map(update, weights, gradients, moments[0], moments[1], learns)
