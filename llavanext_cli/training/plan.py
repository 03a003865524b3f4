"""What a run will do, computed before it starts: steps, and the order of samples."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from llavanext_cli.errors import DataError

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset


@dataclass(frozen=True)
class RunPlan:
    """Sizes of a run: samples of the file, samples a step over all devices, optimizer steps, passes over the data."""

    samples: int
    global_batch: int
    steps: int
    epochs: float


def plan_run(preset: Preset, samples: int) -> RunPlan:
    """Steps from epochs, or the preset's own number of steps.

    Raises:
        DataError: there are fewer samples than one step takes.
    """
    train = preset.train
    assert train is not None, "plan_run is for train presets"
    global_batch = train.batch_size * train.accumulate * preset.parallel.data
    steps = train.steps or samples * train.epochs // global_batch
    if steps < 1:
        raise DataError(
            f"{samples} samples are fewer than one step takes ({global_batch})",
            hint="mix more data, lower train.batch_size with --set, or use fewer --devices",
        )
    return RunPlan(samples, global_batch, steps, steps * global_batch / samples)


def run_settings(preset: Preset, plan: RunPlan, data: str, base: str) -> dict[str, Any]:
    """What the losses of a run depend on, as plain values: a resumed run must have the same.

    Devices, readers, threads and what is logged may change, as long as the global batch stays.

    Args:
        data: a digest of the data file.
        base: a digest of the weights that the run began with; of interest when LoRA leaves them as they are.
    """
    free = ("steps", "epochs", "batch_size", "accumulate", "save_every", "keep", "log_every", "recompute")
    values = asdict(preset.train)
    for section in ("lora", "learning_rates"):
        values |= {f"{section}.{key}": value for key, value in values.pop(section).items()}
    train = {f"train.{key}": value for key, value in values.items() if key not in free}
    shapes = {
        f"data.{key}": getattr(preset.data, key) for key in ("seq_length", "tiles", "frames", "videos", "shuffle")
    }
    types = {f"runtime.{key}": getattr(preset.runtime, key) for key in ("compute_dtype", "parameter_dtype")}
    run = {"steps": plan.steps, "samples a step": plan.global_batch, "samples": plan.samples, "data file": data}
    if preset.train.method == "lora":
        run["base weights"] = base
    return json.loads(json.dumps(train | shapes | types | run))


def digest_file(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class SampleOrder:
    """Index of the sample at every place of an endless walk over the samples, epoch after epoch, each in a new order.

    It depends on nothing but its arguments, so that one worker or eight, interrupted or not, see the same data.
    """

    def __init__(self, samples: int, *, shuffle: bool, seed: int):
        self.samples, self.shuffle, self.seed = samples, shuffle, seed
        self._epochs: dict[int, list[int]] = {}  # the last two that were asked for

    def __getitem__(self, place: int) -> int:
        epoch, position = divmod(place, self.samples)
        return self._indices(epoch)[position] if self.shuffle else position

    def _indices(self, epoch: int) -> list[int]:
        if epoch not in self._epochs:
            indices = list(range(self.samples))
            Random(f"{self.seed}/{epoch}").shuffle(indices)
            self._epochs = dict([*self._epochs.items()][-1:]) | {epoch: indices}
        return self._epochs[epoch]


class RankOrder:
    """The samples of one of `ranks` data-parallel workers, from place `first` on: its slice of every global batch.

    order   a b c d | e f g h      ranks 2, batch 2
    rank 0  a b     | e f
    rank 1      c d |     g h
    """

    def __init__(self, order: SampleOrder, *, first: int, steps: int, batch: int, rank: int, ranks: int):
        self.order, self.first, self.steps, self.batch, self.rank, self.ranks = order, first, steps, batch, rank, ranks

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, position: int) -> int:
        step, within = divmod(position, self.batch)
        return self.order[self.first + (step * self.ranks + self.rank) * self.batch + within]
