"""What every file of this package talks about: a tensor in a file, and a tensor that will be written to one.

TensorSpec      where a header says that a tensor is
PlannedTensor   a tensor to write, as pieces in order: FileRange (copied) or GeneratedBytes (computed meanwhile)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Sizes of the element types that can be read, under their safetensors names."""
WEIGHT_DTYPES = ("F32", "F16", "BF16")
"""Types a parameter may have."""

LISTED = 20
"""Most lines of one kind in an error."""


@dataclass(frozen=True)
class TensorSpec:
    """One tensor in a file.

    Attributes:
        dtype: safetensors name, such as "BF16".
        offset: first byte, counted from the file's start.
        nbytes: of the elements.
        strides: in elements, when the elements are not stored in the order of the shape; torch's pickles allow that.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


@dataclass(frozen=True)
class FileRange:
    """Bytes `offset` to `offset + nbytes` of a file."""

    path: Path
    offset: int
    nbytes: int


@dataclass(frozen=True)
class GeneratedBytes:
    """Bytes that are computed while they are written: `chunks()` yields `nbytes` bytes in all.

    A chunk is hashed in another thread while the next is computed, so its memory must not be reused.
    """

    nbytes: int
    chunks: Callable[[], Iterator[memoryview]]


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor to be written.

    Attributes:
        dtype: safetensors name.
        pieces: in order; together the bytes of the shape.
        origin: its source, in words.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[FileRange | GeneratedBytes, ...]
    origin: str = ""

    def __post_init__(self) -> None:
        planned = sum(piece.nbytes for piece in self.pieces)
        if planned != self.nbytes:
            raise ValueError(f"{self.name}: {planned} bytes planned for {self.dtype}{list(self.shape)}")

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]
