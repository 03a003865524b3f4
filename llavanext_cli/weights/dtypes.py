"""Bytes on disk ↔ NumPy arrays, from one floating-point type to another, and tensors that grow or are made anew.

NumPy has no bfloat16. Its bits are the upper half of a float32's, so widening is a shift, exact for every value, and
narrowing rounds to the nearest, ties to even, as IEEE 754 and torch do.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.headers import DTYPE_BYTES, TensorSpec, count_elements
from llavanext_cli.weights.stream import Extent, Made, PlannedTensor

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, Float32Array

CHUNK_BYTES = 1 << 20
NUMPY_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_NAMES = {name: dtype for dtype, name in NUMPY_NAMES.items()}
RAW_TYPES = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
FLOAT16_MAX = float(np.finfo(np.float16).max)


def from_bytes(data: bytes | bytearray | memoryview, stored: str, wanted: str) -> AnyArray:
    """Turn stored bytes into an array.

    Args:
        data: little-endian bytes; the array shares their memory when no conversion is needed.
        stored: safetensors type, "F32", "F16" or "BF16".
        wanted: "float32", "float16" or "bfloat16".

    Returns:
        `wanted[n]`, one-dimensional.
    """
    raw = np.frombuffer(data, RAW_TYPES[stored])
    if NUMPY_NAMES[stored] == wanted:
        return raw.view(bfloat16()) if stored == "BF16" else raw
    wide = widen(raw, stored)
    if wanted == "float32":
        return wide
    narrow, _ = narrow_to(wide, SAFETENSORS_NAMES[wanted])
    return narrow.view(bfloat16()) if wanted == "bfloat16" else narrow


def widen(raw: AnyArray, stored: str) -> Float32Array:
    """`uint16[n]` (BF16), `float16[n]` or `float32[n]` → `float32[n]`, exactly."""
    if stored == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def narrow_to(wide: Float32Array, dtype: str) -> tuple[AnyArray, int]:
    """Round `float32[n]` to a narrower type.

    Returns:
        `uint16[n]` bits (BF16), `float16[n]` or `float32[n]`; and how many finite values were clamped to the type's
        largest finite value.
    """
    if dtype == "F32":
        return wide, 0
    if dtype == "F16":
        over = np.isfinite(wide) & (np.abs(wide) > FLOAT16_MAX)
        count = int(np.count_nonzero(over))
        if count:
            wide = np.where(over, np.copysign(np.float32(FLOAT16_MAX), wide), wide)
        return wide.astype(np.float16), count
    bits = np.ascontiguousarray(wide).view(np.uint32)
    rounded = bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)
    # Adding could carry a NaN's bits into infinity, and the largest finite floats round up to it.
    special = (bits & 0x7F800000) == 0x7F800000
    over = ~special & ((rounded & 0x7F800000) == 0x7F800000)
    rounded = np.where(special, bits | ((bits & 0x007FFFFF != 0) * np.uint32(0x00400000)), rounded)
    rounded = np.where(over, (bits & 0x80000000) | np.uint32(0x7F7F0000), rounded)
    return (rounded >> 16).astype(np.uint16), int(np.count_nonzero(over))


def bfloat16() -> np.dtype[Any]:
    """NumPy's view of bfloat16, registered by MindSpore."""
    from mindspore.common import np_dtype

    return np.dtype(np_dtype.bfloat16)


def dtype_of(array: AnyArray) -> str:
    """The safetensors name of an array's type. A type that weights cannot have is a bug of the caller."""
    name = str(array.dtype)
    if name not in SAFETENSORS_NAMES:
        raise ValueError(f"weights are {', '.join(SAFETENSORS_NAMES)}, not {name}")
    return SAFETENSORS_NAMES[name]


