"""Floating-point types as torch converts them, and tensors that grow or are made anew."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from llavanext_cli.weights.dtypes import (
    cast_tensor,
    from_bytes,
    gather_strided,
    grow_rows,
    make_random,
    narrow_to,
    to_bytes,
    widen,
)
from llavanext_cli.weights.headers import TensorSpec
from llavanext_cli.weights.stream import Extent, Made, PlannedTensor

torch = pytest.importorskip("torch")

EDGES = [0.0, -0.0, 1.0, 65504.0, 65519.9, 65520.0, -7e4, 3.4e38, -3.4e38, 1e-8, 6e-8, 1e-40, np.inf, -np.inf, np.nan]


def all_halves() -> np.ndarray:
    return np.arange(65536, dtype=np.uint16)


def many_floats() -> np.ndarray:
    generator = np.random.default_rng(0)
    bits = generator.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    ties = (all_halves().astype(np.uint32) << 16 | 0x8000).view(np.float32)  # halfway between two bfloat16s
    return np.concatenate([bits, ties, np.array(EDGES, np.float32)])


def test_widening_bfloat16_is_exact_for_every_value() -> None:
    ours = widen(all_halves(), "BF16")
    theirs = torch.from_numpy(all_halves().view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(ours.view(np.uint32), theirs.view(np.uint32))


def test_narrowing_to_bfloat16_rounds_as_torch_does() -> None:
    wide = many_floats()
    ours, saturated = narrow_to(wide, "BF16")
    theirs = torch.from_numpy(wide).bfloat16().view(torch.int16).numpy().view(np.uint16)
    finite = np.isfinite(wide)
    overflowed = finite & ~np.isfinite(torch.from_numpy(wide).bfloat16().float().numpy())
    assert saturated == np.count_nonzero(overflowed) > 0
    same = finite & ~overflowed
    np.testing.assert_array_equal(ours[same], theirs[same])
    back = widen(ours, "BF16")
    assert np.isfinite(back[overflowed]).all() and (np.sign(back) == np.sign(wide))[overflowed].all()
    np.testing.assert_array_equal(np.isnan(back), np.isnan(wide))
    np.testing.assert_array_equal(back[np.isinf(wide)], wide[np.isinf(wide)])


def test_narrowing_to_float16_saturates_and_counts() -> None:
    ours, saturated = narrow_to(np.array(EDGES, np.float32), "F16")
    with np.errstate(over="ignore"):
        theirs = np.array(EDGES, np.float32).astype(np.float16)
    over = np.abs(np.array(EDGES)) > 65504
    over &= np.isfinite(EDGES)
    assert saturated == np.count_nonzero(over) == 5
    np.testing.assert_array_equal(ours[~over], theirs[~over])
    assert set(np.abs(ours[over]).tolist()) == {65504.0}


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("wanted", ["float32", "float16"])
def test_bytes_become_arrays(stored: str, wanted: str) -> None:
    tensor = torch.tensor([1.5, -2.0, 0.1]).to({"F32": torch.float32, "F16": torch.float16}.get(stored, torch.bfloat16))
    data = tensor.view(torch.uint8).numpy().tobytes()
    array = from_bytes(data, stored, wanted)
    assert array.dtype == wanted
    np.testing.assert_array_equal(array, tensor.to(getattr(torch, wanted)).numpy())


def joined(tensor: PlannedTensor) -> bytes:
    from llavanext_cli.weights.dtypes import read_chunks

    return b"".join(bytes(chunk) for piece in tensor.pieces for chunk in read_chunks(piece))


def planned(tmp_path: Path, array: np.ndarray, dtype: str) -> PlannedTensor:
    """A tensor of two pieces with other bytes around them."""
    data = array.tobytes()
    path = tmp_path / "data.bin"
    path.write_bytes(b"head" + data + b"tail")
    cut = array.itemsize * (array.size // 3)
    pieces = (Extent(path, 4, cut), Extent(path, 4 + cut, len(data) - cut))
    return PlannedTensor("w", dtype, array.shape, pieces)


def test_casting_crosses_chunks_and_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavanext_cli.weights.dtypes.CHUNK_BYTES", 64)
    array = np.random.default_rng(0).standard_normal((30, 7)).astype(np.float32)
    array[2, 3] = 1e6
    tally: dict[str, int] = {}
    cast = cast_tensor(planned(tmp_path, array, "F32"), "F16", tally)
    assert cast.dtype == "F16" and cast.nbytes == array.nbytes // 2
    with np.errstate(over="ignore"):
        expected = array.astype(np.float16)
    expected[2, 3] = 65504
    assert joined(cast) == expected.tobytes() and tally == {"w": 1}
    assert cast_tensor(cast, "F16", tally) is cast


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_new_rows_are_the_mean(dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavanext_cli.weights.dtypes.CHUNK_BYTES", 40)  # rows are cut in the middle
    kind = {"F32": np.float32, "F16": np.float16}[dtype]
    array = np.random.default_rng(0).standard_normal((10, 6)).astype(kind)
    grown = grow_rows(planned(tmp_path, array, dtype), 16)
    result = np.frombuffer(joined(grown), kind).reshape(16, 6)
    np.testing.assert_array_equal(result[:10], array)
    mean = array.astype(np.float64).mean(axis=0).astype(kind)
    np.testing.assert_array_equal(result[10:], np.tile(mean, (6, 1)))


def test_random_tensors_depend_on_their_key_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    first = joined(make_random("w", "F32", (100, 30), (7, 1), 0.5))
    monkeypatch.setattr("llavanext_cli.weights.dtypes.CHUNK_BYTES", 800)
    assert joined(make_random("w", "F32", (100, 30), (7, 1), 0.5)) == first
    assert joined(make_random("w", "F32", (100, 30), (8, 1), 0.5)) != first
    values = np.frombuffer(first, np.float32)
    assert np.abs(values).max() <= 0.5 and abs(values.mean()) < 0.02 and abs(values.std() - 0.5 / 3**0.5) < 0.01
    # The same numbers on every machine and in every version: a checkpoint made of a seed can be made again.
    assert hashlib.sha256(first).hexdigest()[:16] == "2b6a18b479404b81"


@pytest.mark.parametrize("strides", [(1, 4), (8, 2), (0, 1)])
def test_strided_tensors_are_gathered(strides: tuple[int, int], tmp_path: Path) -> None:
    base = np.arange(100, dtype=np.float32)
    (tmp_path / "x").write_bytes(b"#" + base.tobytes())
    spec = TensorSpec("w", "F32", (3, 4), tmp_path / "x", 1 + 4 * 5, 48, strides)
    expected = np.lib.stride_tricks.as_strided(base[5:], (3, 4), tuple(4 * s for s in strides))
    piece = gather_strided(spec)
    assert isinstance(piece, Made) and b"".join(map(bytes, piece.chunks())) == expected.tobytes()


def test_arrays_that_are_not_contiguous_keep_their_order() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3).T
    assert bytes(to_bytes(array)) == array.copy().tobytes()
