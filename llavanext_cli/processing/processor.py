"""From a sample to an `EncodedSample`: media, prompt and layout come together here.

    sample -- prompt --> segments --------------------------+
       |                                                    +-- sample_layout --> ids, labels, feature index
       +-- image, video --> plans, uint8 tiles and frames --+
                                           +-- normalise -----------------------> tiles, frames

Training uses `Processor.encode`, `ask` uses `encode_question`. `measure`, for `mix` and for checks before a run, reads
image headers and decodes nothing.
"""

from __future__ import annotations

import hashlib
import json
import os.path
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.errors import CheckpointError, DataError
from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.image import build_tiles, load_image, normalise, read_image_size
from llavanext_cli.processing.prompt import CONVERSATIONS, Segment, build_question_prompt, build_training_prompt
from llavanext_cli.processing.sample_layout import MediumPlan, VideoPlan, lay_out, measure
from llavanext_cli.processing.tokenizer import Tokenizer
from llavanext_cli.processing.video import load_video
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, EncodedSample, Medium, Sample, SampleSize

if TYPE_CHECKING:
    from llavanext_cli.records import UInt8Array

Roots = Mapping[str, "str | Path"]
"""Data source to the folder that its media paths are relative to; "" stands for every other source."""


@dataclass(frozen=True)
class Media:
    """The decoded media of a sample. A chat keeps them from one question to the next.

    Attributes:
        plans: one for each medium, in order.
        tiles: `uint8[G, 3, R, R]`, of all images.
        frames: `uint8[F, 3, R, R]`, of all videos.
        times: seconds of each frame, for each video in order.
    """

    plans: tuple[MediumPlan, ...]
    tiles: UInt8Array
    frames: UInt8Array
    times: tuple[tuple[float, ...], ...] = ()


