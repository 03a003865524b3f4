"""Bytes on disk ↔ NumPy arrays, and from one floating-point type to another.

NumPy has no bfloat16. Its bits are the upper half of a float32's, so widening is a shift, exact for every value, and
narrowing rounds to the nearest, ties to even, as IEEE 754 and torch do.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.weights.headers import DTYPE_BYTES, TensorSpec
from llavanext_cli.weights.stream import Made

if TYPE_CHECKING:
    from collections.abc import Buffer, Iterator

CHUNK_BYTES = 2 << 20
NUMPY_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
SAFETENSORS_NAMES = {name: dtype for dtype, name in NUMPY_NAMES.items()}
FLOAT16_MAX = float(np.finfo(np.float16).max)


def from_bytes(data: Buffer, stored: str, wanted: str) -> np.ndarray:
    """Turn stored bytes into an array.

    Args:
        data: little-endian bytes; the array shares their memory when no conversion is needed.
        stored: safetensors type, "F32", "F16" or "BF16".
        wanted: "float32", "float16" or "bfloat16".

    Returns:
        `wanted[n]`, one-dimensional.
    """
    raw = np.frombuffer(data, {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}[stored])
    if NUMPY_NAMES[stored] == wanted:
        return raw.view(bfloat16()) if stored == "BF16" else raw
    wide = widen(raw, stored)
    if wanted == "float32":
        return wide
    narrow, _ = narrow_to(wide, SAFETENSORS_NAMES[wanted])
    return narrow.view(bfloat16()) if wanted == "bfloat16" else narrow


def widen(raw: np.ndarray, stored: str) -> np.ndarray:
    """`uint16[n]` (BF16), `float16[n]` or `float32[n]` → `float32[n]`, exactly."""
    if stored == "BF16":
        return (raw.astype(np.uint32) << 16).view(np.float32)
    return raw.astype(np.float32, copy=False)


def narrow_to(wide: np.ndarray, dtype: str) -> tuple[np.ndarray, int]:
    """Round `float32[n]` to a narrower type.

    Returns:
        `uint16[n]` bits (BF16), `float16[n]` or `float32[n]`; and how many finite values were too large for the type
        and became its largest value.
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


def bfloat16() -> np.dtype:
    """NumPy's view of bfloat16, registered by MindSpore."""
    from mindspore.common import np_dtype

    return np.dtype(np_dtype.bfloat16)


def dtype_of(array: np.ndarray) -> str:
    """The safetensors name of an array's type. A type that weights cannot have is a bug of the caller."""
    name = str(array.dtype)
    if name not in SAFETENSORS_NAMES:
        raise ValueError(f"weights are {', '.join(SAFETENSORS_NAMES)}, not {name}")
    return SAFETENSORS_NAMES[name]


def to_bytes(array: np.ndarray) -> memoryview:
    """The array's bytes in order; copied only when it is not contiguous."""
    return memoryview(np.ascontiguousarray(array).view(np.uint8).reshape(-1))


def gather_strided(spec: TensorSpec) -> Made:
    """The elements of a tensor that is stored transposed, or as a part of a larger one, in the order of its shape."""
    size = DTYPE_BYTES[spec.dtype]
    reach = 1 + sum((n - 1) * step for n, step in zip(spec.shape, spec.strides, strict=True))

    def chunks() -> Iterator[memoryview]:
        if not spec.nbytes:
            return
        stored = np.memmap(spec.path, f"V{size}", "r", spec.offset, (reach,))
        steps = tuple(step * size for step in spec.strides)
        view = np.lib.stride_tricks.as_strided(stored, spec.shape, steps, writeable=False)
        rows = view.reshape(1) if view.ndim == 0 else view
        height = max(1, CHUNK_BYTES // max(1, spec.nbytes // len(rows)))
        for row in range(0, len(rows), height):
            yield memoryview(np.ascontiguousarray(rows[row : row + height]).view(np.uint8).reshape(-1))

    return Made(spec.nbytes, chunks)
