"""Write checkpoints out of a running training: from one worker when all hold the same, or joined from their slices.

On a CPU every worker holds every weight, and the first writes. On Ascend a weight, or its moments, may be cut over the
devices: each writes the slices that no device before it has, with the place of each, and the first puts them together.

    .step-00000016.parts/rank_0.safetensors  rank_0.json  rank_1.safetensors …  ──first worker──▶  step-00000016/
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.errors import CheckpointError
from llavanext_cli.files import write_whole
from llavanext_cli.training.state import save_run_state
from llavanext_cli.weights.adapter import merge_adapter
from llavanext_cli.weights.checkpoint import Checkpoint, save_checkpoint_folder
from llavanext_cli.weights.dtypes import dtype_of, to_bytes
from llavanext_cli.weights.headers import read_json, read_safetensors_header
from llavanext_cli.weights.merge import Box, SlicedTensor, SliceLayout, check_tiling
from llavanext_cli.weights.plan import extent
from llavanext_cli.weights.stream import Made, PlannedTensor, Stream, disk_error, write_safetensors

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Lora

WAIT_SECONDS = 1800.0
"""How long the first worker waits for the slices of the others."""
_COUNTERS = {"int32": "I32", "int64": "I64"}

Arrays = Mapping[str, np.ndarray]


def plan_array(name: str, array: np.ndarray) -> PlannedTensor:
    """An array as a tensor to be written."""
    dtype = _COUNTERS.get(str(array.dtype)) or dtype_of(array)
    return PlannedTensor(name, dtype, array.shape, (Made(array.nbytes, lambda: iter([to_bytes(array)])),), "training")


class CheckpointSaver:
    """Writes checkpoints of one run.

    Args:
        like: the checkpoint the run began with.
        settings: what the run depends on, see `plan.run_settings`.
        rank, ranks: this worker among all.
        whole: name → shape of every parameter, the optimizer's included, before anything is cut.
        layouts: how each weight is cut over the devices, from MindSpore's strategy file; None when nothing is.
        lora: of a run whose low-rank matrices are merged into the weights that are written; None without.
        stage: ranks that share a pipeline stage; all of them without a pipeline.
    """

    def __init__(
        self,
        like: Checkpoint,
        *,
        settings: Mapping[str, Any],
        rank: int,
        ranks: int,
        whole: Mapping[str, tuple[int, ...]],
        layouts: Callable[[], Mapping[str, SliceLayout]] | None = None,
        lora: Lora | None = None,
        stage: int | None = None,
    ):
        self.like, self.settings = like, settings
        self.rank, self.ranks, self.stage = rank, ranks, stage or ranks
        self.whole, self.layouts, self.lora = whole, layouts, lora

    def save(self, folder: Path, arrays: Arrays, step: int, note: Mapping[str, Any], final: bool = False) -> None:
        """Write one checkpoint; every rank calls this with what it holds. The final one has no state: it is done.

        Raises:
            CheckpointError: the disk is full, or a worker did not deliver its slices.
        """
        if self.layouts is None:
            if self.rank == 0:
                self._write(
                    folder, {name: plan_array(name, array) for name, array in arrays.items()}, step, note, final
                )
            return
        parts = parts_of(folder)
        try:
            parts.mkdir(parents=True, exist_ok=True)
            write_slices(parts, arrays, self.whole, self.layouts(), rank=self.rank, stage=self.stage)
        except BaseException as fault:
            self._give_up(parts)
            if isinstance(fault, OSError):
                raise disk_error(parts, fault) from fault
            raise
        if self.rank == 0:
            try:
                wait_for_ranks(parts, self.ranks)
                self._write(folder, join_parts(parts), step, note, final)
            finally:
                shutil.rmtree(parts, ignore_errors=True)

    def _give_up(self, parts: Path) -> None:
        """Say that this rank's slices will not come; the first removes what all have written."""
        with contextlib.suppress(OSError):
            (parts / f"rank_{self.rank}.safetensors").unlink(missing_ok=True)
            (parts / f"rank_{self.rank}.failed").touch()
        if self.rank == 0:
            with contextlib.suppress(CheckpointError):
                wait_for_ranks(parts, self.ranks)
            shutil.rmtree(parts, ignore_errors=True)

    def _write(
        self, folder: Path, tensors: Mapping[str, PlannedTensor], step: int, note: Mapping[str, Any], final: bool
    ) -> None:
        names = self.like.parameters.keys()
        weights = {name: tensors[name] for name in names}
        if self.lora is not None:
            weights |= merge_adapter(tensors, self.lora)
        if final:
            save_checkpoint_folder(folder, weights, like=self.like, extra=dict(note))
            return
        state = [tensor for name, tensor in tensors.items() if name not in names]
        save_run_state(folder, weights, state, self.like, step=step, settings=self.settings, note=note)


