"""What a training run was asked for, and the folder it writes.

OUT/job.json              what was asked for: the workers read it
OUT/mindformers.yaml      the complete configuration, as MindFormers reads it
OUT/metrics.jsonl         one line a logged step
OUT/train_report.html     its curves, drawn when the run ends
OUT/skipped.jsonl         samples that could not be read, with `--on-bad skip`
OUT/checkpoints/step-…/   on the way
OUT/model/                the trained model: what `ask` and `convert --to hf` take
OUT/logs/                 worker_RANK.log, scheduler.log, what MindSpore and MindFormers write
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from llavanext_cli.errors import TrainingError
from llavanext_cli.launching.msrun import ONE_NODE, Nodes

JOB_FILE = "job.json"
"""A folder with a readable one is a training run."""


@dataclass(frozen=True)
class TrainRequest:
    """The arguments of `llavanext train`.

    Attributes:
        preset: name or file of a train preset.
        data: samples, as `mix` writes them, or the original's processed JSON.
        checkpoint: folder of the model to begin with, from `convert` or another run.
        out: folder for everything the run writes.
        devices: NPUs or CPU workers of all nodes; None for the preset's own number.
        overrides: "key.path=value" changes to the preset.
        nodes: the machines of the run, and which of them this is.
        on_bad: "fail" ends the run at a sample that cannot be read, "skip" leaves the sample out.
        resume: continue from the newest whole checkpoint in `out`.
        force: replace a run that is in `out`.
    """

    preset: str
    data: Path
    checkpoint: Path
    out: Path
    devices: int | None = None
    overrides: tuple[str, ...] = ()
    nodes: Nodes = ONE_NODE
    on_bad: str = "fail"
    resume: bool = False
    force: bool = False


def _inside(name: str) -> Any:
    return property(lambda job: job.out / name)


@dataclass(frozen=True)
class TrainJob:
    """What the workers of a run read: a preset by name or path with its overrides and devices, and absolute paths.

    `resume` is the checkpoint folder to continue from, or None. Node 0 alone decides it.
    """

    preset: str
    overrides: tuple[str, ...]
    devices: int | None
    data: Path
    checkpoint: Path
    out: Path
    on_bad: str = "fail"
    resume: Path | None = None

    file = _inside(JOB_FILE)
    config_file = _inside("mindformers.yaml")
    metrics_file = _inside("metrics.jsonl")
    report_file = _inside("train_report.html")
    skipped_file = _inside("skipped.jsonl")
    """One JSON object for each sample that was skipped."""
    checkpoints_folder = _inside("checkpoints")
    model_folder = _inside("model")
    logs_folder = _inside("logs")
    warnings_file = _inside("logs/warnings.txt")
    """Lines of the workers for the user."""
    stop_file = _inside("logs/stop_after")
    """The step after which the workers end, or 0: see stopping.py."""
    libraries_folder = _inside("logs/libraries")

    @property
    def written(self) -> tuple[Path, ...]:
        """Everything that a run writes directly into its folder."""
        files = (self.file, self.config_file, self.metrics_file, self.report_file, self.skipped_file)
        return (*files, self.checkpoints_folder, self.model_folder, self.logs_folder)

    @classmethod
    def of(cls, request: TrainRequest) -> TrainJob:
        """With absolute paths: the workers start in another folder."""
        return cls(
            str(Path(request.preset).resolve()) if Path(request.preset).is_file() else request.preset,
            request.overrides,
            request.devices,
            request.data.resolve(),
            request.checkpoint.resolve(),
            request.out.resolve(),
            request.on_bad,
        )

    def file_of(self, node: int) -> Path:
        """What the workers of a node read: OUT/job.json on node 0, a file in OUT/logs on further nodes."""
        return self.logs_folder / f"job_{node}.json" if node else self.file

    def save(self, node: int = 0) -> None:
        self.file_of(node).write_text(json.dumps(asdict(self), indent=2, default=str) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, file: Path) -> TrainJob:
        values = json.loads(file.read_text(encoding="utf-8"))
        paths = {name: Path(values[name]) for name in ("data", "checkpoint", "out", "resume") if values[name]}
        return cls(**values | paths | {"overrides": tuple(values["overrides"])})

    def join_first_node(self) -> TrainJob:
        """Node 0's job, which must be this node's. Call it when all workers have met: then its file is new.

        Raises:
            TrainingError: they differ, or node 0 writes to another disk.
        """
        try:
            first = TrainJob.load(self.file)
        except FileNotFoundError as fault:
            raise TrainingError(f"{self.file} of node 0 is missing", "every node must see the same --out") from fault
        differing = [
            f"{name}: {getattr(self, name)} here, {getattr(first, name)} on node 0"
            for name in (field.name for field in fields(self) if field.name != "resume")
            if getattr(self, name) != getattr(first, name)
        ]
        if differing:
            raise TrainingError(
                "node 0 was started with other options", "start every node with the same options", differing
            )
        return first
