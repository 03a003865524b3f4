"""The slices that several ranks saved, put together again without loading them.

MindSpore saves what each rank holds, in `rank_R/NAME-EPOCH_STEP.safetensors`, and how it was cut in a strategy file:

    dev_matrix [4, 2]     8 ranks as a grid, the last axis fastest: rank 5 stands at (2, 1)
    tensor_map [-1, 0]    axis 0 is whole; axis 1 is cut along the grid's last axis (counted from the right)
    optimizer shard       axis 0 of that slice is cut once more, among `size` ranks that are `step` apart

Every slice is a box in the whole tensor. The boxes must tile it; a byte of the result is a byte of one slice.

Source: mindspore/train/node_strategy_pb2.py, mindspore/parallel/_tensor.py.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.dtypes import CHUNK_BYTES
from llavanext_cli.weights.headers import (
    DTYPE_BYTES,
    LISTED,
    TensorSpec,
    cannot_read,
    open_regular,
    read_safetensors_header,
)
from llavanext_cli.weights.protobuf import as_range, read_bytes, read_fields, read_numbers
from llavanext_cli.weights.stream import Extent, Made

Box = tuple[tuple[int, int], ...]
"""Start and end along each axis."""
STRATEGY_LIMIT = 64 << 20
MOST_AXES, MOST_RANKS = 32, 1 << 20


@dataclass(frozen=True)
class SliceLayout:
    """How one parameter is cut. `tensor_map` has for each axis the grid's axes (from the right) that cut it."""

    grid: tuple[int, ...]
    tensor_map: tuple[tuple[int, ...], ...]
    optimizer_step: int = 0
    optimizer_size: int = 0

    def box(self, shape: Sequence[int], rank: int) -> Box:
        """Where the slice of `rank` lies in a tensor of `shape`. Raises ValueError when the cut does not come out."""
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


def _cut(start: int, end: int, count: int, index: int) -> tuple[int, int]:
    if (end - start) % count:
        raise ValueError(f"{end - start} cannot be cut into {count}")
    length = (end - start) // count
    return start + index * length, start + (index + 1) * length


def read_strategy(path: Path) -> dict[str, SliceLayout]:
    """Read MindSpore's strategy file: parameter → how it is cut.

    Raises:
        CheckpointError: the file is damaged.
    """
    try:
        with open_regular(path) as file:
            data = file.read(STRATEGY_LIMIT)
        layouts = {}
        for field, item in read_fields(data):
            if field == 3:  # parallel_layout_item
                entry = dict(read_fields(data, item))
                layouts[read_bytes(data, entry[1]).decode()] = _parse_layout(data, as_range(entry[2]))
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, KeyError, IndexError) as error:
        raise CheckpointError(
            f"{path}: not a strategy file of MindSpore, or damaged ({error})", "Copy the run's folder again."
        ) from error
    return layouts


def _parse_layout(data: bytes, where: range) -> SliceLayout:
    fields = list(read_fields(data, where))
    grids = [read_numbers(data, value, 1) for field, value in fields if field == 1]
    maps = [read_numbers(data, value, 1) for field, value in fields if field == 2]
    numbers = {field: value for field, value in fields if isinstance(value, int)}
    # One map lists one grid axis for each tensor axis; several maps are one for each tensor axis.
    axes = [[axis] for axis in maps[0]] if len(maps) == 1 else maps
    grid = tuple(grids[0])
    tensor_map = tuple(tuple(axis for axis in one if axis >= 0) for one in axes)
    used = [axis for one in tensor_map for axis in one]
    valid = 0 < len(grid) <= MOST_AXES and min(grid) > 0 and math.prod(grid) <= MOST_RANKS
    if not valid or any(axis >= len(grid) for axis in used):
        raise ValueError("a layout outside its grid")
    if len(set(used)) < len(used):
        raise ValueError("an axis of the grid cuts twice")
    return SliceLayout(grid, tensor_map, numbers.get(6, 0), numbers.get(7, 0))


# --------------------------------------------------------------------------------------------------- one merged tensor