def write_slices(
    parts: Path,
    arrays: Arrays,
    whole: Mapping[str, tuple[int, ...]],
    layouts: Mapping[str, SliceLayout],
    *,
    rank: int,
    stage: int,
) -> None:
    """Write what this rank holds and no rank before it in its stage does, and where each slice belongs."""
    first = rank // stage * stage
    mine: dict[str, tuple[Box, np.ndarray]] = {}
    for name, array in arrays.items():
        shape = whole[name]
        # The moments of a weight are cut as the weight is: adam_m.NAME.
        layout = layouts.get(name) or layouts.get(name.partition(".")[2])
        cut = layout is not None and array.shape != shape
        box = layout.box(shape, rank) if cut else tuple((0, size) for size in shape)
        if tuple(high - low for low, high in box) != array.shape:
            raise CheckpointError(
                f"{name}: this worker holds {list(array.shape)}, its strategy says {box}",
                "Start the run again in an empty --out; --resume goes on from an earlier checkpoint.",
            )
        if rank == first or (cut and all(layout.box(shape, other) != box for other in range(first, rank))):
            mine[name] = box, array
    plan = [plan_array(name, array) for name, (_, array) in mine.items()]
    with Stream(sum(tensor.nbytes for tensor in plan)) as stream:
        write_safetensors(parts / f"rank_{rank}.safetensors", plan, stream)
    entries = {name: {"shape": list(whole[name]), "box": box} for name, (box, _) in mine.items()}
    write_whole(parts / f"rank_{rank}.json", json.dumps(entries).encode("utf-8"))  # last: it says that they are there


def wait_for_ranks(parts: Path, ranks: int) -> None:
    """Until every rank has written its slices, or has failed to: then none writes any more.

    Raises:
        CheckpointError: some have failed, or did not come in time.
    """
    deadline = time.monotonic() + WAIT_SECONDS
    while absent := [rank for rank in range(ranks) if not (parts / f"rank_{rank}.json").is_file()]:
        failed = [rank for rank in absent if (parts / f"rank_{rank}.failed").exists()]
        if failed == absent or time.monotonic() > deadline:
            raise CheckpointError(
                f"{parts}: ranks {absent} did not write their slices",
                "All nodes must see the same --out; see the logs of those workers.",
            )
        time.sleep(0.2)


def parts_of(folder: Path) -> Path:
    """Where the slices of a folder to be written lie meanwhile."""
    return folder.with_name(f".{folder.name}.parts")


def join_parts(parts: Path) -> dict[str, PlannedTensor]:
    """Whole tensors of the slices of all ranks; their bytes are read when they are written.

    Raises:
        CheckpointError: the slices of a tensor do not fill it.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    boxes: dict[str, dict[Box, Any]] = {}
    for note in sorted(parts.glob("rank_*.json")):
        specs = read_safetensors_header(note.with_suffix(".safetensors"))
        for name, entry in read_json(note).items():
            shapes[name] = tuple(entry["shape"])
            box = tuple((low, high) for low, high in entry["box"])
            boxes.setdefault(name, {}).setdefault(box, specs[name])
    joined = {}
    for name, shape in shapes.items():
        check_tiling(name, shape, boxes[name], "All nodes must see the same --out; see the logs of the workers.")
        dtype = next(iter(boxes[name].values())).dtype
        sliced = SlicedTensor(name, dtype, shape, tuple(sorted(boxes[name].items(), key=lambda part: part[0])))
        pieces = sliced.rows(0, shape[0]) if shape else (extent(sliced.parts[0][1]),)
        joined[name] = PlannedTensor(name, dtype, shape, pieces, "training")
    return joined
