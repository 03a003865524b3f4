"""The demo's pictures: signs on a grey ground, and tags whose pattern is too fine for the base tile.

A picture is planned first (`plan_picture`, values only) and drawn after, so that the questions are asked of the plan
and never of the pixels. There are three kinds:

    one sign                 several signs             a tag

    +---------+---------+    +---------+---------+     A sign is a coloured square with a black symbol. A tag's pattern
    |         | +-----+ |    | +-----+ | +-----+ |     alternates every pixel, so squashing the picture to the base tile
    |         | |  +  | |    | |  o  | | |  #  | |     averages it to an even grey: only a tile at full resolution shows
    |         | +-----+ |    | +-----+ | +-----+ |     which way the lines run. Tags are drawn only on pictures that the
    +---------+---------+    +---------+---------+     base tile halves on both sides.
    |         |         |    |         | +-----+ |
    |         |         |    |         | |  +  | |
    |         |         |    |         | +-----+ |
    +---------+---------+    +---------+---------+

The shade of the ground varies, and no picture that is asked about is among those trained on (data.py sees to it). Of
the tags, a quarter of the combinations of pattern and place is held out altogether (`is_held_out`): training never sees
them, not even on another shade.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from PIL import Image, ImageDraw

from llavanext_cli.demo.model import TILE

COLOURS = {"red": (214, 45, 45), "green": (40, 160, 70), "blue": (45, 85, 215), "yellow": (235, 200, 40)}
SYMBOLS = ("circle", "cross", "triangle", "bars")
QUADRANTS = ("top left", "top right", "bottom left", "bottom right")
PATTERNS = ("vertical", "horizontal", "checkered", "plain")
MOST_SIGNS = 4

CELL = TILE // 2
"""Side of a sign or a tag, pixels: two by two patches."""
GROUND_LEVELS = range(107, 124)
"""Grey levels of the ground. The tower's normalisation takes them close to zero, so what stands on it stands out."""
HELD_OUT_ONE_IN = 4

SIZES = (
    (2 * TILE, 2 * TILE),
    (3 * CELL, 2 * TILE),
    (2 * TILE, 3 * CELL),
    (TILE, 2 * TILE),
    (2 * TILE, TILE),
    (TILE, 3 * TILE),
    (3 * TILE, TILE),
)
"""(height, width) of pictures: 1:1, 3:4, 4:3, 1:2, 2:1, 1:3 and 3:1."""
TAG_SIZE = SIZES[0]
"""(height, width) of pictures with a tag: the base tile halves both sides."""

_TAG_GREY, _TAG_SWING, _TAG_RAMP = 128, 88, 4


@dataclass(frozen=True)
class Sign:
    """A coloured square with a black symbol; `corner` is its top left (y, x) in pixels."""

    symbol: str
    colour: str
    quadrant: str
    corner: tuple[int, int]


@dataclass(frozen=True)
class Tag:
    """A grey square with a fine pattern; `corner` is its top left (y, x) in pixels."""

    pattern: str
    corner: tuple[int, int]


@dataclass(frozen=True)
class Picture:
    """The plan of one picture: `size` is (height, width) in pixels; it has signs, or a tag, on a ground of one grey."""

    size: tuple[int, int]
    signs: tuple[Sign, ...]
    tag: Tag | None = None
    ground: int = 115


def plan_picture(rng: random.Random, held_out: bool) -> Picture:
    """Plan a picture to be asked about (`held_out`) or to train on.

    Half have one sign, a quarter one to four, a quarter a tag. Every symbol, colour, quadrant, number and pattern is as
    likely as the others, among held out tags too.
    """
    kind = rng.choice(("one", "one", "several", "tag"))
    count = 0 if kind == "tag" else 1 if kind == "one" else rng.randint(1, MOST_SIGNS)
    while True:
        picture = _plan_kind(rng, count)
        if picture.tag is None or is_held_out(picture.tag) == held_out:
            return picture


