"""The demo's clips: one sign that moves, changes its colour, or appears. H.264, one tile wide and high, two seconds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image, ImageDraw

from llavanext_cli.demo.model import TILE
from llavanext_cli.demo.pictures import CELL, COLOURS, GROUND_LEVELS, QUADRANTS, SYMBOLS, draw_sign

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
"""Direction of a move as (y, x)."""
CLIP_FRAMES, RATE = 16, 8


@dataclass(frozen=True)
class Clip:
    """The plan of one clip.

    Attributes:
        kind: "move", "change" or "appear".
        answer: the direction, the new colour, or the quadrant.
        frames: what each frame shows: (symbol, colour, corner), or None for nothing.
        ground: grey level behind the sign.
    """

    kind: str
    answer: str
    frames: tuple[tuple[str, str, tuple[int, int]] | None, ...]
    ground: int


def plan_clip(rng: random.Random) -> Clip:
    """A move, a change of colour and an appearance are equally likely, and so are the answers of each. When it happens,
    the ground, and the line along which a sign moves vary too."""
    kind = rng.choice(("move", "change", "appear"))
    ground = rng.choice(GROUND_LEVELS)
    symbol, colour = rng.choice(SYMBOLS), rng.choice(sorted(COLOURS))
    if kind == "move":
        answer = rng.choice(sorted(DIRECTIONS))
        line = rng.randint(0, TILE - CELL)
        start, stop = rng.randint(0, CLIP_FRAMES // 4), rng.randint(CLIP_FRAMES * 3 // 4, CLIP_FRAMES - 1)
        shares = [min(max((number - start) / (stop - start), 0.0), 1.0) for number in range(CLIP_FRAMES)]
        places = [_on_the_way((line, line), DIRECTIONS[answer], share) for share in shares]
        return Clip(kind, answer, tuple((symbol, colour, place) for place in places), ground)
    quadrant = rng.choice(QUADRANTS)
    corner = (0 if quadrant.startswith("top") else CELL, 0 if quadrant.endswith("left") else CELL)
    when = rng.randint(CLIP_FRAMES // 4, CLIP_FRAMES * 3 // 4)
    if kind == "appear":
        frames = tuple((symbol, colour, corner) if number >= when else None for number in range(CLIP_FRAMES))
        return Clip(kind, quadrant, frames, ground)
    other = rng.choice([name for name in sorted(COLOURS) if name != colour])
    frames = tuple((symbol, other if number >= when else colour, corner) for number in range(CLIP_FRAMES))
    return Clip(kind, other, frames, ground)


def _on_the_way(corner: tuple[int, int], step: tuple[int, int], share: float) -> tuple[int, int]:
    """Where a sign that crosses the frame is, when it has gone `share` of its way; along the other side it stays."""
    way = TILE - CELL
    place = [
        c if s == 0 else round(way * share) if s > 0 else round(way * (1 - share))
        for c, s in zip(corner, step, strict=True)
    ]
    return place[0], place[1]


def draw_frame(shown: tuple[str, str, tuple[int, int]] | None, ground: int) -> Image.Image:
    """One frame as RGB."""
    image = Image.new("RGB", (TILE, TILE), (ground,) * 3)
    if shown:
        draw_sign(ImageDraw.Draw(image), *shown)
    return image


def write_clip(path: Path, clip: Clip) -> None:
    """Encode a clip as H.264 in MP4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "12", "preset": "ultrafast"})
        stream.width = stream.height = TILE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, RATE)
        stream.codec_context.thread_count = 1
        for shown in clip.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(draw_frame(shown, clip.ground))))
        container.mux(stream.encode())
