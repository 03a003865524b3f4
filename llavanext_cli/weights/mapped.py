"""A checkpoint's weights where they lie on the disk: memory-mapped, and widened to float32 when they are needed.

    float32             used from the mapped file; no copy
    bfloat16, float16   widened into a buffer, a group of tensors at a time; `prefetch` does it in another thread

Mapped pages belong to the page cache: they come back from the disk when memory was short in between.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.weights.dtypes import NUMPY_TYPES

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, Float32Array
    from llavanext_cli.weights.checkpoint import Checkpoint

Part = tuple[int, int, int]
"""Axis, and the first and last element (excluded) of a slice along it."""


class MappedWeights:
    """The weights of a checkpoint as MindSpore tensors of float32.

    Args:
        checkpoint: opened checkpoint folder.
        parts: name → the slice of a weight that this worker keeps; whole where a name is missing.
        keep_wide: widen every half-precision weight once, and keep it.
    """

    def __init__(self, checkpoint: Checkpoint, parts: dict[str, Part] | None = None, keep_wide: bool = False):
        self.specs, self.parts, self.keep_wide = checkpoint.parameters, parts or {}, keep_wide
        self._files: dict[Any, AnyArray] = {}
        self._kept: dict[str, Any] = {}
        self._buffers: dict[Any, tuple[Float32Array, Any]] = {}  # and each one's tensor
        self._thread = ThreadPoolExecutor(1)
        self._coming: tuple[tuple[str, ...], Future[list[Any]]] | None = None
        self._turn = 0

    def stored(self, name: str) -> AnyArray:
        """A weight as it is stored, mapped."""
        spec = self.specs[name]
        if spec.path not in self._files:
            self._files[spec.path] = np.memmap(spec.path, np.uint8, mode="r")
        data = self._files[spec.path][spec.offset : spec.offset + spec.nbytes]
        array = data.view(NUMPY_TYPES[spec.dtype]).reshape(spec.shape)
        if name not in self.parts:
            return array
        axis, begin, end = self.parts[name]
        return array[begin:end] if axis == 0 else array[:, begin:end]

    def is_wide(self, name: str) -> bool:
        """Whether a weight is used without being widened."""
        return self.specs[name].dtype == "F32"

    def rows(self, name: str, rows: AnyArray) -> Float32Array:
        """Some rows of a weight, `float32[n, ...]`."""
        return widen(self.stored(name)[rows])

    def array(self, name: str) -> Float32Array:
        """A small weight, widened."""
        return widen(self.stored(name))

    def tensor(self, name: str) -> Any:
        """A weight that is kept: mapped, or widened once."""
        from mindspore import Tensor

        if name not in self._kept:
            self._kept[name] = Tensor.from_numpy(np.ascontiguousarray(self.array(name)))
        return self._kept[name]

    def block(self, name: str, begin: int, end: int) -> Any:
        """Rows `begin` to `end` of a weight, valid until the next block of this size; of float32, mapped."""
        from mindspore import Tensor

        if self.is_wide(name):
            return Tensor.from_numpy(self.stored(name)[begin:end])
        return self._widened(self.stored(name)[begin:end], "block")

    def group(self, names: Sequence[str], following: Sequence[str] = ()) -> list[Any]:
        """The weights of one layer; those of the `following` one begin to be widened meanwhile.

        Half-precision weights are in one of two sets of buffers in turn: they are valid until the next call but one.
        """
        if all(self.keep_wide or self.is_wide(name) for name in names):
            return [self.tensor(name) for name in names]
        coming, self._coming = self._coming, None
        # Another group than expected, as after an interrupt: what was widened ahead is dropped with its buffers.
        ready = coming[1] if coming and coming[0] == tuple(names) else self._submit(names)
        tensors = ready.result()
        if following:
            self._coming = tuple(following), self._submit(following)
        return tensors

    def _submit(self, names: Sequence[str]) -> Future[list[Any]]:
        self._turn += 1
        return self._thread.submit(self._widen_group, tuple(names), self._turn % 2)

    def _widen_group(self, names: Sequence[str], side: int) -> list[Any]:
        small = [self.is_wide(name) or len(self.specs[name].shape) < 2 for name in names]
        return [
            self.tensor(name) if is_small else self._widened(self.stored(name), (side, place))
            for place, (name, is_small) in enumerate(zip(names, small, strict=True))
        ]

    def _widened(self, raw: AnyArray, use: Any) -> Any:
        """A half-precision array in the buffer of its shape and use."""
        from mindspore import Tensor

        key = (use, raw.shape)
        if key not in self._buffers:
            buffer = np.zeros(raw.shape, np.float32)
            self._buffers[key] = buffer, Tensor.from_numpy(buffer)
        buffer, tensor = self._buffers[key]
        widen_into(raw, buffer)
        return tensor


def widen(raw: AnyArray) -> Float32Array:
    """`bfloat16`, `float16` or `float32` → `float32`, exactly; float32 is not copied."""
    if raw.dtype == np.float32:
        return raw
    wide = np.zeros(raw.shape, np.float32)
    widen_into(raw, wide)
    return wide


def widen_into(raw: AnyArray, buffer: Float32Array) -> None:
    """Widen into a buffer of the same shape. Of bfloat16 only the upper halves of the floats are written."""
    if raw.dtype == NUMPY_TYPES["BF16"]:
        np.copyto(buffer.view(np.uint16)[..., 1::2], raw.view(np.uint16))
    else:
        np.copyto(buffer, raw)
