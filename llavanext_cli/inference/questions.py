"""A question and its media as one sample."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.records import IMAGE_PLACEHOLDER, VIDEO_PLACEHOLDER, Medium, Sample, Turn

if TYPE_CHECKING:
    from llavanext_cli.config.schema import Preset


def build_question(question: str, images: Sequence[Path], videos: Sequence[Path], name: str = "") -> Sample:
    """A question with its media in the order of the placeholders: the first `<image>` is the first image, the first
    `<video>` the first video. Without placeholders images come before videos."""
    media = [*[Medium("image", str(path)) for path in images], *[Medium("video", str(path)) for path in videos]]
    order = media_order(question, [medium.kind for medium in media])
    return Sample(name, "", tuple(media[at] for at in order), (Turn("user", question),))


def media_order(question: str, kinds: Sequence[str]) -> list[int]:
    """Indices of media of these kinds: first those that placeholders of the question name, then the others."""
    left, order = list(range(len(kinds))), []
    for placeholder in re.findall(f"{IMAGE_PLACEHOLDER}|{VIDEO_PLACEHOLDER}", question):
        index = next((index for index in left if kinds[index] == placeholder[1:-1]), None)
        if index is not None:
            left.remove(index)
            order.append(index)
    return order + left


def check_media(sample: Sample, preset: Preset) -> None:
    """Raise a `DataError` when the preset has no room for videos or images, and the sample has some."""
    kinds = {medium.kind for medium in sample.media}
    if "video" in kinds and preset.data.frames == 0:
        raise DataError(f"preset {preset.name} takes no videos", hint="add --frames 16, or use another preset")
    if "image" in kinds and preset.data.tiles == 0:
        raise DataError(f"preset {preset.name} takes no images", hint="add --set data.tiles=5, or use another preset")
