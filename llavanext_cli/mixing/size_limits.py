"""Counts the tokens, tiles and frames of a sample before it is written, so that one too large for training is found.

`Processor.measure` counts, as it does in training: the words of the prompt, and what each medium takes by its size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llavanext_cli.errors import ConfigError, DataError
from llavanext_cli.mixing.readers import BadRecordError
from llavanext_cli.records import UNITS, Sample, SampleSize

if TYPE_CHECKING:
    from llavanext_cli.processing.processor import Processor

DEFAULT_FRAMES = 16
REASONS = ("too_long", "too_many_tiles", "too_many_frames")
"""Why a sample is rejected that has more tokens, tiles or frames than fit."""


class SizeLimits(NamedTuple):
    """How samples are counted, and how large one may be.

    Attributes:
        folder: has tokenizer.model and config.json.
        frames: frames of a video; 0 if the preset has no room for videos.
        max_tokens, max_tiles, max_frames: of a sample; None does not limit.
    """

    folder: str
    frames: int
    max_tokens: int | None = None
    max_tiles: int | None = None
    max_frames: int | None = None


def plan_size_limits(
    tokenizer: Path | None, max_tokens: int | None, preset: str | None, frames: int | None, check: str
) -> tuple[SizeLimits | None, int]:
    """The limits, if samples are counted at all, and the frames of a video. A preset gives what is None.

    Raises:
        ConfigError: no such preset, a limit without a tokenizer, or a check that reads no sizes.
    """
    max_tiles = max_frames = None
    if preset is not None:
        from llavanext_cli.config.presets import load_preset

        data = load_preset(preset).data
        max_tokens = max_tokens or data.seq_length
        max_tiles, max_frames = data.tiles, data.videos * (frames or data.frames) if data.frames else 0
        frames = frames or data.frames
    counted_frames = DEFAULT_FRAMES if frames is None else frames  # 0 if a preset says so: train counts with it too
    frames = frames or DEFAULT_FRAMES  # for the check, which decodes at least one
    if tokenizer is None:
        if max_tokens is not None:
            raise ConfigError(
                "counting tokens needs a tokenizer",
                "add --tokenizer DIR, a folder with tokenizer.model and config.json: llavanext fetch --list has one",
            )
        return None, frames
    if check not in ("header", "full"):
        raise ConfigError(
            f"counting tokens needs the sizes of images, and --check {check} reads none", "--check header"
        )
    return SizeLimits(str(tokenizer.absolute()), counted_frames, max_tokens, max_tiles, max_frames), frames


def build_counter(limits: SizeLimits) -> Processor:
    """The processor that training would use, for counting.

    Raises:
        CheckpointError: the folder has no tokenizer, or no config.json.
    """
    from llavanext_cli.config.model_folder import load_architecture
    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokenizer import load_tokenizer

    return Processor(load_architecture(limits.folder), load_tokenizer(limits.folder), frames=limits.frames)


def measure_sample(counter: Processor, sample: Sample) -> SampleSize:
    """Size of a sample whose images have their sizes.

    Raises:
        BadRecordError: the prompt cannot be built, or there is no room for videos.
    """
    if not counter.frames and any(medium.kind == "video" for medium in sample.media):
        raise BadRecordError("too_many_frames", "the sample has a video, and 0 frames fit")
    try:
        return counter.measure(sample)
    except DataError as error:
        raise BadRecordError("placeholders", error.what) from error


def check_size(size: SampleSize, limits: SizeLimits) -> None:
    """Raises:
    BadRecordError: the sample is larger than the limits.
    """
    allowed = (limits.max_tokens, limits.max_tiles, limits.max_frames)
    for actual, limit, unit, reason in zip(size, allowed, UNITS, REASONS, strict=True):
        if limit is not None and actual > limit:
            raise BadRecordError(reason, f"the sample has {actual} {unit}, and {limit} fit")
