"""A checkpoint of a run: a complete model folder, and beside it what is needed to continue as if never interrupted.

checkpoints/step-00000016/
    model-….safetensors, config.json, …     what `ask`, `convert` and `train` take
    training/state.safetensors              moments of the optimizer, its counters, LoRA's small matrices
    training/state.json                     step, the settings the run depends on, a digest of every tensor

The folder gets its name when everything in it is on the disk, and every digest is compared before a run is resumed
from it: a checkpoint that is incomplete or was changed is skipped.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.model_folder import read_config
from llavanext_cli.errors import CheckpointError, TrainingError
from llavanext_cli.weights.checkpoint import Checkpoint, open_checkpoint, read_array, save_checkpoint_folder
from llavanext_cli.weights.dtypes import source_piece
from llavanext_cli.weights.folder import write_json
from llavanext_cli.weights.readers import read_safetensors_header
from llavanext_cli.weights.stream import Stream, digest_pieces, write_safetensors
from llavanext_cli.weights.tensors import PlannedTensor, TensorSpec

if TYPE_CHECKING:
    import numpy as np

VERSION = 1
TENSORS = "training/state.safetensors"
NOTE = "training/state.json"
SKIPPED = "`train --resume` continues from the checkpoint before it"


@dataclass(frozen=True)
class RunState:
    """A checkpoint to continue from.

    Attributes:
        model: the folder as a model checkpoint.
        step: optimizer steps that were done.
        settings: what the losses depend on, see `plan.run_settings`.
        tensors: name → position of its bytes; moments are float32, counters int32. `read_exact` reads one.
    """

    model: Checkpoint
    step: int
    settings: dict[str, Any]
    tensors: dict[str, TensorSpec]


def step_folder(checkpoints: Path, step: int) -> Path:
    return checkpoints / f"step-{step:08d}"


def save_run_state(
    folder: Path,
    weights: Mapping[str, PlannedTensor],
    state: Iterable[PlannedTensor],
    base: Checkpoint,
    *,
    step: int,
    settings: Mapping[str, Any],
    note: Mapping[str, Any],
) -> None:
    """Write one checkpoint; it appears whole or not at all, also when power is lost.

    Args:
        folder: its name, such as `checkpoints/step-00000016`.
        weights: every parameter of the model, our names.
        state: what else is needed to continue.
        base: the checkpoint that the run began with.
        note: kept in the model's manifest.

    Raises:
        CheckpointError: the disk is full or cannot be written. Earlier checkpoints stay.
    """
    state = list(state)

    def add_state(temporary: Path) -> None:
        (temporary / TENSORS).parent.mkdir()
        with Stream(sum(tensor.nbytes for tensor in state)) as stream:
            digests = write_safetensors(temporary / TENSORS, state, stream)
        write_json(
            temporary / NOTE,
            {"llavanext_state": VERSION, "step": step, "settings": dict(settings), "sha256": digests},
        )
        _sync(temporary)

    save_checkpoint_folder(folder, weights, base=base, extra=dict(note), also=add_state)
    _sync_one(folder.parent)


def find_run_state(checkpoints: Path) -> tuple[RunState | None, dict[Path, str]]:
    """The newest whole checkpoint, and the newer ones that are damaged: folder → what is wrong."""
    damaged = {}
    for folder in sorted(checkpoints.glob("step-*"), reverse=True):
        try:
            return open_run_state(folder), damaged
        except CheckpointError as fault:
            damaged[folder] = fault.what
    return None, damaged


def open_run_state(folder: Path, compare: bool = True) -> RunState:
    """Open a checkpoint. With `compare` all of it is read, to compare every tensor with its digest.

    Raises:
        CheckpointError: something is missing or was changed.
    """
    if not (folder / NOTE).is_file():
        raise CheckpointError(f"{folder}: {NOTE} is missing, so no run can be resumed from it", SKIPPED)
    note = read_config(folder, NOTE)
    if note.get("llavanext_state") != VERSION:
        raise CheckpointError(f"{folder / NOTE}: not a version that this llavanext reads", SKIPPED)
    model = open_checkpoint(folder)
    tensors = read_safetensors_header(folder / TENSORS)
    digests = note.get("sha256")
    if not isinstance(digests, dict) or digests.keys() != tensors.keys():
        raise CheckpointError(f"{folder / TENSORS}: its tensors are not those that {NOTE} lists", SKIPPED)
    entries = {name: entry["sha256"] for name, entry in model.manifest["tensors"].items()} | digests
    specs = model.parameters | tensors
    if compare:
        with Stream(sum(spec.nbytes for spec in specs.values())) as stream:
            for name, spec in specs.items():
                if digest_pieces((source_piece(spec),), stream) != entries[name]:
                    raise CheckpointError(f"{folder}: {name} is damaged", SKIPPED)
    return RunState(model, int(note["step"]), note["settings"], tensors)


def check_settings(state: RunState, settings: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings than it began with.

    Raises:
        TrainingError: which settings differ, and their two values.
    """
    differing = [
        f"{key}: {state.settings.get(key)} until now, {settings.get(key)} with this command"
        for key in sorted(state.settings.keys() | settings.keys())
        if state.settings.get(key) != settings.get(key)
    ]
    if differing:
        raise TrainingError(
            f"{state.model.folder.parents[1]} was started with other settings",
            hint="resume with the settings it was started with, or start a new run in another --out with "
            f"--checkpoint {state.model.folder}",
            details=differing,
        )


def keep_newest(checkpoints: Path, keep: int) -> None:
    """Remove all but the newest `keep` checkpoints."""
    for old in sorted(checkpoints.glob("step-*"))[:-keep]:
        # Renamed first: what is half removed must not look like a checkpoint.
        retired = old.rename(old.with_name(f".{old.name}.old"))
        shutil.rmtree(retired, ignore_errors=True)


def find_unfinished(checkpoints: Path, model: Path) -> list[Path]:
    """What is being written of checkpoints and the model, or was left behind by a writer that was killed."""
    return [*checkpoints.glob(".step-*"), *model.parent.glob(f".{model.name}.*")]


def remove_leftovers(checkpoints: Path, model: Path) -> None:
    """Remove what killed writers left behind. To be called when no writer runs."""
    for left in find_unfinished(checkpoints, model):
        shutil.rmtree(left, ignore_errors=True)


def read_exact(spec: TensorSpec) -> np.ndarray:
    """One tensor in its own type: counters are integers."""
    import numpy as np

    if spec.dtype not in ("I32", "I64"):
        return read_array(spec)
    with open(spec.path, "rb") as file:
        file.seek(spec.offset)
        data = file.read(spec.nbytes)
    return np.frombuffer(data, np.int32 if spec.dtype == "I32" else np.int64).reshape(spec.shape)


def _sync(folder: Path) -> None:
    """Flush everything below a folder to the disk."""
    for root, _, files in os.walk(folder):
        for file in files:
            _sync_one(Path(root) / file)
        _sync_one(Path(root))


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
