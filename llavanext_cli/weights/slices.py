"""A tensor that several ranks saved in slices, put together again without loading it.

    grid [4, 2]           8 ranks as a grid, the last axis fastest: rank 5 is at (2, 1)
    tensor_map [-1, 0]    axis 0 is whole; axis 1 is cut along the grid's last axis (counted from the right)
    optimizer shard       axis 0 of that slice is cut once more, among `size` ranks that are `step` apart

Every slice is a box in the whole tensor. The boxes must tile it; a byte of the result is a byte of one slice.

Source: mindspore/parallel/_tensor.py.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.stream import CHUNK_BYTES
from llavanext_cli.weights.tensors import DTYPE_BYTES, FileRange, GeneratedBytes, TensorSpec

Box = tuple[tuple[int, int], ...]
"""Start and end along each axis."""


@dataclass(frozen=True)
class SliceLayout:
    """How one parameter is cut. `tensor_map` has for each axis the grid's axes (from the right) that cut it."""

    grid: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    optimizer_step: int = 0
    optimizer_size: int = 0

    def box(self, shape: Sequence[int], rank: int) -> Box:
        """Where the slice of `rank` is in a tensor of `shape`. Raises ValueError when it cannot be cut so."""
        local = rank % math.prod(self.grid)
        position = np.unravel_index(local, self.grid)
        box, parts = [], 1
        for size, axes in zip(shape, self.tensor_map, strict=True):
            count, index = 1, 0
            for axis in axes:
                length = self.grid[len(self.grid) - 1 - axis]
                index = index * length + int(position[len(self.grid) - 1 - axis])
                count *= length
            parts *= count
            box.append(_cut(0, size, count, index))
        if self.optimizer_size and box:
            count = self.optimizer_size if self.optimizer_size > 0 else math.prod(self.grid) // parts
            box[0] = _cut(*box[0], count, local // max(1, self.optimizer_step) % count)
        return tuple(box)


def _whole(shape: tuple[int, ...]) -> Box:
    return tuple((0, size) for size in shape)


def _cut(start: int, end: int, count: int, index: int) -> tuple[int, int]:
    if (end - start) % count:
        raise ValueError(f"{end - start} cannot be cut into {count}")
    length = (end - start) // count
    return start + index * length, start + (index + 1) * length


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor that is stored in slices.

    Attributes:
        parts: boxes that tile it, in order, each with the place of its bytes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Box, TensorSpec], ...]

    @classmethod
    def of_one(cls, spec: TensorSpec) -> SlicedTensor:
        """A tensor that is stored in one piece."""
        return cls(spec.name, spec.dtype, spec.shape, ((_whole(spec.shape), spec),))

    def rows(self, start: int, end: int) -> tuple[FileRange | GeneratedBytes, ...]:
        """The bytes of rows `start` to `end` (along the first axis), in the order of the whole tensor."""
        pieces: list[FileRange | GeneratedBytes] = []
        for first, last in sorted({box[0] for box, _ in self.parts}):
            begin, stop = max(first, start), min(last, end)
            if begin >= stop:
                continue
            band = [(box, spec) for box, spec in self.parts if box[0] == (first, last)]
            if len(band) == 1:
                spec = band[0][1]
                row = spec.nbytes // (last - first)
                pieces.append(FileRange(spec.path, spec.offset + (begin - first) * row, (stop - begin) * row))
            else:
                pieces.append(self._interleave(band, first, begin, stop))
        return tuple(pieces)

    def _interleave(self, band: list[tuple[Box, TensorSpec]], first: int, begin: int, stop: int) -> GeneratedBytes:
        """Rows whose columns come from several slices, joined some rows at a time."""
        rest = self.shape[1:]
        kind = np.dtype(f"V{DTYPE_BYTES[self.dtype]}")
        row_bytes = math.prod(rest) * kind.itemsize
        height = max(1, CHUNK_BYTES // max(1, row_bytes))

        def chunks() -> Iterator[memoryview]:
            stored = [(box, np.memmap(spec.path, kind, "r", spec.offset, spec.shape)) for box, spec in band]
            for row in range(begin, stop, height):
                end = min(row + height, stop)
                block = np.empty((end - row, *rest), kind)
                for box, rows in stored:
                    window = (slice(None), *(slice(*span) for span in box[1:]))
                    block[window] = rows[row - first : end - first]
                yield block.view(np.uint8).reshape(-1).data

        return GeneratedBytes((stop - begin) * row_bytes, chunks)


def join_slices(
    name: str, shape: tuple[int, ...], slices: Mapping[int, TensorSpec], layouts: Mapping[int, SliceLayout | None]
) -> SlicedTensor:
    """Find where each rank's slice of one parameter belongs.

    Args:
        shape: of the whole tensor.
        slices: rank → its slice, for the ranks that have one.
        layouts: rank → how the parameter is cut there; None when it is not cut.

    Raises:
        CheckpointError: a slice has another shape than its layout implies, the slices leave a part open or overlap, or
            they have different types.
    """
    parts: dict[Box, TensorSpec] = {}
    for rank, spec in sorted(slices.items()):
        layout = layouts.get(rank)
        try:
            box = layout.box(shape, rank) if layout else _whole(shape)
        except ValueError as error:
            raise CheckpointError(
                f"{name}: the strategy of rank {rank} does not fit {list(shape)}: {error}",
                "name a folder with the slices and the strategy files of one run",
            ) from error
        lengths = tuple(high - low for low, high in box)
        if lengths != spec.shape:
            raise CheckpointError(
                f"{name}: rank {rank} holds {list(spec.shape)}, but its strategy says {list(lengths)}",
                "name a folder with rank_*/ and the strategy files of one run",
            )
        parts.setdefault(box, spec)  # ranks that hold the same box are copies of each other
    check_tiling(name, shape, parts, "copy the folders of all ranks of one run into one place first")
    dtypes = sorted({spec.dtype for spec in slices.values()})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{name}: the slices have different types ({', '.join(dtypes)})",
            "name a folder that holds the slices of one run alone",
        )
    return SlicedTensor(name, dtypes[0], shape, tuple(sorted(parts.items(), key=lambda part: part[0])))


def check_tiling(name: str, shape: tuple[int, ...], boxes: Collection[Box], hint: str) -> None:
    """Compare different boxes with the tensor that they should fill.

    Raises:
        CheckpointError: they leave a part of it open, or overlap.
    """
    if _is_tiled(shape, boxes):
        return
    covered = sum(math.prod(high - low for low, high in box) for box in boxes)
    what = f"{covered} of {math.prod(shape)} elements are in the slices"
    if covered == math.prod(shape):
        what = "some slices overlap"
    raise CheckpointError(f"{name}: {what}", hint)


def _is_tiled(shape: tuple[int, ...], boxes: Collection[Box]) -> bool:
    """Whether boxes fill a tensor once: bands follow each other along the first axis, and each band is filled."""
    if not shape:
        return len(boxes) == 1
    bands: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        bands.setdefault(box[0], []).append(box[1:])
    spans = sorted(bands)
    edges = [0, *(high for _, high in spans)]
    follows = edges[:-1] == [low for low, _ in spans] and edges[-1] == shape[0]
    return follows and all(_is_tiled(shape[1:], band) for band in bands.values())
