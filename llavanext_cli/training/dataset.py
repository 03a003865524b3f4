"""Samples to batches for the trainer: a MindSpore data set over the encoded samples of one worker.

samples file ─▶ order (plan.py) ─▶ encode (processing) ─▶ pad to static shapes ─▶ batch
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from llavanext_cli.config.mindformers import COLUMNS
from llavanext_cli.processing.packing import collate

if TYPE_CHECKING:
    from mindspore.dataset import Dataset

    from llavanext_cli.config.schema import Preset
    from llavanext_cli.mixing.samples import SampleFile
    from llavanext_cli.processing.processor import Processor


class EncodedSamples:
    """Random access to this worker's samples, encoded and padded. Sent to MindSpore's reader processes by pickle.

    Args:
        file: the samples.
        order: index into `file` of each position.
        processor: encodes a sample.
        preset: gives the static shapes.
    """

    def __init__(self, file: SampleFile, order: Sequence[int], processor: Processor, preset: Preset):
        self.file = file
        self.order = list(order)
        self.processor = processor
        self.seq_length = preset.data.seq_length
        self.tiles = preset.data.tiles
        self.frames = preset.data.frame_budget

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, position: int) -> tuple[np.ndarray, ...]:
        """`input_ids int32[S]`, `tiles float32[G+F, 3, R, R]`, `feature_index int32[S]`, `labels int32[S]`."""
        sample = self.file[self.order[int(position)]]
        encoded = self.processor.encode(sample, self.file.roots)
        batch = collate(
            [encoded], seq_length=self.seq_length, tiles=self.tiles, frames=self.frames, arch=self.processor.arch
        )
        return tuple(getattr(batch, column)[0] for column in COLUMNS)


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
