"""The inputs of the parity suite: images of twelve aspect ratios, several media, videos, and none.

Pixels come from a frozen random stream and need no codec, so that they are the same everywhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
from PIL import Image

from llavanext_cli.processing.geometry import plan_tiles
from llavanext_cli.processing.image import build_tiles
from llavanext_cli.processing.processor import Media, Processor
from llavanext_cli.processing.sample_layout import VideoPlan
from llavanext_cli.processing.video import build_frame
from llavanext_cli.records import EncodedSample, Medium, Sample, Turn

SIZES = (
    *[(28, 28), (56, 56), (40, 60), (60, 40), (20, 200), (200, 20)],
    *[(33, 47), (100, 99), (64, 48), (48, 64), (300, 40), (57, 113)],
)
"""(height, width) of twelve images: every grid of the tiny model, and paddings even and odd on either side."""

FRAMES = 4
QUESTIONS = ("60x40", "two images", "text only", "image and video")
"""Cases that are also asked, for greedy answers of at most `ANSWER_TOKENS` tokens."""
ANSWER_TOKENS = 32


@dataclass(frozen=True)
class Case:
    """One sample and everything either side needs to compute it.

    Attributes:
        name: its row in tables.
        sample: the conversation; the paths of its media are never opened.
        images: `uint8[H, W, 3]` each.
        videos: `uint8[F, H, W, 3]` each.
        encoded: what our processor makes of them.
    """

    name: str
    sample: Sample
    images: tuple[np.ndarray, ...]
    videos: tuple[np.ndarray, ...]
    encoded: EncodedSample

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return [image.shape[:2] for image in self.images]


def image(number: int, size: tuple[int, int]) -> np.ndarray:
    """Coarse blocks under fine noise: a resized, a shifted or a turned image differs in every patch."""
    random = np.random.RandomState(1000 + number)
    coarse = random.randint(0, 256, (5, 7, 3)).astype(np.uint8)
    blocks = np.asarray(Image.fromarray(coarse).resize(size[::-1], Image.Resampling.NEAREST), np.int64)
    return np.clip(blocks + random.randint(-40, 41, (*size, 3)), 0, 255).astype(np.uint8)


def video(number: int, size: tuple[int, int]) -> np.ndarray:
    return np.stack([image(100 * (number + 1) + frame, size) for frame in range(FRAMES)])


def conversations() -> dict[str, tuple[list[str], list[np.ndarray], list[np.ndarray]]]:
    """Name → (turns, images, videos)."""
    cases = {
        f"{height}x{width}": ([f"<image>\nwhat is it, {width}?", "a grey cat on the mat"], [(height, width)], [])
        for height, width in SIZES
    }
    cases["two images"] = (
        ["<image> and <image>\nhow many?", "three of them", "and?", "a ball"],
        [(40, 60), (200, 20)],
        [],
    )
    cases["text only"] = (["what is it? how many birds?", "three of them flew away."], [], [])
    cases["video"] = (["<video>\nwhat is it?", "a red ball"], [], [(40, 60)])
    cases["image and video"] = (["<image> with <video> there?", "the cat, not the ball"], [(57, 113)], [(33, 30)])
    return {
        name: (
            turns,
            [image(number, size) for number, size in enumerate(images, 10 * index)],
            [video(index + number, size) for number, size in enumerate(videos)],
        )
        for index, (name, (turns, images, videos)) in enumerate(cases.items())
    }


def random_conversations(count: int) -> dict[str, tuple[list[str], list[np.ndarray], list[np.ndarray]]]:
    """As `conversations`, drawn: an image, a video, several media in any order, or text; one or two rounds."""
    random = np.random.RandomState(7)
    words = "what is it how many birds are there a grey cat on the mat red ball three of them flew away"
    words = words.split(" ")
    made = {}
    for number in range(count):
        kinds = (["image"], ["video"], ["image", "image"], ["image", "video"], ["video", "image", "image"], [])
        media = kinds[number % len(kinds)]
        say = lambda least: " ".join(random.choice(words, random.randint(least, 12)))  # noqa: E731
        question = " and ".join(f"<{kind}>" for kind in media) + ("\n" if media else "") + say(2)
        turns = [question, say(1)] if number % 3 else [question, say(1), say(1), say(1)]
        sizes = [tuple(int(side) for side in random.randint(20, 160, 2)) for _ in media]
        images = [size for size, kind in zip(sizes, media, strict=True) if kind == "image"]
        videos = [size for size, kind in zip(sizes, media, strict=True) if kind == "video"]
        made[f"random {number}"] = (
            turns,
            [image(1000 * number + place, size) for place, size in enumerate(images)],
            [video(1000 * number + place, size) for place, size in enumerate(videos)],
        )
    return made


def build_cases(
    processor: Processor,
    names: tuple[str, ...] | None = None,
    *,
    question: bool = False,
    talks: dict[str, tuple[list[str], list[np.ndarray], list[np.ndarray]]] | None = None,
) -> list[Case]:
    """Encode the cases, all or the named ones.

    Args:
        question: leave the last answer out, as when the model is asked.
        talks: conversations in the place of this module's own.
    """
    arch = processor.arch
    cases = []
    for name, (turns, images, videos) in (talks or conversations()).items():
        if names is not None and name not in names:
            continue
        kinds = [word for turn in turns for word in re.findall("<(image|video)>", turn)]
        sample = Sample(
            id=name,
            source="",
            media=tuple(Medium(kind, f"{number}") for number, kind in enumerate(kinds)),
            turns=tuple(Turn(("user", "assistant")[n % 2], text) for n, text in enumerate(turns)),
        )
        opened = [Image.fromarray(pixels) for pixels in images]
        plans = [plan_tiles((image.height, image.width), arch) for image in opened]
        side = arch.vision.image_size
        nothing = np.zeros((0, 3, side, side), np.uint8)
        tiles = [build_tiles(image, plan, arch) for image, plan in zip(opened, plans, strict=True)]
        frames = [np.stack([build_frame(frame, side) for frame in pixels]) for pixels in videos]
        of_kind = {"image": iter(plans), "video": iter([VideoPlan(len(pixels)) for pixels in frames])}
        media = Media(
            tuple(next(of_kind[kind]) for kind in kinds),
            np.concatenate([nothing, *tiles]),
            np.concatenate([nothing, *frames]),
        )
        if question:
            sample = Sample(sample.id, "", sample.media, sample.turns[:-1])
            encoded = processor.encode_question(sample, {}, media)
        else:
            encoded = processor.encode(sample, {}, media)
        cases.append(Case(name, sample, tuple(images), tuple(videos), encoded))
    return cases