def is_held_out(tag: Tag) -> bool:
    """Whether a tag is kept for questions: a Latin square over patterns and places, so that each is trained on."""
    return (sum(tag.corner) // CELL + PATTERNS.index(tag.pattern)) % HELD_OUT_ONE_IN == 0


def _plan_kind(rng: random.Random, count: int) -> Picture:
    """A picture with `count` signs, or for 0 with a tag."""
    ground = rng.choice(GROUND_LEVELS)
    if count == 0:
        corner = pick_cell(rng, rng.choice(QUADRANTS), TAG_SIZE)
        return Picture(TAG_SIZE, (), Tag(rng.choice(PATTERNS), corner), ground)
    size = rng.choice(SIZES)
    signs = tuple(
        Sign(rng.choice(SYMBOLS), rng.choice(sorted(COLOURS)), quadrant, pick_cell(rng, quadrant, size))
        for quadrant in rng.sample(QUADRANTS, count)
    )
    return Picture(size, signs, ground=ground)


def draw_picture(picture: Picture) -> Image.Image:
    """The picture as RGB, `picture.size` pixels."""
    height, width = picture.size
    image = Image.new("RGB", (width, height), (picture.ground,) * 3)
    draw = ImageDraw.Draw(image)
    for sign in picture.signs:
        draw_sign(draw, sign.symbol, sign.colour, sign.corner)
    if picture.tag:
        _draw_tag(image, picture.tag)
    return image


def pick_cell(rng: random.Random, quadrant: str, size: tuple[int, int]) -> tuple[int, int]:
    """Top left (y, x) in pixels of one of the quadrant's cells; a middle row or column belongs to no quadrant."""
    corner = []
    for side, first in zip(size, (quadrant.startswith("top"), quadrant.endswith("left")), strict=True):
        cells, half = side // CELL, side // CELL // 2
        corner.append(CELL * (rng.randrange(half) if first else cells - 1 - rng.randrange(half)))
    return corner[0], corner[1]


def draw_sign(draw: ImageDraw.ImageDraw, symbol: str, colour: str, corner: tuple[int, int]) -> None:
    """Draw a sign whose top left is `corner` (y, x)."""
    y, x = corner
    draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), fill=COLOURS[colour])
    black = (0, 0, 0)
    if symbol == "circle":
        draw.ellipse((x + 4, y + 4, x + 19, y + 19), fill=black)
    elif symbol == "cross":
        draw.rectangle((x + 9, y + 2, x + 14, y + 21), fill=black)
        draw.rectangle((x + 2, y + 9, x + 21, y + 14), fill=black)
    elif symbol == "triangle":
        draw.polygon(((x + 12, y + 2), (x + 2, y + 21), (x + 21, y + 21)), fill=black)
    elif symbol == "bars":
        draw.rectangle((x + 3, y + 3, x + 8, y + 20), fill=black)
        draw.rectangle((x + 15, y + 3, x + 20, y + 20), fill=black)
    else:
        raise ValueError(f"no such symbol: {symbol}")


def _draw_tag(image: Image.Image, tag: Tag) -> None:
    """A pattern is the product of two signals along y and x: one that alternates every pixel, and one that alternates
    every second pixel, half a step out. Both are odd around the middle of every even pair of pixels, so an even filter
    that halves either side (bicubic is one) takes the product to zero. It swings less near the tag's border, where the
    filter also sees the ground."""
    pixels = image.load()
    top, left = tag.corner
    for y in range(CELL):
        for x in range(CELL):
            inset = min(x, y, CELL - 1 - x, CELL - 1 - y)
            swing = _TAG_SWING * min(inset // 2 + 1, _TAG_RAMP) // _TAG_RAMP
            pixels[left + x, top + y] = (_TAG_GREY + _SIGNALS[tag.pattern](y, x) * swing,) * 3


def _fine(position: int) -> int:
    return 1 - 2 * (position % 2)


def _coarse(position: int) -> int:
    return 1 - 2 * ((position + 1) // 2 % 2)


_SIGNALS = {
    "vertical": lambda y, x: _coarse(y) * _fine(x),
    "horizontal": lambda y, x: _fine(y) * _coarse(x),
    "checkered": lambda y, x: _fine(y) * _fine(x),
    "plain": lambda y, x: 0,
}
