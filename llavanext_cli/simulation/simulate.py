"""Check a preset for its NPUs on a machine that has none: compile its real graphs in MindSpore's simulation mode.

    preset ─▶ one process a rank (worker.py), CANN or its stand-ins ─▶ the slices, the time, or the reason

Type and shape inference, differentiation, parallel planning, optimizer sharding and communication are MindSpore's own.
What it cannot show: kernels, speed, numerics on the NPU. Its result is "compiled in simulation", never "run".
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llavanext_cli.config.presets import load_preset
from llavanext_cli.config.schema import Preset
from llavanext_cli.errors import TrainingError
from llavanext_cli.simulation.cann_stubs import simulation_environment
from llavanext_cli.training import memory
from llavanext_cli.units import format_memory
from llavanext_cli.weights.checkpoint import open_checkpoint
from llavanext_cli.weights.keymap import is_cache

WORKER = Path(__file__).with_name("worker.py")
BYTES = memory.BYTES | {"int32": 4, "bool": 1}
MOMENTS = ("adam_m.", "adam_v.")
"""What AdamW calls its two moments of a parameter."""
SUMS = "accu_grads."
"""Before the name of a parameter: the sum of its gradients over the batches of a step."""


@dataclass(frozen=True)
class Slice:
    """A parameter on one rank: its shape there, its type, and whether it is trained."""

    shape: tuple[int, ...]
    dtype: str
    trained: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class RankReport:
    """What one rank compiled.

    Attributes:
        rank: of `devices`.
        slices: every parameter of the network and of the optimizer, as it is on this rank.
        seconds: of each graph's compilation.
        peak_memory: bytes of host memory of the process that compiled.
        strategy: file with the plan by which MindSpore slices checkpoints; None for one device.
    """

    rank: int
    slices: dict[str, Slice]
    seconds: dict[str, float]
    peak_memory: int
    strategy: Path | None

    @property
    def parameter_bytes(self) -> int:
        """Of the weights on this device."""
        return sum(part.bytes for name, part in self._weights())

    @property
    def gradient_bytes(self) -> int:
        """Of the gradients after they were spread over the devices, as large as the trained weights; and of their sums
        when several batches make a step."""
        sums = sum(part.bytes for name, part in self.slices.items() if name.startswith(SUMS))
        return sums + sum(part.bytes for name, part in self._weights() if part.trained and self.optimizer_bytes)

    @property
    def optimizer_bytes(self) -> int:
        return sum(part.bytes for name, part in self.slices.items() if name.startswith(MOMENTS))

    @property
    def cache_bytes(self) -> int:
        """Of keys and values, when it answers."""
        return sum(part.bytes for name, part in self.slices.items() if is_cache(name))

    def _weights(self) -> Iterator[tuple[str, Slice]]:
        return (pair for pair in self.slices.items() if is_weight(pair[0]))


@dataclass(frozen=True)
class SimulationReport:
    """What became of a preset.

    Attributes:
        name: the preset's.
        target, devices, data, tensor, pipeline: what it was compiled for.
        layers: language layers that were compiled; fewer than the preset's when it was shortened.
        stand_in: whether stand-ins took CANN's place.
        ranks: one report for each rank that was compiled.
        fault: MindSpore's reason in one line; empty when all compiled.
        log: what the compile that failed wrote.
    """

    name: str
    target: str
    devices: int
    data: int
    tensor: int
    pipeline: int
    layers: int
    stand_in: bool
    ranks: tuple[RankReport, ...]
    fault: str
    log: Path | None

    @property
    def ok(self) -> bool:
        return not self.fault

    @property
    def place(self) -> str:
        """What it was compiled for, in words."""
        split = f"data {self.data} x tensor {self.tensor} x pipeline {self.pipeline}"
        devices = "device" if self.devices == 1 else "devices"
        return f"{self.devices} {self.target} {devices} ({split}), {self.layers} layers"

    def describe(self) -> str:
        """One line for people."""
        if self.fault:
            return f"does not compile for {self.place}: {self.fault}"
        if not self.ranks:
            return "ok: it answers on a CPU, there is nothing to compile for NPUs"
        how = "compiled on this CPU" if self.target == "CPU" else "compiled in simulation"
        first = self.ranks[0]
        sizes = {
            "weights": first.parameter_bytes,
            "gradients": first.gradient_bytes,
            "optimizer": first.optimizer_bytes,
            "cache": first.cache_bytes,
        }
        held = ", ".join(f"{name} {format_memory(size)}" for name, size in sizes.items() if size)
        seconds = sum(sum(rank.seconds.values()) for rank in self.ranks)
        return f"{how} for {self.place} in {seconds:.0f} s; a device holds {held}"

    def summary(self) -> dict[str, Any]:
        """For programs: everything but the single slices."""
        ranks = [
            {
                "rank": rank.rank,
                "parameter_bytes": rank.parameter_bytes,
                "gradient_bytes": rank.gradient_bytes,
                "optimizer_bytes": rank.optimizer_bytes,
                "cache_bytes": rank.cache_bytes,
                "seconds": rank.seconds,
                "peak_memory": rank.peak_memory,
            }
            for rank in self.ranks
        ]
        own = {name: getattr(self, name) for name in ("name", "target", "devices", "data", "tensor", "pipeline")}
        rest = {"layers": self.layers, "stand_in": self.stand_in, "compiled": self.ok, "fault": self.fault}
        return own | rest | {"ranks": ranks}

    def raise_fault(self) -> None:
        """Raise a `TrainingError` when it did not compile."""
        if self.fault:
            raise TrainingError(
                f"{self.name} does not compile for {self.place}",
                hint="the line above is MindSpore's; change the preset with --set, and check again",
                details=[self.fault],
            )


def simulate(
    preset_name: str,
    *,
    folder: Path | None = None,
    overrides: Sequence[str] = (),
    devices: int | None = None,
    layers: int | None = None,
    ranks: Sequence[int] | None = None,
    checkpoint: Path | None = None,
    batch: int = 1,
    progress: Callable[[int, int], None] | None = None,
    worker: Path = WORKER,
) -> SimulationReport:
    """Compile a preset's training step, or its prefill and increment graphs, for some of its ranks.

    Args:
        preset_name: name or file.
        folder: keeps everything that was written; None for a folder that is removed again.
        overrides, devices: as for `load_preset`.
        layers: shorten the tower and the language model to this many layers: seconds, not minutes.
        ranks: which ones; None for the first, as the others are no different.
        checkpoint: whose model is compiled; None for the preset's.
        batch: questions that an ask preset answers at once.
        progress: called with (done, total) ranks.
        worker: the script that compiles.

    Raises:
        ConfigError: the preset is wrong.
        RuntimeMissingError: this machine cannot compile for Ascend.
    """
    model = open_checkpoint(checkpoint).architecture if checkpoint else None
    preset = load_preset(preset_name, overrides, devices, model)
    settings = [*overrides, *(shortened(preset, layers) if layers else ())]
    preset = load_preset(preset_name, settings, devices, model)
    variables, stand_in = _environment(preset)
    if ranks is None:
        ranks = [0]
    if preset.ask and preset.runtime.target == "CPU":
        ranks = []  # its decoder is compiled piece by piece as an answer grows, here and now
    reports: list[RankReport] = []
    text = (model or preset.model).text
    fault, log = "", None
    name = str(Path(preset_name).resolve()) if Path(preset_name).is_file() else preset_name
    request = {
        "preset": name,
        "overrides": settings,
        "devices": devices,
        "checkpoint": checkpoint and str(checkpoint.resolve()),
        "batch": batch,
    }
    with _folder(folder) as place:
        for number, rank in enumerate(ranks):
            if progress:
                progress(number, len(ranks))
            at = place / f"rank_{rank}"
            result = _compile(request, at, variables | {"RANK_ID": str(rank)}, worker)
            fault = result.get("fault", "")
            if fault:
                log = at / "log.txt" if folder else None
                break
            reports.append(_rank_report(rank, result, at, keep=folder is not None))
    parallel = preset.parallel
    return SimulationReport(
        name=preset.name,
        target=preset.runtime.target,
        devices=parallel.devices,
        data=parallel.data,
        tensor=parallel.tensor,
        pipeline=parallel.pipeline,
        layers=text.num_hidden_layers,
        stand_in=stand_in,
        ranks=tuple(reports),
        fault=fault,
        log=log,
    )


def shortened(preset: Preset, layers: int) -> tuple[str, ...]:
    """Settings that leave `layers` layers in the language model and in the tower."""
    unused = preset.model.vision.num_hidden_layers - preset.model.vision_layers
    settings = (f"model.text.num_hidden_layers={layers}", f"model.vision.num_hidden_layers={layers + unused}")
    if preset.train:
        settings += (f"train.recompute={min(preset.train.recompute, layers)}",)
    return settings


def is_weight(name: str) -> bool:
    """Whether a parameter of the compiled cell is one of the network's, not the optimizer's or the cache's."""
    return ("." in name and not name.startswith((*MOMENTS, SUMS)) and not is_cache(name)) or name == "image_newline"