@dataclass(frozen=True)
class SlicedTensor:
    """A tensor that lies in slices. `parts` tile it; each is a box and where its bytes are. `copies` are slices of the
    same box, which must be equal; the first of each is among the parts."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    parts: tuple[tuple[Box, TensorSpec], ...]
    copies: tuple[tuple[TensorSpec, ...], ...] = ()

    def rows(self, start: int, end: int) -> tuple[Extent | Made, ...]:
        """The bytes of rows `start` to `end` (along the first axis), in the order of the whole tensor."""
        pieces: list[Extent | Made] = []
        for first, last in sorted({box[0] for box, _ in self.parts}):
            begin, stop = max(first, start), min(last, end)
            if begin >= stop:
                continue
            band = [(box, spec) for box, spec in self.parts if box[0] == (first, last)]
            if len(band) == 1:
                spec = band[0][1]
                row = spec.nbytes // (last - first)
                pieces.append(Extent(spec.path, spec.offset + (begin - first) * row, (stop - begin) * row))
            else:
                pieces.append(self._interleave(band, first, begin, stop))
        return tuple(pieces)

    def _interleave(self, band: list[tuple[Box, TensorSpec]], first: int, begin: int, stop: int) -> Made:
        """Rows whose columns come from several slices, joined some rows at a time."""
        rest = self.shape[1:]
        row_bytes = math.prod(rest) * DTYPE_BYTES[self.dtype]
        height = max(1, CHUNK_BYTES // max(1, row_bytes))
        kind = np.dtype(f"V{DTYPE_BYTES[self.dtype]}")

        def chunks() -> Iterator[memoryview]:
            files = {spec.path: open(spec.path, "rb", buffering=0) for _, spec in band}  # noqa: SIM115 - closed below
            try:
                for row in range(begin, stop, height):
                    count = min(height, stop - row)
                    block = np.empty((count, *rest), kind)
                    for box, spec in band:
                        shape = (count, *(high - low for low, high in box[1:]))
                        nbytes = math.prod(shape) * kind.itemsize
                        offset = spec.offset + (row - first) * (nbytes // count)
                        data = os.pread(files[spec.path].fileno(), nbytes, offset)
                        if len(data) != nbytes:
                            raise CheckpointError(
                                f"{spec.path}: ended while it was read",
                                "Let nothing write to the source, and run the same command again.",
                            )
                        window = (slice(None), *(slice(low, high) for low, high in box[1:]))
                        block[window] = np.frombuffer(data, kind).reshape(shape)
                    yield block.view(np.uint8).reshape(-1).data
            finally:
                for file in files.values():
                    file.close()

        return Made((stop - begin) * row_bytes, chunks)


def join_slices(
    name: str, shape: tuple[int, ...], slices: Mapping[int, TensorSpec], layouts: Mapping[int, SliceLayout | None]
) -> SlicedTensor:
    """Find where each rank's slice of one parameter belongs.

    Args:
        shape: of the whole tensor.
        slices: rank → its slice, for the ranks that have one.
        layouts: rank → how the parameter is cut there; None when the strategy says nothing, that is, not at all.

    Raises:
        CheckpointError: a slice has another shape than its layout implies, the slices leave a part open or overlap, or
            they have different types.
    """
    whole = tuple((0, size) for size in shape)
    parts: dict[Box, list[TensorSpec]] = {}
    for rank, spec in sorted(slices.items()):
        layout = layouts.get(rank)
        try:
            box = layout.box(shape, rank) if layout else whole
        except ValueError as error:
            raise CheckpointError(
                f"{name}: the strategy of rank {rank} does not fit {list(shape)}: {error}",
                "Give the slices and the strategy files of one run.",
            ) from error
        lengths = tuple(high - low for low, high in box)
        if lengths != spec.shape:
            raise CheckpointError(
                f"{name}: rank {rank} holds {list(spec.shape)}, and its strategy says {list(lengths)}",
                "Name the run's folder that holds both rank_*/ and the strategy files of the same run.",
            )
        parts.setdefault(box, []).append(spec)  # ranks that hold the same box are copies of each other
    check_tiling(name, shape, parts, "Copy the folders of all ranks of one run into one place first.")
    dtypes = sorted({spec.dtype for spec in slices.values()})
    if len(dtypes) > 1:
        raise CheckpointError(
            f"{name}: the slices have different types ({', '.join(dtypes)})",
            "Name a folder that holds the slices of one run alone.",
        )
    ordered = sorted(parts.items(), key=lambda part: part[0])
    copies = tuple(tuple(same) for _, same in ordered if len(same) > 1)
    return SlicedTensor(name, dtypes[0], shape, tuple((box, same[0]) for box, same in ordered), copies)


def check_tiling(name: str, shape: tuple[int, ...], boxes: Collection[Box], hint: str) -> None:
    """Compare different boxes with the tensor that they should make.

    Raises:
        CheckpointError: they leave a part of it open, or overlap.
    """
    if _is_tiled(shape, boxes):
        return
    covered = sum(math.prod(high - low for low, high in box) for box in boxes)
    what = f"{covered} of {math.prod(shape)} elements are in the slices"
    if covered == math.prod(shape):
        what = "the slices contradict each other: some overlap"
    raise CheckpointError(f"{name}: {what}", hint)


def _is_tiled(shape: tuple[int, ...], boxes: Collection[Box]) -> bool:
    """Whether boxes fill a tensor once: what follows along the first axis does, and each band of it for itself."""
    if not shape:
        return len(boxes) == 1
    bands: dict[tuple[int, int], list[Box]] = {}
    for box in boxes:
        bands.setdefault(box[0], []).append(box[1:])
    spans = sorted(bands)
    edges = [0, *(high for _, high in spans)]
    follows = edges[:-1] == [low for low, _ in spans] and edges[-1] == shape[0]
    return follows and all(_is_tiled(shape[1:], band) for band in bands.values())


# -------------------------------------------------------------------------------------------------- the folder of a run

_STEP = re.compile(r"-(\d+)_(\d+)\.safetensors\Z")


def pick_files(ranks: Mapping[int, Path]) -> tuple[dict[int, Path], str]:
    """Rank → its file of the last step that all ranks have; and that step in words.

    Raises:
        CheckpointError: a rank is missing, or no step is common to all.
    """
    if len(ranks) <= max(ranks):
        absent = [rank for rank in range(min(max(ranks), len(ranks) + LISTED)) if rank not in ranks][:LISTED]
        raise CheckpointError(
            f"{ranks[max(ranks)].parent}: no folders for ranks {absent}", "Copy all ranks' folders here."
        )
    steps: dict[int, dict[tuple[int, int], Path]] = {}
    for rank, folder in ranks.items():
        files = sorted(folder.glob("*.safetensors"))
        steps[rank] = {(int(m[1]), int(m[2])): file for file in files if (m := _STEP.search(file.name))}
        if not steps[rank] and len(files) == 1:
            steps[rank] = {(0, 0): files[0]}
    common = set.intersection(*(set(found) for found in steps.values()))
    if not common:
        raise CheckpointError(
            f"{ranks[0].parent}: no step was saved by all {len(ranks)} ranks", "The run was stopped while it saved."
        )
    last = max(common)
    return {rank: found[last] for rank, found in steps.items()}, f"epoch {last[0]}, step {last[1]}"


def find_strategies(ranks: Mapping[int, Path]) -> dict[int, Path]:
    """Rank → its strategy file, where there is one: beside the ranks' folders, or in `strategy/` there or above."""
    place = ranks[0].parent
    folders = (place / "strategy", place.parent / "strategy", place, place.parent)
    for folder in folders:
        found = {r: p for r in ranks if (p := next(iter(sorted(folder.glob(f"*strategy*rank_{r}.ckpt"))), None))}
        if found:
            return found
    return {}


