"""The size of every sample before a run: recorded by `mix`, or counted here from the headers of the media."""

from __future__ import annotations

import os.path
from collections.abc import Callable
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.processing.processor import Processor, resolve_path
from llavanext_cli.processing.tokenizer import load_tokenizer
from llavanext_cli.records import UNITS, SampleSize

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.mixing.samples import SampleFile
    from llavanext_cli.records import Int32Array
    from llavanext_cli.weights.checkpoint import Checkpoint

LISTED = 10
"""Lines of an error that lists samples."""

UNREADABLE = -1
"""What stands in `measure_samples`' table for a sample that cannot be read."""

WORTH_A_HINT = 10_000
"""Samples from which counting takes long enough to say how to avoid it."""


def build_processor(checkpoint: Checkpoint, preset: Preset) -> Processor:
    """The processor that encodes for this checkpoint, with the preset's frames per video."""
    return Processor(checkpoint.architecture, load_tokenizer(checkpoint.folder), frames=preset.data.frames)


def measure_samples(
    samples: SampleFile,
    checkpoint: Checkpoint,
    preset: Preset,
    progress: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> Int32Array:
    """Tokens, tiles and frames of every sample, without decoding a pixel. Sizes that `mix` recorded are taken over if
    it counted with the tokenizer, architecture and frames of this run.

    Args:
        progress: called with (done, total).
        skip_bad: samples that cannot be read are no error, unless none is left; their rows are `UNREADABLE`.
        say: called with a line for the user if recorded sizes cannot be used.

    Returns:
        `int32[samples, 3]`, each row a `SampleSize`.

    Raises:
        DataError: a sample or a header is invalid; or media are missing: how many, and the first of them.
    """
    import numpy as np

    processor = build_processor(checkpoint, preset)
    is_counted = _is_counted(samples, processor, say)
    sizes = np.full((len(samples), len(UNITS)), UNREADABLE, np.int32)
    missing: list[str] = []
    for number, sample in enumerate(samples):
        if progress and number % 100 == 0:
            progress(number, len(samples))
        try:
            paths = [resolve_path(sample, medium, samples.roots) for medium in sample.media]
            if absent := [path for path in paths if not os.path.isfile(path)]:
                missing.append(f"sample {sample.id}: {absent[0]}")
                continue
            sizes[number] = (is_counted and sample.size) or processor.measure(sample, samples.roots)
        except DataError:
            if not skip_bad:
                raise
    if progress:
        progress(len(samples), len(samples))
    if missing and not skip_bad:
        raise DataError(
            f"{len(missing)} of {len(samples)} samples name an image or video that does not exist",
            hint="put the files back, write the mix again (llavanext mix --check exists), or add --on-bad skip",
            details=missing[:LISTED] + ([f"... and {len(missing) - LISTED} more"] if len(missing) > LISTED else []),
        )
    if (sizes == UNREADABLE).all():
        raise DataError(
            f"none of {len(samples)} samples can be read",
            "`llavanext mix --check header` reports what is wrong with each",
        )
    return sizes


def _is_counted(samples: SampleFile, processor: Processor, say: Callable[[str], None]) -> bool:
    """Whether the sizes recorded in the file are those that `processor` would count."""
    counted_by = samples.header.get("counted_by")
    if counted_by == processor.fingerprint:
        return True
    if counted_by:
        say(
            f"Counting {len(samples)} samples again: the mix was counted with another tokenizer, architecture or "
            "number of frames (data.frames)"
        )
    elif len(samples) >= WORTH_A_HINT:
        say(f"Counting {len(samples)} samples; llavanext mix --tokenizer CHECKPOINT --preset PRESET counts them once")
    return False


def room_of(preset: Preset) -> SampleSize:
    """What one sample may take: the static shapes of the preset's graph."""
    assert preset.data.seq_length is not None, "a train preset has a sequence length"
    return SampleSize(preset.data.seq_length, preset.data.tiles, preset.data.frame_budget)


def check_sizes(sizes: Int32Array, samples: SampleFile, preset: Preset) -> None:
    """Refuse a run in which samples do not fit, before it starts.

    Args:
        sizes: `int32[samples, 3]`, from `measure_samples`.
        samples: for their ids.

    Raises:
        DataError: how many samples have too many tokens, tiles or frames, the worst of them, and what would fit all.
    """
    most = SampleSize(*sizes.max(axis=0).tolist())
    changes = (
        f"--set data.seq_length={-(-most.tokens // 16) * 16}",
        f"--set data.tiles={most.tiles}",
        f"--set data.videos={-(-most.frames // max(1, preset.data.frames))}",
    )
    faults, settings = [], []
    for field, (unit, fits) in enumerate(zip(UNITS, room_of(preset), strict=True)):
        if most[field] > fits:
            too_large = int((sizes[:, field] > fits).sum())
            worst = samples[int(sizes[:, field].argmax())].id
            faults.append(
                f"{too_large} of {len(sizes)} samples have too many {unit}: {worst!r} has {most[field]}, and {fits} fit"
            )
            settings.append(changes[field])
    if faults:
        raise DataError(faults[0], f"make room with {' '.join(settings)}, or leave those samples out", faults[1:])