def _environment(preset: Preset) -> tuple[dict[str, str], bool]:
    threads = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2")}
    if preset.runtime.target == "CPU":
        return threads, False
    found = simulation_environment()
    return found.variables | threads | {"RANK_SIZE": str(preset.parallel.devices)}, found.stand_in


@contextlib.contextmanager
def _folder(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="llavanext-simulate-") as made:
            yield Path(made)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()


def _compile(request: dict[str, Any], folder: Path, variables: dict[str, str], worker: Path) -> dict[str, Any]:
    """Run one worker to its end; its result, with a `fault` in one line when it failed."""
    folder.mkdir(parents=True, exist_ok=True)
    file, log, answer = folder / "request.json", folder / "log.txt", folder / "result.json"
    answer.unlink(missing_ok=True)
    file.write_text(json.dumps(request), encoding="utf-8")
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [variables.get("PYTHONPATH") or os.environ.get("PYTHONPATH")])]
    # What MindSpore logs as an error is a part of its reason, and must be there whatever the user's level is.
    environment = os.environ | variables | {"PYTHONPATH": ":".join(paths), "GLOG_v": "3"}
    with log.open("wb") as stream:
        ended = subprocess.run(
            [sys.executable, str(worker), str(file)],
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    result = json.loads(answer.read_text(encoding="utf-8")) if answer.is_file() else {}
    text = log.read_text(encoding="utf-8", errors="replace")
    if "fault" in result:
        result["fault"] = explain(result["fault"], text)
    elif ended.returncode and not result.get("seconds"):
        tail = [line for line in text.splitlines() if line.strip()][-1:]
        result["fault"] = f"the compiling process ended with code {ended.returncode}: {''.join(tail) or 'no message'}"
    return result


_LOGGED = re.compile(r"^\[(?:ERROR|CRITICAL)\] PARALLEL\(.*?\] \w+\] (.*)$", re.MULTILINE)


def explain(fault: str, log: str) -> str:
    """MindSpore's reason in one line.

    Its exceptions begin with what failed, followed by call stacks. When the parallel planner failed, the cause is the
    first error that it logged.
    """
    message = " ".join(fault.partition("\n\n----")[0].split())
    causes = _LOGGED.findall(log)
    cause = " ".join(causes[0].split()) if causes else ""
    return f"{message} ({cause})" if cause and cause not in message else message


def _rank_report(rank: int, result: dict[str, Any], folder: Path, keep: bool) -> RankReport:
    slices = {
        name: Slice(tuple(shape), dtype, trained) for name, (shape, dtype, trained) in result["parameters"].items()
    }
    strategy = folder / "libraries" / "strategy" / f"ckpt_strategy_rank_{rank}.ckpt"
    kept = strategy if keep and strategy.is_file() else None
    return RankReport(rank, slices, result["seconds"], result["peak_memory"], kept)
