"""Measures a sample before it is written, so that one too large for training is found here.

Between check and convert. The count is that of `processing`: the prompt's words, and what each picture takes by its
size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from llavanext_cli.errors import ConfigError, DataError
from llavanext_cli.mixing.readers import BadRecordError
from llavanext_cli.records import UNITS, Sample, SampleSize

if TYPE_CHECKING:
    from llavanext_cli.processing.processor import Processor


REASONS = ("too_long", "too_many_tiles", "too_many_frames")
"""Why a sample is dropped that has more of something than fits."""


class LengthRule(NamedTuple):
    """How samples are measured, and how large one may be.

    Attributes:
        folder: holds tokenizer.model and config.json.
        max_tokens: None counts only.
        frames: frames of a clip.
        max_tiles, max_frames: of a sample, as the preset has room for; None without a preset.
    """

    folder: str
    max_tokens: int | None
    frames: int
    max_tiles: int | None = None
    max_frames: int | None = None


def plan_lengths(
    tokenizer: Path | None, max_tokens: int | None, preset: str | None, frames: int | None, check: str
) -> tuple[LengthRule | None, int]:
    """The rule for lengths, if one is wanted, and the number of frames of a clip. A preset fills what is not given.

    Raises:
        ConfigError: no such preset, a length without a tokenizer, or a check that reads no sizes.
        CheckpointError: the folder holds no tokenizer, or no config.json.
    """
    room: tuple[int | None, int | None] = (None, None)
    if preset is not None:
        from llavanext_cli.config.presets import load_preset

        data = load_preset(preset).data
        max_tokens = max_tokens or data.seq_length
        room = data.tiles, data.videos * (frames or data.frames) if data.frames else 0
        frames = frames or data.frames
    frames = frames or 16
    if tokenizer is None:
        if max_tokens is not None:
            raise ConfigError(
                "counting tokens needs a tokenizer",
                "add --tokenizer DIR, a folder with tokenizer.model and config.json: llavanext fetch --list has one",
            )
        return None, frames
    if check not in ("header", "full"):
        raise ConfigError(
            f"counting tokens needs the sizes of pictures, and --check {check} reads none", "--check header"
        )
    rule = LengthRule(str(Path(tokenizer).absolute()), max_tokens, frames, *room)
    build_counter(rule)  # what is wrong with the folder is said once, and here
    return rule, frames


def build_counter(rule: LengthRule) -> Processor:
    """The processor that training would use, for counting."""
    from llavanext_cli.config.model_folder import load_architecture
    from llavanext_cli.processing.processor import Processor
    from llavanext_cli.processing.tokens import load_tokenizer

    return Processor(load_architecture(rule.folder), load_tokenizer(rule.folder), frames=rule.frames)


def measure_sample(counter: Processor, sample: Sample) -> SampleSize:
    """Size of a sample whose pictures have their sizes.

    Raises:
        BadRecordError: the prompt cannot be built.
    """
    try:
        return counter.measure(sample)
    except DataError as error:
        raise BadRecordError("placeholders", error.what) from error


def check_size(size: SampleSize, rule: LengthRule) -> None:
    """Raises:
    BadRecordError: the sample is larger than the rule has room for.
    """
    room = (rule.max_tokens, rule.max_tiles, rule.max_frames)
    for has, fits, unit, reason in zip(size, room, UNITS, REASONS, strict=True):
        if fits is not None and has > fits:
            raise BadRecordError(reason, f"the sample has {has} {unit}, and {fits} fit")
