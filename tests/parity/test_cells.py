"""Each CPU cell and its gradient against torch's function and automatic gradient."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch")

CLOSE = 2e-5
"""Greatest error relative to the largest value."""


def run(cell, arrays, sensitivity, constants=()):
    """The first output of `cell` for the arrays and the constants, and the gradients of the arrays."""
    import mindspore as ms

    class First(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.cell = cell

        def construct(self, *inputs):
            out = self.cell(*inputs)
            return out[0] if isinstance(out, tuple) else out

    class Gradients(ms.nn.Cell):
        def __init__(self):
            super().__init__()
            self.first = First()
            self.gradients = ms.ops.GradOperation(get_all=True, sens_param=True)

        def construct(self, *inputs):
            return self.gradients(self.first)(*inputs)

    inputs = [ms.Tensor(array) for array in (*arrays, *constants)]
    gradients = Gradients()(*inputs, ms.Tensor(sensitivity))
    return First()(*inputs).asnumpy(), [gradient.asnumpy() for gradient in gradients[: len(arrays)]]


def run_torch(function, arrays, sensitivity):
    inputs = [torch.tensor(array, requires_grad=True) for array in arrays]
    out = function(*inputs)
    (out * torch.tensor(sensitivity)).sum().backward()
    return out.detach().numpy(), [x.grad.numpy() for x in inputs]


def check(cell, function, arrays, constants=()):
    sensitivity = random(*run_torch(function, arrays, np.float32(1))[0].shape, seed=9)
    out, gradients = run(cell, arrays, sensitivity, constants)
    expected, expected_gradients = run_torch(function, arrays, sensitivity)
    for ours, theirs in zip([out, *gradients], [expected, *expected_gradients], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=CLOSE * np.abs(theirs).max())


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("length", "causal", "kv_heads"),
    [(256, True, 4), (600, True, 4), (7, True, 2), (257, True, 2), (257, False, 4)],
    ids=str,
)
def test_attention(mindspore_cpu, length, causal, kv_heads):
    from llavanext_cli.model.backend.attention import Attention

    dim, heads = 16, 4
    arrays = [random(2, count, length, dim, seed=n) for n, count in enumerate((heads, kv_heads, kv_heads))]

    def attend(query, key, value):
        key, value = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (key, value))
        return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=causal)

    check(Attention(dim, causal=640 if causal else None), attend, arrays)


def test_norms(mindspore_cpu):
    from llavanext_cli.model.backend.norms import LayerNorm, RMSNorm

    shape = (3, 70, 48)
    width = shape[-1]
    x, weight, bias = random(*shape) + 3, random(width, seed=1), random(width, seed=2)
    functional = torch.nn.functional
    check(LayerNorm(width, 1e-5), lambda x, w, b: functional.layer_norm(x, (width,), w, b, 1e-5), [x, weight, bias])
    check(RMSNorm(width, 1e-5), lambda x, w: functional.rms_norm(x, (width,), w, 1e-5), [x, weight])


def test_bias(mindspore_cpu):
    from llavanext_cli.model.backend.norms import BiasAdd

    check(BiasAdd(24), torch.add, [random(70, 24), random(24)])


def test_rotary(mindspore_cpu):
    from llavanext_cli.model.backend.cpu import ApplyRotary

    angles = np.tile(np.outer(np.arange(9), 100.0 ** -np.linspace(0, 1, 8)), 2)
    tables = [np.tile(table(angles), (2, 3, 1, 1)).astype(np.float32) for table in (np.cos, np.sin)]  # [2, 3, 9, 16]

    def turn(x):
        cos, sin = (torch.tensor(table) for table in tables)
        low, high = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-high, low), dim=-1) * sin

    check(ApplyRotary(), turn, [random(2, 3, 9, 16)], tables)


@pytest.mark.parametrize("supervised", [0, 13, 40])
def test_supervised_loss(mindspore_cpu, supervised):
    import mindspore as ms

    from llavanext_cli.model.backend.cpu import SupervisedLoss
    from llavanext_cli.records import IGNORE_INDEX

    vocab, width = 50, 16
    weight = random(vocab, width, seed=3) / math.sqrt(width)
    head = ms.nn.Dense(width, vocab, weight_init=ms.Tensor(weight), has_bias=False)
    loss = SupervisedLoss(head, vocab)
    order = np.random.default_rng(supervised)
    labels = np.full(40, IGNORE_INDEX, np.int32)
    labels[order.permutation(40)[:supervised]] = order.integers(0, vocab, supervised)
    labels = labels.reshape(2, 20)
    hidden = random(2, 20, width)
    total, count = loss(ms.Tensor(hidden), ms.Tensor(labels))
    assert count.asnumpy() == [supervised]
    assert total.shape == (1,)

    def expected(x):
        logits = x.reshape(-1, width) @ torch.tensor(weight).T
        rows = torch.tensor(labels.reshape(-1)).long()
        return torch.nn.functional.cross_entropy(logits, rows, ignore_index=IGNORE_INDEX, reduction="sum")[None]

    if supervised:
        check(loss, expected, [hidden], [labels])
    else:
        out, (gradient,) = run(loss, [hidden], np.ones(1, np.float32), [labels])
        assert out == [0] and not gradient.any()


def test_adamw(mindspore_cpu):
    """Fifty steps of matrices that decay, a small and a large one, and a vector that does not; the rate goes down."""
    import mindspore as ms

    from llavanext_cli.model.backend.optimizer import LARGE, CPUAdamW

    values = {"small": random(20, 30), "large": random(LARGE // 64, 64), "vector": random(30, seed=1)}
    ours = {name: ms.Parameter(ms.Tensor(value), name=name) for name, value in values.items()}
    theirs = {name: torch.tensor(value, requires_grad=True) for name, value in values.items()}
    decays = {"small": 0.1, "large": 0.1, "vector": 0.0}
    rates = np.linspace(1e-2, 1e-3, 50).astype(np.float32)
    optimizer = CPUAdamW(
        [{"params": [ours[name]], "weight_decay": decay} for name, decay in decays.items()],
        learning_rate=rates.tolist(),
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    peer = torch.optim.AdamW(
        [{"params": [theirs[name]], "weight_decay": decay} for name, decay in decays.items()],
        betas=(0.9, 0.95),
        eps=1e-6,
    )
    for step, rate in enumerate(rates):
        gradients = {name: random(*value.shape, seed=step) * 0.1 for name, value in values.items()}
        optimizer(tuple(ms.Tensor(gradients[name]) for name in values))
        for name, weight in theirs.items():
            weight.grad = torch.tensor(gradients[name])
        for group in peer.param_groups:
            group["lr"] = float(rate)
        peer.step()
    for name in values:
        np.testing.assert_allclose(ours[name].asnumpy(), theirs[name].detach().numpy(), rtol=0, atol=2e-6)
