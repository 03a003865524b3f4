"""Batches that make one step: MindFormers' cell for NPUs, around our network, gives what one large batch gives."""

import numpy as np
import pytest

from llavanext_cli.records import IGNORE_INDEX
from tests.parity.models import tiny_config, write_hf_folder
from tests.parity.stages import relative_error
from tests.parity.variants import SMALLER

NAMES = ("40x60", "text only", "20x200", "57x113")
CLOSE = 1e-4


@pytest.fixture(scope="module")
def model(mindspore_cpu, tmp_path_factory):
    from tests.parity.mindspore_side import Model

    folder = tmp_path_factory.mktemp("accumulation")
    return Model(write_hf_folder(folder / "hub", tiny_config(SMALLER)), folder / "converted", NAMES)


def test_two_batches_are_one_of_twice_the_size(model):
    import mindspore as ms
    from mindformers.wrapper.wrapper import GradAccumulationCellWithTwoOutput

    from tests.parity.mindspore_side import keep_alive

    batch = model.collate([case.encoded for case in model.cases])
    labels = batch.labels.copy()
    labels[0, :-20] = IGNORE_INDEX  # the first batch has far fewer supervised tokens than the second
    inputs = [ms.Tensor(value) for value in (batch.input_ids, batch.tiles, batch.feature_index, labels)]
    counts = [int((part != IGNORE_INDEX).sum()) for part in np.split(labels, 2)]
    assert counts[0] > 0
    assert counts[1] > 1.2 * counts[0]

    def learn(cell, network):
        """(sum of losses, tokens), and the gradient of their quotient."""
        weights = ms.ParameterTuple(network.trainable_params())

        def average(*values):
            total, tokens = cell(*values)
            return (total / tokens).reshape(()), tokens

        (loss, tokens), gradients = ms.jit(ms.value_and_grad(average, None, weights, has_aux=True))(*inputs)
        named = {weight.name: value.asnumpy() for weight, value in zip(weights, gradients, strict=True)}
        return float(loss.asnumpy()), int(tokens.asnumpy().reshape(())), named

    whole, small = model.build(train=True, batch=4), model.build(train=True, batch=2)
    loss, tokens, gradients = learn(whole, whole)
    added = learn(keep_alive(GradAccumulationCellWithTwoOutput(small, 2)), small)
    assert tokens == added[1] == sum(counts)
    assert abs(added[0] / loss - 1) < CLOSE
    assert added[2].keys() == gradients.keys()
    for name, gradient in gradients.items():
        if "qkv.bias" not in name:  # a key's bias has a gradient of rounding errors
            assert relative_error(added[2][name], gradient) < CLOSE, name
