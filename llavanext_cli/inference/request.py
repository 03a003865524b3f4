"""What `llavanext ask` was asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class AskRequest:
    """One question, a batch or a chat.

    Attributes:
        checkpoint: a folder that `convert` or `train` wrote.
        question: may hold `<image>` and `<video>` placeholders; media without one come first, images before videos.
            For a batch: what to ask about each file of a folder.
        images, videos: files. `-` is an image on stdin; http(s) addresses are downloaded where `allow_url`.
        preset: name or file of an ask preset; None picks one that fits the media and the device at hand.
        overrides: "key.path=value" changes to the preset.
        devices: that share each layer; None: the preset's.
        frames: taken from each video; None: the preset's.
        sampling: fields of `Sampling` that differ from the preset's.
        time_instruction: put the original's sentence about duration and frame times before the question.
        show: an image file for the tiles and frames that the model sees.
        batch: a file of questions (see inputs.py), or a folder of images and videos.
        out: file for the answers of a batch.
        batch_size: questions answered at once.
        force: replace what is at `show` or `out`.
        verbose: show the libraries' warnings.
    """

    checkpoint: Path
    question: str | None = None
    images: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    preset: str | None = None
    overrides: tuple[str, ...] = ()
    devices: int | None = None
    frames: int | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    time_instruction: bool = False
    allow_url: bool = False
    show: Path | None = None
    batch: Path | None = None
    out: Path | None = None
    batch_size: int = 8
    force: bool = False
    verbose: bool = False
