"""Check a preset for its NPUs on a machine that has none: compile its real graphs in MindSpore's simulation mode.

    preset ─▶ the process of rank 0 (compile_worker.py), with CANN or its stubs ─▶ the slices, the time, or the reason

Type and shape inference, differentiation, parallel planning, optimizer sharding and communication are MindSpore's own.
It cannot show kernels, speed and numerics on the NPU: the result is "compiled in simulation", never "run".
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
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
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

WORKER = Path(__file__).with_name("compile_worker.py")
BYTES = memory.BYTES | {"int32": 4, "bool": 1}
MOMENTS = ("adam_m.", "adam_v.")
"""What AdamW calls its two moments of a parameter."""
SUMS = "accu_grads."
"""Before the name of a parameter: the sum of its gradients over the batches of a step."""
_LOGGED_ERROR = re.compile(r"^\[(?:ERROR|CRITICAL)\] PARALLEL\(.*?\] \w+\] (.*)$", re.MULTILINE)


@dataclass(frozen=True)
class CompileRequest:
    """What to compile: a training step, or the prefill and increment graphs of an ask preset.

    Attributes:
        preset: name or file.
        overrides, devices: as for `load_preset`.
        checkpoint: whose model is compiled; None for the preset's.
        layers: shorten the tower and the language model to this many layers: seconds instead of minutes.
        batch: questions that an ask preset answers at once.
    """

    preset: str
    overrides: tuple[str, ...] = ()
    devices: int | None = None
    checkpoint: Path | None = None
    layers: int | None = None
    batch: int = 1

    def load_preset(self) -> Preset:
        """The preset with the overrides, shortened, for the checkpoint's model."""
        model = open_checkpoint(self.checkpoint).architecture if self.checkpoint else None
        preset = load_preset(self.preset, self.overrides, self.devices, model)
        if self.layers:
            preset = load_preset(self.preset, [*self.overrides, *shortened(preset, self.layers)], self.devices, model)
        return replace(preset, model=model) if model else preset


def shortened(preset: Preset, layers: int) -> tuple[str, ...]:
    """Settings that leave `layers` layers in the language model and in the tower."""
    unused = preset.model.vision.num_hidden_layers - preset.model.vision_layers
    settings = (f"model.text.num_hidden_layers={layers}", f"model.vision.num_hidden_layers={layers + unused}")
    if preset.train:
        settings += (f"train.recompute={min(preset.train.recompute, layers)}",)
    return settings


@dataclass(frozen=True)
class Slice:
    """A parameter on one device: its shape there, its type, and whether it is trained."""

    shape: tuple[int, ...]
    dtype: str
    trained: bool

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * BYTES[self.dtype]


@dataclass(frozen=True)
class SimulationReport:
    """The result of a compile.

    Attributes:
        preset: as it was compiled.
        cann_stubs: whether stubs took CANN's place.
        fault: MindSpore's reason in one line; empty when all compiled.
        slices: every parameter of the network and of the optimizer, as it is on the device of rank 0. Empty after a
            fault, and for a preset that answers on a CPU: its graphs are compiled piece by piece as an answer grows.
        seconds: graph → seconds of its compilation.
        peak_memory: bytes of host memory of the process that compiled.
        log: what that process wrote; None when the folder was removed.
        strategy: file with MindSpore's plan for slicing checkpoints; None for one device.
    """

    preset: Preset
    cann_stubs: bool
    fault: str
    slices: dict[str, Slice]
    seconds: dict[str, float]
    peak_memory: int
    log: Path | None
    strategy: Path | None

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes that one device holds: weights, gradients, optimizer, cache (of keys and values).

        Gradients are as large as the trained weights after they were spread over the devices; to them come their sums
        when several batches make a step.
        """
        weights = [part for name, part in self.slices.items() if is_weight(name)]

        def total(parts: Any) -> int:
            return sum(part.bytes for part in parts)

        optimizer = total(part for name, part in self.slices.items() if name.startswith(MOMENTS))
        sums = total(part for name, part in self.slices.items() if name.startswith(SUMS))
        return {
            "weights": total(weights),
            "gradients": sums + (total(part for part in weights if part.trained) if optimizer else 0),
            "optimizer": optimizer,
            "cache": total(part for name, part in self.slices.items() if is_cache(name)),
        }

    @property
    def place(self) -> str:
        """What it was compiled for, in words."""
        parallel = self.preset.parallel
        split = f"data {parallel.data} x tensor {parallel.tensor} x pipeline {parallel.pipeline}"
        devices = "device" if parallel.devices == 1 else "devices"
        layers = self.preset.model.text.num_hidden_layers
        return f"{parallel.devices} {self.preset.runtime.target} {devices} ({split}), {layers} layers"

    def describe(self) -> str:
        """One line for people."""
        if self.fault:
            return f"does not compile for {self.place}: {self.fault}"
        if not self.slices:
            return "ok: it answers on a CPU, so there is nothing to compile for NPUs"
        how = "compiled on this CPU" if self.preset.runtime.target == "CPU" else "compiled in simulation"
        held = ", ".join(f"{name} {format_memory(size)}" for name, size in self.bytes.items() if size)
        return f"{how} for {self.place} in {sum(self.seconds.values()):.0f} s; a device holds {held}"

    def summary(self) -> dict[str, Any]:
        """For programs: everything but the single slices."""
        return {
            "name": self.preset.name,
            "target": self.preset.runtime.target,
            **{key: getattr(self.preset.parallel, key) for key in ("devices", "data", "tensor", "pipeline")},
            "layers": self.preset.model.text.num_hidden_layers,
            "cann_stubs": self.cann_stubs,
            "compiled": not self.fault,
            "fault": self.fault,
            "bytes": self.bytes,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
        }

    def raise_fault(self) -> None:
        """Raise a `TrainingError` when it did not compile."""
        if self.fault:
            raise TrainingError(
                f"{self.preset.name} does not compile for {self.place}",
                "the line above is MindSpore's reason: change the preset with --set, and check again",
                [self.fault],
            )


def is_weight(name: str) -> bool:
    """Whether a parameter of the compiled cell is one of the network's, not the optimizer's or the cache's."""
    return ("." in name and not name.startswith((*MOMENTS, SUMS)) and not is_cache(name)) or name == "image_newline"


