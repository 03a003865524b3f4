"""Bytes on their way: written, hashed, divided over files, and cut into MindSpore's slices."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.ckpt_format import read_ckpt_header, write_ckpt
from llavanext_cli.weights.protobuf import read_fields, read_numbers, write_delimited, write_varint
from llavanext_cli.weights.readers import read_safetensors_header
from llavanext_cli.weights.stream import Stream, digest_pieces, plan_shards, write_safetensors
from llavanext_cli.weights.tensors import FileRange, GeneratedBytes, PlannedTensor

ARRAYS = {
    "half": np.arange(7, dtype=np.float16),
    "wide": np.arange(500, dtype=np.float32).reshape(50, 10),
    "none": np.zeros((0, 4), np.float32),
    "last": np.arange(33, dtype=np.float16),
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavanext_cli.weights.stream.CHUNK_BYTES", 64)


def tensors_of(tmp_path: Path, arrays: dict[str, np.ndarray]) -> list[PlannedTensor]:
    planned = []
    for name, array in arrays.items():
        path = tmp_path / f"{name}.raw"
        path.write_bytes(b"skip" + array.tobytes())
        dtype = {"float32": "F32", "float16": "F16"}[str(array.dtype)]
        planned.append(PlannedTensor(name, dtype, array.shape, (FileRange(path, 4, array.nbytes),)))
    return planned


def test_tensors_are_written_and_hashed(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    total = sum(a.nbytes for a in ARRAYS.values())
    with Stream(total, lambda done, of: seen.append((done, of))) as stream:
        digests = write_safetensors(tmp_path / "x.safetensors", tensors_of(tmp_path, ARRAYS), stream)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == ARRAYS.keys()
    assert read_safetensors_header(tmp_path / "x.safetensors")["wide"].offset % 8 == 0
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert digests[name] == hashlib.sha256(array.tobytes()).hexdigest()
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) > 30


def test_a_source_that_shrinks_is_an_error(tmp_path: Path) -> None:
    (planned,) = tensors_of(tmp_path, {"w": ARRAYS["wide"]})
    (tmp_path / "w.raw").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"w\.raw: ended 1999 bytes early"), Stream(0) as stream:
        write_safetensors(tmp_path / "x", [planned], stream)


def test_a_plan_whose_bytes_do_not_add_up_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes planned"):
        PlannedTensor("w", "F32", (2,), (FileRange(tmp_path, 0, 4),))


def test_shards_keep_the_order_and_the_limit() -> None:
    def planned(name: str, size: int) -> PlannedTensor:
        return PlannedTensor(name, "F32", (size,), (GeneratedBytes(4 * size, lambda: iter(())),))

    tensors = [planned(str(i), size) for i, size in enumerate([3, 3, 9, 1])]
    assert [[t.name for t in shard] for shard in plan_shards(tensors, 24)] == [["0", "1"], ["2"], ["3"]]


# ------------------------------------------------------------------------------------------------------------ .ckpt


def test_ckpt_files_are_cut_into_slices_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavanext_cli.weights.ckpt_format.SLICE_BYTES", 300)
    arrays = {name: array for name, array in ARRAYS.items() if array.size}
    with Stream(0) as stream:
        digests = write_ckpt(tmp_path / "x.ckpt", tensors_of(tmp_path, arrays), stream)
        pieces = read_ckpt_header(tmp_path / "x.ckpt")
        assert [len(pieces[name]) for name in arrays] == [1, 7, 1]
        assert {name: digest_pieces(piece, stream) for name, piece in pieces.items()} == digests


@pytest.mark.parametrize("cut", [1, 10, 40, 2000])
def test_a_truncated_ckpt_file_is_refused(cut: int, tmp_path: Path) -> None:
    with Stream(0) as stream:
        write_ckpt(tmp_path / "x.ckpt", tensors_of(tmp_path, {"w": ARRAYS["wide"]}), stream)
    raw = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(raw[:-cut])
    with pytest.raises(CheckpointError, match=r"damaged \.ckpt file"):
        read_ckpt_header(tmp_path / "x.ckpt")


def test_numbers_are_signed_and_may_be_packed() -> None:
    assert [write_varint(n) for n in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\x01", b"\xac\x02"]
    packed = write_delimited(1, write_varint(5) + write_varint((1 << 64) - 1))
    assert read_numbers(packed, range(len(packed)), 1) == [5, -1]
    assert list(read_fields(write_varint(2 << 3) + write_varint((1 << 64) - 3))) == [(2, -3)]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80))
def test_any_message_is_read_or_refused(data: bytes) -> None:
    try:
        values = [value for _, value in read_fields(data)]
        numbers = [n for value in values if isinstance(value, range) for n in read_numbers(data, value, 1)]
    except ValueError:
        return
    assert len(values) + sum(len(value) for value in values if isinstance(value, range)) <= len(data)
    assert len(numbers) <= len(data) and all(-(1 << 63) <= number < 1 << 63 for number in numbers)
