"""Weights used from the mapped file: widened exactly, in slices and blocks, ahead of time."""

from __future__ import annotations

from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from llavanext_cli.weights.mapped import MappedWeights, widen
from llavanext_cli.weights.readers import read_safetensors_header


@pytest.fixture(autouse=True)
def _mindspore(mindspore_cpu):
    """Its tensors are what comes out."""


def mapped(folder, dtype, parts=None):
    rng = np.random.default_rng(0)
    arrays = {f"{layer}.{name}": rng.normal(size=(6, 4)).astype(dtype) for layer in range(3) for name in "ab"}
    arrays["bias"] = rng.normal(size=4).astype(dtype)
    save_file(arrays, folder / "model.safetensors")
    checkpoint = SimpleNamespace(parameters=read_safetensors_header(folder / "model.safetensors"))
    return {name: array.astype(np.float32) for name, array in arrays.items()}, MappedWeights(checkpoint, parts)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_every_number_is_widened_exactly(dtype):
    raw = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    np.testing.assert_array_equal(widen(raw), raw.astype(np.float32))


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_groups_follow_each_other(tmp_path, dtype):
    right, weights = mapped(tmp_path, dtype)
    groups = [(f"{layer}.a", f"{layer}.b", "bias") for layer in range(3)]
    for _ in range(2):
        for number, names in enumerate(groups):
            given = weights.group(names, groups[(number + 1) % 3])
            for name, tensor in zip(names, given, strict=True):
                np.testing.assert_array_equal(tensor.asnumpy(), right[name])
    np.testing.assert_array_equal(weights.block("0.a", 2, 4).asnumpy(), right["0.a"][2:4])
    np.testing.assert_array_equal(weights.rows("0.a", np.array([[5, 0]])), right["0.a"][[[5, 0]]])


def test_a_group_that_was_expected_and_comes_later_is_read_again(tmp_path):
    """After an interrupt the layers begin from the first: what was widened for the next one is in use by others."""
    right, weights = mapped(tmp_path, ml_dtypes.bfloat16)
    groups = [(f"{layer}.a", f"{layer}.b") for layer in range(3)]
    weights.group(groups[0], groups[1])
    weights.group(groups[2], groups[0])
    for name, tensor in zip(groups[1], weights.group(groups[1]), strict=True):
        np.testing.assert_array_equal(tensor.asnumpy(), right[name])


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_worker_keeps_its_part(tmp_path, dtype):
    right, weights = mapped(tmp_path, dtype, {"0.a": (0, 3, 6), "0.b": (1, 0, 2)})
    a, b = weights.group(("0.a", "0.b"))
    np.testing.assert_array_equal(a.asnumpy(), right["0.a"][3:])
    np.testing.assert_array_equal(b.asnumpy(), right["0.b"][:, :2])