def simulate(request: CompileRequest, folder: Path | None = None, worker: Path = WORKER) -> SimulationReport:
    """Compile a preset's graphs as rank 0 does. The other ranks compile the same.

    Args:
        folder: keeps everything that was written; None for a folder that is removed.
        worker: the script that compiles.

    Raises:
        ConfigError: the preset is wrong.
        RuntimeMissingError: this machine cannot compile for Ascend.
    """
    preset = request.load_preset()
    if preset.ask and preset.runtime.target == "CPU":
        return SimulationReport(preset, False, "", {}, {}, 0, None, None)
    variables = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "2"), "RANK_ID": "0"}
    stubs = False
    if preset.runtime.target != "CPU":
        found = simulation_environment()
        stubs = found.cann_stubs
        variables |= found.variables | {"RANK_SIZE": str(preset.parallel.devices)}
    with _kept_or_temporary(folder) as place:
        result = _compile(request, place, variables, worker)
        fault = result.get("fault", "")
        strategy = place / "libraries" / "strategy" / "ckpt_strategy_rank_0.ckpt"
        return SimulationReport(
            preset,
            stubs,
            fault,
            {} if fault else {name: Slice(tuple(shape), *rest) for name, (shape, *rest) in result["slices"].items()},
            result.get("seconds", {}),
            result.get("peak_memory", 0),
            place / "log.txt" if folder else None,
            strategy if folder and strategy.is_file() else None,
        )


@contextlib.contextmanager
def _kept_or_temporary(folder: Path | None) -> Iterator[Path]:
    if folder is None:
        with tempfile.TemporaryDirectory(prefix="llavanext-simulate-") as temporary:
            yield Path(temporary)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder.resolve()


def _compile(request: CompileRequest, folder: Path, variables: dict[str, str], worker: Path) -> dict[str, Any]:
    """Run the worker to its end; its result, with a `fault` in one line when it failed."""
    file, log, answer = folder / "request.json", folder / "log.txt", folder / "result.json"
    name = str(Path(request.preset).resolve()) if Path(request.preset).is_file() else request.preset
    absolute = replace(request, preset=name, checkpoint=request.checkpoint and request.checkpoint.resolve())
    file.write_text(json.dumps(asdict(absolute), default=str), encoding="utf-8")
    package = str(Path(__file__).resolve().parents[2])
    paths = [package, *filter(None, [variables.get("PYTHONPATH") or os.environ.get("PYTHONPATH")])]
    # What MindSpore logs as an error is a part of its reason, whatever level the user has chosen.
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
    elif not result.get("slices"):
        tail = [line for line in text.splitlines() if line.strip()][-1:]
        result["fault"] = f"the compiling process ended with code {ended.returncode}: {''.join(tail) or 'no message'}"
    return result


def explain(fault: str, log: str) -> str:
    """MindSpore's reason in one line.

    Its exceptions begin with what failed, followed by call stacks. When the parallel planner failed, the cause is the
    first error that it logged.
    """
    message = " ".join(fault.partition("\n\n----")[0].split())
    causes = _LOGGED_ERROR.findall(log)
    cause = " ".join(causes[0].split()) if causes else ""
    return f"{message} ({cause})" if cause and cause not in message else message
