"""The folder of a distributed run: which files each rank saved, and how MindSpore cut each parameter.

    rank_R/NAME-EPOCH_STEP.safetensors      what rank R held
    strategy/…strategy…rank_R.ckpt          how each parameter was cut, a protocol buffer

Source: mindspore/train/node_strategy_pb2.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Container, Mapping
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import keymap
from llavanext_cli.weights.protobuf import as_range, read_bytes, read_fields, read_numbers
from llavanext_cli.weights.readers import read_safetensors_header
from llavanext_cli.weights.slices import SlicedTensor, SliceLayout, join_slices
from llavanext_cli.weights.tensors import TensorSpec
from llavanext_cli.weights.untrusted import cannot_read, open_regular

STRATEGY_LIMIT = 64 << 20


_RANK = re.compile(r"rank_(0|[1-9][0-9]*)\Z")
_STEP = re.compile(r"-(\d+)_(\d+)\.safetensors\Z")


@dataclass(frozen=True)
class DistributedRun:
    """What the ranks of a run saved.

    Attributes:
        parameters: by name.
        dropped: (name, reason) of what is not a weight.
        step: which step was read, in words.
    """

    parameters: dict[str, SlicedTensor]
    dropped: tuple[tuple[str, str], ...]
    step: str


def read_distributed(folder: Path, expected: Mapping[str, tuple[int, ...]]) -> DistributedRun:
    """Find every parameter of a distributed run.

    Args:
        folder: of the run.
        expected: name → whole shape of the parameters of the model.

    Raises:
        CheckpointError: parameters are missing or unknown, or their slices do not fit together.
    """
    ranks = find_ranks(folder)
    if not ranks:
        raise CheckpointError(
            f"{folder}: no rank_*/ folders that hold *.safetensors", "name the folder that the ranks saved into"
        )
    files, step = _pick_files(ranks)
    strategies = {rank: read_strategy(path) for rank, path in _find_strategies(ranks).items()}
    slices: dict[str, dict[int, TensorSpec]] = {}
    for rank, file in files.items():
        for name, spec in read_safetensors_header(file).items():
            slices.setdefault(name, {})[rank] = spec
    missing = [name for name in expected if name not in slices]
    extra = {name: _drop_reason(name, slices[name], expected) for name in sorted(slices.keys() - expected.keys())}
    unknown = [name for name, reason in extra.items() if not reason]
    if missing or unknown:
        raise CheckpointError(
            f"{folder}: {len(missing)} weights are missing and {len(unknown)} unknown",
            "add --like CHECKPOINT, the checkpoint that this run began with",
            [
                *(f"missing: {name}" for name in keymap.fold_names(missing)),
                *(f"unknown: {name}" for name in keymap.fold_names(unknown)),
            ],
        )
    parameters = {}
    for name, shape in expected.items():
        layouts = {rank: strategies.get(rank, {}).get(name) for rank in files}
        parameters[name] = join_slices(name, shape, slices[name], layouts)
    return DistributedRun(parameters, tuple(extra.items()), f"slices of {len(ranks)} ranks, {step}")


def _drop_reason(name: str, slices: Mapping[int, TensorSpec], expected: Container[str]) -> str:
    """Why something that is not a weight is left out, or nothing when it is unknown."""
    if name.partition(".")[2] in expected:
        return "state of the optimizer"
    if keymap.is_cache(name):
        return "the KV cache, which is not a weight"
    return "a counter of the run" if math.prod(next(iter(slices.values())).shape) == 1 else ""


def find_ranks(folder: Path) -> dict[int, Path]:
    """Rank → its folder, when this is the folder of a distributed run; else nothing."""
    for place in (folder, folder / "checkpoint"):
        if place.is_dir():
            found = {int(m[1]): path for path in place.iterdir() if path.is_dir() and (m := _RANK.match(path.name))}
            if any(next(path.glob("*.safetensors"), None) for path in found.values()):
                return found
    return {}


def _pick_files(ranks: Mapping[int, Path]) -> tuple[dict[int, Path], str]:
    """Rank → its file of the last step that all ranks have; and that step in words."""
    place = next(iter(ranks.values())).parent
    if len(ranks) <= max(ranks):
        absent = next(rank for rank in range(len(ranks)) if rank not in ranks)
        raise CheckpointError(f"{place}: no folder for rank {absent}", "copy the folders of all ranks into this folder")
    steps: dict[int, dict[tuple[int, int], Path]] = {}
    for rank, folder in ranks.items():
        files = sorted(folder.glob("*.safetensors"))
        steps[rank] = {(int(m[1]), int(m[2])): file for file in files if (m := _STEP.search(file.name))}
        if not steps[rank] and len(files) == 1:
            steps[rank] = {(0, 0): files[0]}
    common = set.intersection(*(set(found) for found in steps.values()))
    if not common:
        raise CheckpointError(
            f"{place}: no step was saved by all {len(ranks)} ranks",
            "name a run of which every rank saved the same step",
        )
    last = max(common)
    return {rank: found[last] for rank, found in steps.items()}, f"epoch {last[0]}, step {last[1]}"


def _find_strategies(ranks: Mapping[int, Path]) -> dict[int, Path]:
    """Rank → its strategy file, if there is one: beside the ranks' folders, or in `strategy/` there or above."""
    place = ranks[0].parent
    for folder in (place / "strategy", place.parent / "strategy", place, place.parent):
        if found := {r: path for r in ranks for path in sorted(folder.glob(f"*strategy*rank_{r}.ckpt"))[:1]}:
            return found
    return {}


# --------------------------------------------------------------------------------------- how parameters were cut


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
            f"{path}: not a strategy file of MindSpore, or damaged ({error})", "copy the run's folder again"
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
    if not grid or min(grid) < 1 or any(axis >= len(grid) for axis in used):
        raise ValueError("a layout outside its grid")
    if len(set(used)) < len(used):
        raise ValueError("an axis of the grid cuts twice")
    return SliceLayout(grid, tensor_map, numbers.get(6, 0), numbers.get(7, 0))