@dataclass(frozen=True)
class Processor:
    """Turns samples into numbers for one checkpoint.

    Attributes:
        arch: sizes, pinpoints and token ids.
        tokenizer: of the same checkpoint.
        frames: frames sampled from a video.
    """

    arch: Architecture
    tokenizer: Tokenizer
    frames: int = 16

    def __post_init__(self) -> None:
        for name, token in ((IMAGE_PLACEHOLDER, "image_token_index"), (VIDEO_PLACEHOLDER, "video_token_index")):
            ours, theirs = getattr(self.arch, token), self.tokenizer.added.get(name)
            if name == VIDEO_PLACEHOLDER and ours == self.arch.image_token_index:
                continue  # an image-only model: its config.json has no video_token_index
            if theirs is not None and theirs != ours:
                raise CheckpointError(
                    f"{name} has id {theirs} in the tokenizer, but {token} is {ours} in config.json",
                    "take both files from the same checkpoint",
                )

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hexadecimal, of everything that `measure` depends on besides the sample and its media: two
        processors with the same fingerprint count the same tokens, tiles and frames."""
        arch, tokenizer = self.arch, self.tokenizer
        facts = {
            "tokenizer": asdict(tokenizer)
            | {"model": hashlib.sha256(tokenizer.model).hexdigest(), "special_ids": sorted(tokenizer.special_ids)},
            "tile": [arch.vision.image_size, arch.vision.patches, arch.tile_features],
            "pinpoints": arch.image_grid_pinpoints,
            "frame": arch.frame_features,
            "frames": self.frames,
            "conversation": asdict(CONVERSATIONS[arch.conversation]),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    def encode(self, sample: Sample, roots: Roots, media: Media | None = None) -> EncodedSample:
        """Encode a training sample; answers are supervised.

        Args:
            roots: media folder of each source.
            media: from `load_media`, if they are decoded already.

        Raises:
            DataError: a medium cannot be read, or prompt and media do not match; the message names the sample.
        """
        return self._encode(sample, build_training_prompt(sample, self.arch.conversation), roots, media)

    def encode_question(self, sample: Sample, roots: Roots | None = None, media: Media | None = None) -> EncodedSample:
        """Encode a question. Without placeholders, media come first. Errors as `encode`."""
        return self._encode(sample, build_question_prompt(sample, self.arch.conversation), roots or {}, media)

    def load_media(self, sample: Sample, roots: Roots | None = None) -> Media:
        """Decode the images and videos of a sample. Errors as `encode`."""
        import numpy as np

        self._check_frames(sample)
        side = self.arch.vision.image_size
        plans: list[MediumPlan] = []
        times: list[tuple[float, ...]] = []
        tiles, frames = [np.zeros((0, 3, side, side), np.uint8)], [np.zeros((0, 3, side, side), np.uint8)]
        for medium in sample.media:
            path = resolve_path(sample, medium, roots or {})
            with _name_sample(sample):
                if medium.kind == "image":
                    image = load_image(path)
                    plan = plan_tiles((image.height, image.width), self.arch)
                    tiles.append(build_tiles(image, plan, self.arch))
                    plans.append(plan)
                else:
                    video, seconds = load_video(path, self.frames, self.arch)
                    frames.append(video)
                    times.append(tuple(seconds.tolist()))
                    plans.append(VideoPlan(len(video)))
        return Media(tuple(plans), np.concatenate(tiles), np.concatenate(frames), tuple(times))

    def plan_media(self, sample: Sample, roots: Roots | None = None) -> tuple[MediumPlan, ...]:
        """Tiles and tokens of each medium, from sizes in the sample or in image headers. Decodes no pixel."""
        self._check_frames(sample)
        plans: list[MediumPlan] = []
        for medium in sample.media:
            if medium.kind == "video":
                plans.append(VideoPlan(self.frames))
                continue
            size = medium.size
            if size is None:
                with _name_sample(sample):
                    size = read_image_size(resolve_path(sample, medium, roots or {}))
            plans.append(plan_tiles(size, self.arch))
        return tuple(plans)

    def measure(self, sample: Sample, roots: Roots | None = None) -> SampleSize:
        """Size of the training sample that `encode` would return."""
        return self._measure(sample, build_training_prompt(sample, self.arch.conversation), roots)

    def count_question(self, sample: Sample, roots: Roots | None = None) -> int:
        """Tokens of the prompt that `encode_question` would return."""
        return self._measure(sample, build_question_prompt(sample, self.arch.conversation), roots).tokens

    def _measure(self, sample: Sample, segments: list[Segment], roots: Roots | None) -> SampleSize:
        return measure(segments, self.plan_media(sample, roots), self.tokenizer, self.arch)

    def _check_frames(self, sample: Sample) -> None:
        if self.frames < 1 and any(medium.kind == "video" for medium in sample.media):
            raise DataError(f"sample {sample.id}: has a video, but data.frames is 0", "set data.frames")

    def _encode(self, sample: Sample, segments: list[Segment], roots: Roots, media: Media | None) -> EncodedSample:
        media = media or self.load_media(sample, roots)
        layout = lay_out(segments, media.plans, self.tokenizer, self.arch, sample.id)
        return EncodedSample(
            id=sample.id,
            input_ids=layout.input_ids,
            labels=layout.labels,
            tiles=normalise(media.tiles),
            frames=normalise(media.frames),
            feature_index=layout.feature_index,
        )


def resolve_path(sample: Sample, medium: Medium, roots: Roots) -> str:
    """Path of a medium: an absolute one as it is, a relative one below the root of the sample's source.

    Raises:
        DataError: the path is relative and the source has no root.
    """
    path = os.path.expanduser(medium.path)  # strings, not Paths: a run resolves hundreds of thousands
    if path.startswith("/"):
        return path
    root = roots.get(sample.source, roots.get(""))
    if root is not None:
        return os.path.join(os.path.expanduser(root), path)
    if not sample.source:
        return path  # relative to the working folder
    raise DataError(
        f"sample {sample.id}: no media folder for source {sample.source!r}, needed for {medium.path}",
        f"add it to roots in the header of the samples file, which has: {', '.join(sorted(roots)) or 'none'}",
    )


@contextmanager
def _name_sample(sample: Sample) -> Iterator[None]:
    """Put the sample's id before the message of a `DataError`."""
    try:
        yield
    except DataError as error:
        prefix = f"sample {sample.id}: " if sample.id else ""
        raise DataError(prefix + error.what, error.hint, error.details) from error