def read_distributed(folder: Path, ranks: Mapping[int, Path], expected: Mapping[str, tuple[int, ...]]) -> tuple[
    dict[str, SlicedTensor], list[tuple[str, str]], str
]:  # fmt: skip
    """Find every parameter of a distributed run.

    Args:
        folder: of the run, for messages.
        expected: name → whole shape of the parameters of the model.

    Returns:
        Parameters by name; (name, reason) of what is left out; which step was taken.

    Raises:
        CheckpointError: parameters are missing or unknown, or their slices do not fit together.
    """
    files, step = pick_files(ranks)
    strategies = {rank: read_strategy(path) for rank, path in find_strategies(ranks).items()}
    slices: dict[str, dict[int, TensorSpec]] = {}
    for rank, file in files.items():
        for name, spec in read_safetensors_header(file).items():
            slices.setdefault(name, {})[rank] = spec
    dropped, unknown = [], []
    for name in slices.keys() - expected.keys():
        spec = next(iter(slices[name].values()))
        if name.partition(".")[2] in expected:
            dropped.append((name, "state of the optimizer"))
        elif keymap.is_cache(name):
            dropped.append((name, "the KV cache, which is no weight"))
        elif math.prod(spec.shape) == 1:
            dropped.append((name, "a counter of the run"))
        else:
            unknown.append(name)
    missing = [name for name in expected if name not in slices]
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing and {len(unknown)} unknown",
            "Name with --like the checkpoint that this run began with.",
            [
                *(f"missing: {n}" for n in keymap.fold_names(missing)),
                *(f"unknown: {n}" for n in keymap.fold_names(unknown)),
            ],
        )
    merged = {}
    for name, shape in expected.items():
        layouts = {rank: strategies.get(rank, {}).get(name) for rank in files}
        merged[name] = join_slices(name, shape, slices[name], layouts)
    return merged, sorted(dropped), step
