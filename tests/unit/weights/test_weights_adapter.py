"""LoRA's matrices: which weights have them, and what merging makes of the bytes."""

from __future__ import annotations

import numpy as np
import pytest

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.schema import Lora
from llavanext_cli.training.slices import plan_array
from llavanext_cli.weights.adapter import adapter_parameters, is_adapter, merge_adapter
from llavanext_cli.weights.dtypes import from_bytes, round_to, to_bytes
from llavanext_cli.weights.stream import read_chunks
from llavanext_cli.weights.tensors import FileRange, GeneratedBytes, PlannedTensor

CELL = "language_model.model.layers.0.attention.wk"
LORA = Lora(rank=2, alpha=3.0, targets=("wk",))


def read(tensor: PlannedTensor) -> bytes:
    return b"".join(chunk for piece in tensor.pieces for chunk in read_chunks(piece))


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    shapes = {f"{CELL}.weight": (6, 4), f"{CELL}.lora_a": (2, 4), f"{CELL}.lora_b": (6, 2), "image_newline": (4,)}
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def test_only_targets_have_matrices():
    shapes = adapter_parameters(Architecture(), LORA)
    assert len(shapes) == 2 * 32
    assert shapes[f"{CELL}.lora_a"] == (2, 4096)
    assert shapes[f"{CELL}.lora_b"] == (4096, 2)
    assert all(map(is_adapter, shapes))
    everything = adapter_parameters(Architecture(), Lora(rank=16))
    assert len(everything) == 2 * 32 * 7
    assert everything["language_model.model.layers.31.feed_forward.w2.lora_a"] == (16, 11008)


def test_merged_is_the_weight_and_the_scaled_product(arrays):
    tensors = {name: plan_array(name, array) for name, array in arrays.items()}
    merged = merge_adapter(tensors, LORA)
    assert merged.keys() == {f"{CELL}.weight"}, "weights without matrices are left to the caller"
    wanted = arrays[f"{CELL}.weight"] + 1.5 * arrays[f"{CELL}.lora_b"] @ arrays[f"{CELL}.lora_a"]
    found = np.frombuffer(read(merged[f"{CELL}.weight"]), np.float32).reshape(6, 4)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_moments_of_the_matrices_are_not_matrices(arrays):
    moments = {f"adam_m.{name}": array for name, array in arrays.items() if name.endswith("lora_a")}
    tensors = {name: plan_array(name, array) for name, array in (moments | arrays).items()}
    assert merge_adapter(tensors, LORA).keys() == {f"{CELL}.weight"}


def test_a_bfloat16_weight_in_slices_is_rounded_once(arrays, tmp_path):
    bits, _ = round_to(arrays[f"{CELL}.weight"], "BF16")
    data = bytes(to_bytes(bits))
    (tmp_path / "slices").write_bytes(b"head" + data)
    half = len(data) // 2
    pieces = (FileRange(tmp_path / "slices", 4, half), GeneratedBytes(half, lambda: iter([memoryview(data[half:])])))
    tensors = {name: plan_array(name, array) for name, array in arrays.items()}
    tensors[f"{CELL}.weight"] = PlannedTensor(f"{CELL}.weight", "BF16", (6, 4), pieces)
    merged = merge_adapter(tensors, LORA)[f"{CELL}.weight"]
    exact = bits.astype(np.float32) + 1.5 * arrays[f"{CELL}.lora_b"] @ arrays[f"{CELL}.lora_a"]
    np.testing.assert_allclose(from_bytes(read(merged), "BF16", "float32").reshape(6, 4), exact, rtol=2**-8)
