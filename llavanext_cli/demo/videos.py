"""The demo's videos: one sign moves, changes its colour, or appears. H.264, one tile wide and high, two seconds."""

from __future__ import annotations

import random
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from PIL import Image, ImageDraw

from llavanext_cli.demo.images import CELL, COLOURS, GROUND_LEVELS, QUADRANTS, SYMBOLS, draw_sign
from llavanext_cli.demo.model import TILE

DIRECTIONS = {"right": (0, 1), "left": (0, -1), "down": (1, 0), "up": (-1, 0)}
"""Direction of a move as (y, x)."""
FRAMES, RATE = 16, 8


@dataclass(frozen=True)
class DemoVideo:
    """What one video shows.

    Attributes:
        kind: "move", "change" or "appear".
        answer: the direction, the new colour, or the quadrant.
        frames: (symbol, colour, corner) of the sign in each frame, or None where there is none.
        ground: grey level behind the sign.
    """

    kind: str
    answer: str
    frames: tuple[tuple[str, str, tuple[int, int]] | None, ...]
    ground: int


def plan_video(rng: random.Random) -> DemoVideo:
    """A move, a change of colour and an appearance are equally likely, and so are the answers of each. The moment, the
    ground, and the line along which a sign moves vary too."""
    kind = rng.choice(("move", "change", "appear"))
    ground = rng.choice(GROUND_LEVELS)
    symbol, colour = rng.choice(SYMBOLS), rng.choice(sorted(COLOURS))
    if kind == "move":
        answer = rng.choice(sorted(DIRECTIONS))
        line = rng.randint(0, TILE - CELL)
        start, stop = rng.randint(0, FRAMES // 4), rng.randint(FRAMES * 3 // 4, FRAMES - 1)
        shares = [min(max((number - start) / (stop - start), 0.0), 1.0) for number in range(FRAMES)]
        places = [_moved((line, line), DIRECTIONS[answer], share) for share in shares]
        return DemoVideo(kind, answer, tuple((symbol, colour, place) for place in places), ground)
    quadrant = rng.choice(QUADRANTS)
    corner = (0 if quadrant.startswith("top") else CELL, 0 if quadrant.endswith("left") else CELL)
    when = rng.randint(FRAMES // 4, FRAMES * 3 // 4)
    if kind == "appear":
        frames = tuple((symbol, colour, corner) if number >= when else None for number in range(FRAMES))
        return DemoVideo(kind, quadrant, frames, ground)
    other = rng.choice([name for name in sorted(COLOURS) if name != colour])
    frames = tuple((symbol, other if number >= when else colour, corner) for number in range(FRAMES))
    return DemoVideo(kind, other, frames, ground)


def _moved(corner: tuple[int, int], step: tuple[int, int], share: float) -> tuple[int, int]:
    """Where a sign is that has moved a share of its way across the frame; on the other axis it keeps its place."""
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


def write_video(path: Path, plan: DemoVideo) -> None:
    """Encode a video as H.264 in MP4."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=RATE, options={"crf": "12", "preset": "ultrafast"})
        stream.width = stream.height = TILE
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, RATE)
        stream.codec_context.thread_count = 1
        for shown in plan.frames:
            container.mux(stream.encode(av.VideoFrame.from_image(draw_frame(shown, plan.ground))))
        container.mux(stream.encode())
