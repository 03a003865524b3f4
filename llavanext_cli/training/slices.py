"""Checkpoints of a run whose parameters are sliced over devices: every worker writes its slices, the first joins them.

Each writes the slices that no device before it has, with the place of each.

    .step-00000016.parts/rank_0.safetensors  rank_0.json  rank_1.safetensors …  ──first worker──▶  step-00000016/
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from llavanext_cli.config.model_folder import read_config
from llavanext_cli.errors import CheckpointError
from llavanext_cli.files import write_whole
from llavanext_cli.weights.dtypes import dtype_of, source_piece, to_bytes
from llavanext_cli.weights.readers import read_safetensors_header
from llavanext_cli.weights.slices import Box, SlicedTensor, SliceLayout, check_tiling
from llavanext_cli.weights.stream import Stream, write_safetensors
from llavanext_cli.weights.tensors import GeneratedBytes, PlannedTensor

WAIT_SECONDS = 1800.0
"""How long the first worker waits for the slices of the others."""
SAME_OUT = "all nodes must see the same --out; see the logs of the workers"
_COUNTERS = {"int32": "I32", "int64": "I64"}

Arrays = Mapping[str, np.ndarray]


def plan_array(name: str, array: np.ndarray) -> PlannedTensor:
    """An array as a tensor to be written."""
    dtype = _COUNTERS.get(str(array.dtype)) or dtype_of(array)
    return PlannedTensor(
        name, dtype, array.shape, (GeneratedBytes(array.nbytes, lambda: iter([to_bytes(array)])),), "training"
    )


def write_slices(
    parts: Path,
    arrays: Arrays,
    whole: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, SliceLayout],
    *,
    rank: int,
    stage: int,
) -> None:
    """Write what this rank holds and no earlier rank of its pipeline stage does, and where each slice belongs.

    Args:
        whole: name → shape before slicing.
        layouts: how each weight is sliced; moments are sliced as their weight is.
        stage: ranks that share a pipeline stage.
    """
    first = rank // stage * stage
    mine: dict[str, tuple[Box, np.ndarray]] = {}
    for name, array in arrays.items():
        shape = whole[name]
        layout = layouts.get(name) or layouts.get(name.partition(".")[2])  # of moments: adam_m.NAME
        cut = layout is not None and array.shape != shape
        box = layout.box(shape, rank) if cut else tuple((0, size) for size in shape)
        if tuple(high - low for low, high in box) != array.shape:
            raise CheckpointError(
                f"{name}: this worker holds {list(array.shape)}, but its strategy says {box}",
                "resume from an earlier checkpoint with --resume, or start again in an empty --out",
            )
        if rank == first or (cut and all(layout.box(shape, other) != box for other in range(first, rank))):
            mine[name] = box, array
    plan = [plan_array(name, array) for name, (_, array) in mine.items()]
    with Stream(sum(tensor.nbytes for tensor in plan)) as stream:
        write_safetensors(parts / f"rank_{rank}.safetensors", plan, stream)
    entries = {name: {"shape": list(whole[name]), "box": box} for name, (box, _) in mine.items()}
    write_whole(parts / f"rank_{rank}.json", json.dumps(entries).encode("utf-8"))  # last: it says that all are written


def wait_for_ranks(parts: Path, ranks: int) -> None:
    """Wait until every rank has written its slices or has failed to.

    Raises:
        CheckpointError: some have failed, or took longer than `WAIT_SECONDS`.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while absent := [rank for rank in range(ranks) if not (parts / f"rank_{rank}.json").is_file()]:
        failed = [rank for rank in absent if (parts / f"rank_{rank}.failed").exists()]
        if failed == absent or time.monotonic() > deadline:
            raise CheckpointError(
                f"{parts}: ranks {absent} did not write their slices",
                SAME_OUT,
            )
        time.sleep(0.2)


def parts_of(folder: Path) -> Path:
    """Where the slices of a folder are until it is written."""
    return folder.with_name(f".{folder.name}.parts")


def join_slices(parts: Path) -> dict[str, PlannedTensor]:
    """The whole tensors of all ranks' slices. Their bytes are read when the tensors are written.

    Raises:
        CheckpointError: the slices of a tensor do not fill it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, dict[Box, Any]] = {}
    for note in sorted(parts.glob("rank_*.json")):
        specs = read_safetensors_header(note.with_suffix(".safetensors"))
        for name, entry in read_config(parts, note.name).items():
            shapes[name] = tuple(entry["shape"])
            box = tuple((low, high) for low, high in entry["box"])
            boxes.setdefault(name, {}).setdefault(box, specs[name])
    joined = {}
    for name, shape in shapes.items():
        check_tiling(name, shape, boxes[name], SAME_OUT)
        dtype = next(iter(boxes[name].values())).dtype
        sliced = SlicedTensor(name, dtype, shape, tuple(sorted(boxes[name].items(), key=lambda part: part[0])))
        pieces = sliced.rows(0, shape[0]) if shape else (source_piece(sliced.parts[0][1]),)
        joined[name] = PlannedTensor(name, dtype, shape, pieces, "training")
    return joined
