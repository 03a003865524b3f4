"""Bytes on disk ↔ NumPy arrays, casts from one floating-point type to another, and tensors that are computed.

bfloat16 is ml_dtypes' type, which MindSpore takes as its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from llavanext_cli.weights.stream import CHUNK_BYTES, read_chunks
from llavanext_cli.weights.tensors import DTYPE_BYTES, FileRange, GeneratedBytes, PlannedTensor, TensorSpec

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray

NUMPY_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_NAMES = {name: dtype for dtype, name in NUMPY_NAMES.items()}
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

LARGEST = {"F16": 65504.0, "BF16": 3.3895313892515355e38}
"""Finite values of the narrow types."""


def dtype_of(array: AnyArray) -> str:
    """The safetensors name of an array's type. A type that weights cannot have is a bug of the caller."""
    name = str(array.dtype)
    if name not in SAFETENSORS_NAMES:
        raise ValueError(f"weights are {', '.join(SAFETENSORS_NAMES)}, not {name}")
    return SAFETENSORS_NAMES[name]


def from_bytes(data: bytes | bytearray | memoryview, stored: str, wanted: str) -> AnyArray:
    """Turn stored bytes into an array.

    Args:
        data: little-endian bytes; the array shares their memory when no cast is needed.
        stored: safetensors type, "F32", "F16" or "BF16".
        wanted: "float32", "float16" or "bfloat16".

    Returns:
        `wanted[n]`, one-dimensional.
    """
    return round_to(np.frombuffer(data, NUMPY_TYPES[stored]), SAFETENSORS_NAMES[wanted])[0]


def to_bytes(array: AnyArray) -> memoryview:
    """The array's bytes in order; copied only when it is not contiguous."""
    return np.ascontiguousarray(array).view(np.uint8).reshape(-1).data


def round_to(array: AnyArray, dtype: str) -> tuple[AnyArray, int]:
    """Cast an array to a floating-point type, rounding to the nearest.

    Returns:
        The array, and how many finite values were clamped to the type's largest finite value.
    """
    target = NUMPY_TYPES[dtype]
    if array.dtype == target:
        return array, 0
    with np.errstate(over="ignore", invalid="ignore"):
        cast = array.astype(target)
    clamped = np.isinf(cast) & np.isfinite(array)
    count = int(np.count_nonzero(clamped))
    if count:
        cast[clamped] = (np.sign(array[clamped].astype(np.float32)) * LARGEST[dtype]).astype(target)
    return cast, count


def cast_tensor(tensor: PlannedTensor, dtype: str, clamped: dict[str, int]) -> PlannedTensor:
    """The same tensor as another type, cast a chunk at a time while it is written.

    Args:
        clamped: gets name → how many values were clamped to the type's largest finite value.
    """
    if tensor.dtype == dtype:
        return tensor

    def chunks(piece: FileRange | GeneratedBytes) -> Iterator[memoryview]:
        for chunk in read_chunks(piece):
            cast, count = round_to(np.frombuffer(chunk, NUMPY_TYPES[tensor.dtype]), dtype)
            if count:
                clamped[tensor.name] = clamped.get(tensor.name, 0) + count
            yield to_bytes(cast)

    def cast_piece(piece: FileRange | GeneratedBytes) -> GeneratedBytes:
        nbytes = piece.nbytes // DTYPE_BYTES[tensor.dtype] * DTYPE_BYTES[dtype]
        return GeneratedBytes(nbytes, lambda: chunks(piece))

    return replace(tensor, dtype=dtype, pieces=tuple(cast_piece(piece) for piece in tensor.pieces))


def grow_rows(tensor: PlannedTensor, rows: int) -> PlannedTensor:
    """A table with more rows: each new one is the mean of the old ones (computed in float64), so that a token that was
    never seen is neither more nor less likely than others."""
    old, width = tensor.shape

    def chunks() -> Iterator[memoryview]:
        total, rest, row = np.zeros(width), b"", width * DTYPE_BYTES[tensor.dtype]
        for chunk in (chunk for piece in tensor.pieces for chunk in read_chunks(piece)):
            data = rest + chunk
            whole = len(data) // row * row  # a chunk may end inside a row
            rest = data[whole:]
            part = np.frombuffer(data[:whole], NUMPY_TYPES[tensor.dtype]).astype(np.float64)
            total += part.reshape(-1, width).sum(axis=0)
        mean, _ = round_to((total / old).astype(np.float32), tensor.dtype)
        for _ in range(rows - old):
            yield to_bytes(mean)

    added = GeneratedBytes((rows - old) * width * DTYPE_BYTES[tensor.dtype], chunks)
    origin = f"{tensor.origin} + {rows - old} rows of their mean"
    return replace(tensor, shape=(rows, width), pieces=(*tensor.pieces, added), origin=origin)


def generate_random(name: str, dtype: str, shape: tuple[int, ...], key: tuple[int, ...], bound: float) -> PlannedTensor:
    """A tensor of uniform values in ±`bound`, the same for the same `key` on every machine (PCG64)."""
    count = math.prod(shape)

    def chunks() -> Iterator[memoryview]:
        generator = np.random.Generator(np.random.PCG64(key))
        for start in range(0, count, CHUNK_BYTES // 8):
            values = generator.random(min(count - start, CHUNK_BYTES // 8), dtype=np.float32) * (2 * bound) - bound
            yield to_bytes(round_to(values.astype(np.float32), dtype)[0])

    return PlannedTensor(name, dtype, shape, (GeneratedBytes(count * DTYPE_BYTES[dtype], chunks),), "random")


def copy_tensor(spec: TensorSpec, name: str, origin: str) -> PlannedTensor:
    """A stored tensor, copied under another name."""
    return PlannedTensor(name, spec.dtype, spec.shape, (source_piece(spec),), origin)


def source_piece(spec: TensorSpec) -> FileRange | GeneratedBytes:
    """A stored tensor's bytes in the order of its shape."""
    return FileRange(spec.path, spec.offset, spec.nbytes) if spec.strides is None else gather_strided(spec)


def gather_strided(spec: TensorSpec) -> GeneratedBytes:
    """The elements of a tensor that is stored transposed, or as a part of a larger one, in the order of its shape."""
    assert spec.strides is not None
    size, strides = DTYPE_BYTES[spec.dtype], spec.strides
    reach = 1 + sum((n - 1) * step for n, step in zip(spec.shape, strides, strict=True))

    def chunks() -> Iterator[memoryview]:
        if not spec.nbytes:
            return
        stored = np.memmap(spec.path, f"V{size}", "r", spec.offset, (reach,))
        steps = tuple(step * size for step in strides)
        view = np.atleast_1d(np.lib.stride_tricks.as_strided(stored, spec.shape, steps, writeable=False))
        height = max(1, CHUNK_BYTES // max(1, spec.nbytes // len(view)))
        for row in range(0, len(view), height):
            yield to_bytes(view[row : row + height])

    return GeneratedBytes(spec.nbytes, chunks)
