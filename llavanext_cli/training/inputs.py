"""Measure every sample before a run, from the sizes that mix recorded or the headers of the media."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.processing.processor import Processor, resolve_path
from llavanext_cli.processing.tokens import load_tokenizer
from llavanext_cli.records import UNITS, SampleSize

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.mixing.samples import SampleFile
    from llavanext_cli.weights.checkpoint import Checkpoint

SHOWN = 10
"""Lines of an error that lists samples."""


def build_processor(checkpoint: Checkpoint, preset: Preset) -> Processor:
    """The processor that encodes for this checkpoint, with the preset's frames a clip."""
    return Processor(checkpoint.architecture, load_tokenizer(checkpoint.folder), frames=preset.data.frames)


def measure_samples(
    samples: SampleFile,
    checkpoint: Checkpoint,
    preset: Preset,
    progress: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
) -> list[tuple[str, SampleSize]]:
    """(id, size) of every sample, without decoding a pixel; with `skip_bad`, of those that can be read.

    Raises:
        DataError: a header cannot be read, a sample is malformed, or media are gone: how many, and the first of them;
            or nothing is left.
    """
    processor = build_processor(checkpoint, preset)
    sizes, gone = [], []
    for number, sample in enumerate(samples):
        try:
            paths = [resolve_path(sample, medium, samples.roots) for medium in sample.media]
            if absent := [path for path in paths if not os.path.isfile(path)]:
                gone.append(f"sample {sample.id}: {absent[0]}")
                continue
            sizes.append((sample.id, processor.measure(sample, samples.roots)))
        except DataError:
            if not skip_bad:
                raise
        if progress and number % 100 == 0:
            progress(number, len(samples))
    if progress:
        progress(len(samples), len(samples))
    if gone and not skip_bad:
        raise DataError(
            f"{len(gone)} of {len(samples)} samples name a picture or clip that is not there",
            hint="put them back, make the file again (llavanext mix --check exists), or add --on-bad skip",
            details=gone[:SHOWN] + ([f"... and {len(gone) - SHOWN} more"] if len(gone) > SHOWN else []),
        )
    if not sizes:
        raise DataError(
            f"none of {len(samples)} samples can be read", "`llavanext mix --check header` says of each what is wrong"
        )
    return sizes


def room_of(preset: Preset) -> SampleSize:
    """What one sample may take: the static shapes of the preset's graph."""
    assert preset.data.seq_length is not None, "a train preset has a sequence length"
    return SampleSize(preset.data.seq_length, preset.data.tiles, preset.data.frame_budget)


def check_sizes(sizes: Sequence[tuple[str, SampleSize]], preset: Preset) -> None:
    """Refuse a run in which samples do not fit, before it starts.

    Args:
        sizes: (id, size) of every sample.

    Raises:
        DataError: how many samples have too many tokens, tiles or frames, the worst of them, and what would fit all.
    """
    faults, settings = [], []
    most = SampleSize(*(max((size[field] for _, size in sizes), default=0) for field in range(3)))
    for field, (unit, fits) in enumerate(zip(UNITS, room_of(preset), strict=True)):
        too_large = [name for name, size in sizes if size[field] > fits]
        if too_large:
            worst = next(name for name, size in sizes if size[field] == most[field])
            faults.append(
                f"{len(too_large)} of {len(sizes)} samples have too many {unit}: "
                f"{worst!r} has {most[field]}, and {fits} fit"
            )
            settings.append(
                (
                    f"--set data.seq_length={-(-most.tokens // 16) * 16}",
                    f"--set data.tiles={most.tiles}",
                    f"--set data.videos={-(-most.frames // max(1, preset.data.frames))}",
                )[field]
            )
    if faults:
        raise DataError(faults[0], f"make room with {' '.join(settings)}, or leave those samples out", faults[1:])