def to_bytes(array: AnyArray) -> memoryview:
    """The array's bytes in order; copied only when it is not contiguous."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def gather_strided(spec: TensorSpec) -> Made:
    """The elements of a tensor that is stored transposed, or as a part of a larger one, in the order of its shape."""
    assert spec.strides is not None
    size, strides = DTYPE_BYTES[spec.dtype], spec.strides
    reach = 1 + sum((n - 1) * step for n, step in zip(spec.shape, strides, strict=True))

    def chunks() -> Iterator[memoryview]:
        if not spec.nbytes:
            return
        stored = np.memmap(spec.path, f"V{size}", "r", spec.offset, (reach,))
        steps = tuple(step * size for step in strides)
        view = np.lib.stride_tricks.as_strided(stored, spec.shape, steps, writeable=False)
        rows = view.reshape(1) if view.ndim == 0 else view
        height = max(1, CHUNK_BYTES // max(1, spec.nbytes // len(rows)))
        for row in range(0, len(rows), height):
            yield to_bytes(rows[row : row + height])

    return Made(spec.nbytes, chunks)


def read_chunks(piece: Extent | Made) -> Iterator[memoryview]:
    """The bytes of a piece, each chunk in memory of its own and a whole number of elements."""
    if isinstance(piece, Made):
        yield from piece.chunks()
        return
    with open(piece.path, "rb", buffering=0) as file:
        offset, end = piece.offset, piece.offset + piece.nbytes
        while offset < end:
            data = os.pread(file.fileno(), min(CHUNK_BYTES, end - offset), offset)
            if not data:
                raise CheckpointError(
                    f"{piece.path}: ended {end - offset} bytes early; it changed while it was read",
                    "Let nothing write to the source, and run the same command again.",
                )
            # A short read may end inside an element; the rest is read again.
            data = data[: len(data) // 8 * 8] if len(data) >= 8 and offset + len(data) < end else data
            offset += len(data)
            yield memoryview(data)


def cast_tensor(tensor: PlannedTensor, dtype: str, tally: dict[str, int]) -> PlannedTensor:
    """The same tensor as another type, converted a chunk at a time while it is written. `tally` collects name → how
    many values were clamped to the type's largest finite value."""
    if tensor.dtype == dtype:
        return tensor

    def chunks(piece: Extent | Made) -> Iterator[memoryview]:
        for chunk in read_chunks(piece):
            raw = np.frombuffer(chunk, RAW_TYPES[tensor.dtype])
            narrow, lost = narrow_to(widen(raw, tensor.dtype), dtype)
            if lost:
                tally[tensor.name] = tally.get(tensor.name, 0) + lost
            yield to_bytes(narrow)

    def cast(piece: Extent | Made) -> Made:
        nbytes = piece.nbytes // DTYPE_BYTES[tensor.dtype] * DTYPE_BYTES[dtype]
        return Made(nbytes, lambda: chunks(piece))

    return replace(tensor, dtype=dtype, pieces=tuple(cast(piece) for piece in tensor.pieces))


def grow_rows(tensor: PlannedTensor, rows: int) -> PlannedTensor:
    """A table with more rows: each new one is the mean of the old ones (computed in float64), so that a token that was
    never seen is neither more nor less likely than others."""
    old, width = tensor.shape
    size = DTYPE_BYTES[tensor.dtype]

    def chunks() -> Iterator[memoryview]:
        total = np.zeros(width)
        rest = b""
        for piece in tensor.pieces:
            for chunk in read_chunks(piece):
                data = rest + bytes(chunk)
                whole = len(data) // (width * size) * (width * size)
                rest = data[whole:]
                raw = np.frombuffer(data[:whole], RAW_TYPES[tensor.dtype])
                total += widen(raw, tensor.dtype).reshape(-1, width).sum(axis=0, dtype=np.float64)
        mean, _ = narrow_to((total / old).astype(np.float32), tensor.dtype)
        for _ in range(rows - old):
            yield to_bytes(mean)

    added = Made((rows - old) * width * size, chunks)
    origin = f"{tensor.origin} + {rows - old} rows of their mean"
    return replace(tensor, shape=(rows, width), pieces=(*tensor.pieces, added), origin=origin)


def make_random(name: str, dtype: str, shape: tuple[int, ...], key: tuple[int, ...], bound: float) -> PlannedTensor:
    """A tensor of uniform values in ±`bound`, the same for the same `key` on every machine (PCG64)."""
    count = count_elements(shape)

    def chunks() -> Iterator[memoryview]:
        generator = np.random.Generator(np.random.PCG64(key))
        left = count
        while left:
            values = generator.random(min(left, CHUNK_BYTES // 8), dtype=np.float32) * (2 * bound) - bound
            left -= len(values)
            yield to_bytes(narrow_to(values.astype(np.float32), dtype)[0])

    return PlannedTensor(name, dtype, shape, (Made(count * DTYPE_BYTES[dtype], chunks),), "random")
