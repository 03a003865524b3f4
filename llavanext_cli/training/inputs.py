"""Count the tokens of every sample before a run, from the sizes that mix recorded or the headers of the media."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.processing.processor import Processor, resolve_path
from llavanext_cli.processing.tokens import load_tokenizer

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.mixing.samples import SampleFile
    from llavanext_cli.weights.checkpoint import Checkpoint

SHOWN = 10
"""Lines of an error that lists samples."""


def build_processor(checkpoint: Checkpoint, preset: Preset) -> Processor:
    """The processor that encodes for this checkpoint, with the preset's frames a clip."""
    return Processor(checkpoint.architecture, load_tokenizer(checkpoint.folder), frames=preset.data.frames)


def count_tokens(
    samples: SampleFile,
    checkpoint: Checkpoint,
    preset: Preset,
    progress: Callable[[int, int], None] | None = None,
    skip_bad: bool = False,
) -> list[tuple[str, int]]:
    """(id, tokens) of every sample, without decoding a pixel; with `skip_bad`, of those that can be read.

    Raises:
        DataError: a header cannot be read, a sample is malformed, or media are gone: how many, and the first of them.
    """
    processor = build_processor(checkpoint, preset)
    counts, gone = [], []
    for number, sample in enumerate(samples):
        try:
            paths = [resolve_path(sample, medium, samples.roots) for medium in sample.media]
            if absent := [path for path in paths if not os.path.isfile(path)]:
                gone.append(f"sample {sample.id}: {absent[0]}")
                continue
            counts.append((sample.id, processor.count(sample, samples.roots)))
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
    return counts


def check_lengths(lengths: Sequence[tuple[str, int]], preset: Preset) -> None:
    """Refuse a run in which samples do not fit, before it starts.

    Args:
        lengths: (id, tokens) of every sample.

    Raises:
        DataError: how many samples are too long, the worst, and what would fit them all.
    """
    seq_length = preset.data.seq_length
    assert seq_length is not None, "a train preset has a sequence length"
    long = [(tokens, name) for name, tokens in lengths if tokens > seq_length]
    if long:
        most, worst = max(long)
        raise DataError(
            f"{len(long)} of {len(lengths)} samples are longer than data.seq_length: "
            f"{worst!r} has {most} tokens, {seq_length} fit",
            hint=f"raise it with --set data.seq_length={-(-most // 16) * 16}, or leave those samples out of the mix",
        )
