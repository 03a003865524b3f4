"""Casts as torch does them, and tensors that are computed while they are written."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.weights.dtypes import (
    cast_tensor,
    from_bytes,
    gather_strided,
    generate_random,
    grow_rows,
    round_to,
    to_bytes,
)
from llavanext_cli.weights.stream import read_chunks
from llavanext_cli.weights.tensors import FileRange, PlannedTensor, TensorSpec

torch = pytest.importorskip("torch")


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("BF16", torch.bfloat16), ("F16", torch.float16)])
def test_casts_round_as_torch_does_and_clamp_to_finite_values(dtype: str, torch_dtype: torch.dtype) -> None:
    bits = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (np.arange(65536, dtype=np.uint32) << 16 | 0x8000).view(np.float32)  # halfway between two bfloat16s
    edges = np.array([0.0, -0.0, 65504.0, 65520.0, -7e4, 3.4e38, -3.4e38, 1e-40, np.inf, -np.inf, np.nan], np.float32)
    wide = np.concatenate([bits, ties, edges])
    theirs = torch.from_numpy(wide).to(torch_dtype).float().numpy()
    narrow, count = round_to(wide, dtype)
    ours = narrow.astype(np.float32)
    clamped = np.isfinite(wide) & np.isinf(theirs)
    assert count == np.count_nonzero(clamped) > 0
    np.testing.assert_array_equal(ours[~clamped], theirs[~clamped])
    largest = torch.finfo(torch_dtype).max
    np.testing.assert_array_equal(ours[clamped], np.where(wide[clamped] > 0, largest, -largest))


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("wanted", ["float32", "float16", "bfloat16"])
def test_bytes_become_arrays(stored: str, wanted: str) -> None:
    tensor = torch.tensor([1.5, -2.0, 0.1]).to({"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16))
    array = from_bytes(tensor.view(torch.uint8).numpy().tobytes(), stored, wanted)
    assert str(array.dtype) == wanted
    np.testing.assert_array_equal(array.astype(np.float32), tensor.to(getattr(torch, wanted)).float().numpy())


def joined(tensor: PlannedTensor) -> bytes:
    return b"".join(bytes(chunk) for piece in tensor.pieces for chunk in read_chunks(piece))


def planned(tmp_path: Path, array: np.ndarray, dtype: str) -> PlannedTensor:
    """A tensor of two pieces with other bytes around them."""
    data = array.tobytes()
    path = tmp_path / "data.bin"
    path.write_bytes(b"head" + data + b"tail")
    cut = array.itemsize * (array.size // 3)
    pieces = (FileRange(path, 4, cut), FileRange(path, 4 + cut, len(data) - cut))
    return PlannedTensor("w", dtype, array.shape, pieces)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of several chunks, which end inside rows."""
    monkeypatch.setattr("llavanext_cli.weights.dtypes.CHUNK_BYTES", 64)
    monkeypatch.setattr("llavanext_cli.weights.stream.CHUNK_BYTES", 64)


def test_a_tensor_is_cast_chunk_by_chunk(tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    array[2, 3] = 1e6
    clamped: dict[str, int] = {}
    cast = cast_tensor(planned(tmp_path, array, "F32"), "F16", clamped)
    assert cast.dtype == "F16" and cast.nbytes == array.nbytes // 2
    array[2, 3] = 65504
    assert joined(cast) == array.astype(np.float16).tobytes() and clamped == {"w": 1}
    assert cast_tensor(cast, "F16", clamped) is cast


@pytest.mark.parametrize(("dtype", "kind"), [("F32", np.float32), ("F16", np.float16)])
def test_new_rows_are_the_mean(dtype: str, kind: type, tmp_path: Path) -> None:
    array = np.random.default_rng(0).standard_normal((10, 6)).astype(kind)
    result = np.frombuffer(joined(grow_rows(planned(tmp_path, array, dtype), 16)), kind).reshape(16, 6)
    np.testing.assert_array_equal(result[:10], array)
    mean = array.astype(np.float64).mean(axis=0).astype(kind)
    np.testing.assert_array_equal(result[10:], np.tile(mean, (6, 1)))


def test_random_tensors_depend_on_their_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = joined(generate_random("w", "F32", (100, 30), (7, 1), 0.5))
    monkeypatch.setattr("llavanext_cli.weights.dtypes.CHUNK_BYTES", 800)
    assert joined(generate_random("w", "F32", (100, 30), (7, 1), 0.5)) == first
    assert joined(generate_random("w", "F32", (100, 30), (8, 1), 0.5)) != first
    values = np.frombuffer(first, np.float32)
    assert np.abs(values).max() <= 0.5 and abs(values.mean()) < 0.02 and abs(values.std() - 0.5 / 3**0.5) < 0.01
    # The same numbers on every machine and in every version: a checkpoint can be built again from its seed.
    assert hashlib.sha256(first).hexdigest()[:16] == "2b6a18b479404b81"


@pytest.mark.parametrize("strides", [(1, 4), (8, 2), (0, 1)])
def test_strided_tensors_are_gathered(strides: tuple[int, int], tmp_path: Path) -> None:
    base = np.arange(100, dtype=np.float32)
    (tmp_path / "x").write_bytes(b"#" + base.tobytes())
    spec = TensorSpec("w", "F32", (3, 4), tmp_path / "x", 1 + 4 * 5, 48, strides)
    expected = np.lib.stride_tricks.as_strided(base[5:], (3, 4), tuple(4 * s for s in strides))
    assert b"".join(map(bytes, gather_strided(spec).chunks())) == expected.tobytes()


def test_arrays_that_are_not_contiguous_keep_their_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert bytes(to_bytes(array)) == array.copy().tobytes()
