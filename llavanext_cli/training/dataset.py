"""Samples to batches for the trainer: a MindSpore data set over the encoded samples of one worker.

samples file ─▶ order (plan.py) ─▶ encode (processing) ─▶ pad to static shapes ─▶ batch
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.config.mindformers import COLUMNS
from llavanext_cli.errors import DataError
from llavanext_cli.processing.sample_layout import pad
from llavanext_cli.records import IGNORE_INDEX, EncodedSample
from llavanext_cli.training.inputs import room_of

if TYPE_CHECKING:
    from mindspore.dataset import Dataset

    from llavanext_cli.config.schema import Preset
    from llavanext_cli.mixing.samples import SampleFile
    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.records import Sample
    from llavanext_cli.training.plan import RankOrder


class EncodedSamples:
    """Random access to this worker's samples, encoded and padded. Sent to MindSpore's reader processes by pickle.

    Args:
        file: the samples.
        order: index into `file` of each position.
        processor: encodes a sample.
        preset: gives the static shapes.
        skipped: file that lists the samples that cannot be read, which then teach nothing; None: they are errors.
        report: called with such an error, which MindSpore wraps into one of its own.
    """

    def __init__(
        self,
        file: SampleFile,
        order: Sequence[int] | RankOrder,
        processor: Processor,
        preset: Preset,
        skipped: Path | None = None,
        report: Callable[[DataError], None] = lambda fault: None,
    ):
        self.file = file
        self.order = order
        self.processor = processor
        self.room = room_of(preset)
        self.skipped = skipped
        self.report = report

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[np.ndarray, ...]:
        """`input_ids int32[S]`, `tiles float32[G+F, 3, R, R]`, `feature_index int32[S]`, `labels int32[S]`."""
        sample = self.file[self.order[int(position)]]
        try:
            padded = self._pad(self.processor.encode(sample, self.file.roots))
        except DataError as fault:
            if self.skipped is None:
                self.report(DataError(fault.what, "repair it, leave it out of the mix, or add --on-bad skip"))
                raise
            padded = self._pad(self._skip(sample, fault))
        return tuple(padded[column] for column in COLUMNS)

    def _pad(self, sample: EncodedSample) -> dict[str, np.ndarray]:
        return pad(sample, self.room, self.processor.arch)

    def _skip(self, sample: Sample, fault: DataError) -> EncodedSample:
        """An empty place in the batch, without a supervised token: the same loss on every number of workers."""
        line = json.dumps({"id": sample.id, "source": sample.source, "reason": fault.what}) + "\n"
        with self.skipped.open("a", encoding="utf-8") as file:
            file.write(line)  # one write of a short line: readers do not mix theirs
        side = self.processor.arch.vision.image_size
        nothing = np.zeros((0, 3, side, side), np.float32)
        one = np.zeros(1, np.int32)
        return EncodedSample(sample.id, one, one + IGNORE_INDEX, nothing, nothing, one + 1)  # rows 0, 1: newline, text


def build_dataset(samples: EncodedSamples, *, batch_size: int, workers: int) -> Dataset:
    """A MindSpore data set of `COLUMNS`, in the order of `samples`, read ahead by `workers` processes."""
    import mindspore.dataset as ds

    ds.config.set_enable_shared_mem(workers > 1)
    data = ds.GeneratorDataset(
        samples,
        list(COLUMNS),
        shuffle=False,
        num_parallel_workers=workers,
        python_multiprocessing=workers > 1,
    )
    return data.batch(batch_size, drop_remainder=True)
