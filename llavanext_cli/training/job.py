"""The folder of a training run, and the file that tells its workers what to do.

OUT/job.json              what was asked for
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
from dataclasses import asdict, dataclass
from pathlib import Path

from llavanext_cli.errors import TrainingError

JOB_FILE = "job.json"
"""By it a folder is known to be a run's."""


@dataclass(frozen=True)
class Job:
    """One run: a preset by name or path with its overrides and devices (None: the preset's own), and absolute paths.

    `resume` is the checkpoint folder to go on from; `on_bad` says what happens when a sample cannot be read: "fail"
    ends the run, "skip" leaves it out.
    """

    preset: str
    overrides: tuple[str, ...]
    devices: int | None
    data: Path
    checkpoint: Path
    out: Path
    resume: Path | None = None
    on_bad: str = "fail"

    @property
    def file(self) -> Path:
        return self.out / JOB_FILE

    def file_of(self, node: int) -> Path:
        """What the workers of a node read: `job.json`, and `job_1.json` … on further nodes."""
        return self.out / f"job_{node}.json" if node else self.file

    @property
    def config_file(self) -> Path:
        return self.out / "mindformers.yaml"

    @property
    def metrics_file(self) -> Path:
        return self.out / "metrics.jsonl"

    @property
    def report_file(self) -> Path:
        return self.out / "train_report.html"

    @property
    def checkpoints_folder(self) -> Path:
        return self.out / "checkpoints"

    @property
    def model_folder(self) -> Path:
        return self.out / "model"

    @property
    def logs_folder(self) -> Path:
        return self.out / "logs"

    @property
    def warnings_file(self) -> Path:
        """Lines that a worker wants the user to see."""
        return self.logs_folder / "warnings.txt"

    @property
    def stop_file(self) -> Path:
        """The step after which the workers end, 0 until they are told to: see stopping.py."""
        return self.logs_folder / "stop_after"

    @property
    def skipped_file(self) -> Path:
        """The samples that could not be read and were skipped: one JSON object a line."""
        return self.out / "skipped.jsonl"

    @property
    def libraries_folder(self) -> Path:
        return self.logs_folder / "libraries"

    def save(self, node: int = 0) -> None:
        fields = {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
        self.file_of(node).write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")

    def check_same(self, first: Path) -> None:
        """Compare what this node was told with what the first node was. Read when all workers have met.

        Raises:
            TrainingError: they differ, or the first node writes to another disk.
        """
        try:
            theirs = Job.load(first)
        except FileNotFoundError as fault:
            raise TrainingError(f"{first} of node 0 is not there", "every node must see the same --out") from fault
        differing = [
            f"{key}: {mine} here, {other} on node 0"
            for (key, mine), other in zip(asdict(self).items(), asdict(theirs).values(), strict=True)
            if mine != other
        ]
        if differing:
            raise TrainingError("node 0 was started with other options", "give every node the same ones", differing)

    @classmethod
    def load(cls, file: Path) -> Job:
        fields = json.loads(file.read_text(encoding="utf-8"))
        return cls(
            fields["preset"],
            tuple(fields["overrides"]),
            fields["devices"],
            Path(fields["data"]),
            Path(fields["checkpoint"]),
            Path(fields["out"]),
            Path(fields["resume"]) if fields.get("resume") else None,
            fields.get("on_bad", "fail"),
        )
