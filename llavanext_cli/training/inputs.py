"""Count the tokens of every sample before a run, from the sizes that mix recorded or the headers of the media."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

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
) -> list[tuple[str, int]]:
    """(id, tokens) of every sample, without decoding a pixel.

    Raises:
        DataError: a medium is missing or its header cannot be read, or a sample is malformed.
    """
    processor = build_processor(checkpoint, preset)
    counts = []
    for number, sample in enumerate(samples):
        counts.append((sample.id, processor.count(sample, samples.roots)))
        if progress and number % 100 == 0:
            progress(number, len(samples))
    if progress:
        progress(len(samples), len(samples))
    return counts
