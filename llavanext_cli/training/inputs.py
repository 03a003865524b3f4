"""Count the tokens of every sample before a run, from the sizes that mix recorded or the headers of the media."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.processing.processor import Processor
from llavanext_cli.processing.tokens import load_tokenizer

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset
    from llavanext_cli.mixing.samples import SampleFile
    from llavanext_cli.weights.checkpoint import Checkpoint


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
        DataError: a medium is missing or its header cannot be read, or a sample is malformed.
    """
    processor = build_processor(checkpoint, preset)
    counts = []
    for number, sample in enumerate(samples):
        try:
            counts.append((sample.id, processor.count(sample, samples.roots)))
        except DataError:
            if not skip_bad:
                raise
        if progress and number % 100 == 0:
            progress(number, len(samples))
    if progress:
        progress(len(samples), len(samples))
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
