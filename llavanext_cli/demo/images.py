"""The demo's images: signs on a grey ground, and tags whose pattern is too fine for the base tile.

An image is planned first (`plan_image`, values only) and drawn later, so that questions and answers come from the plan
and never from the pixels. There are three kinds:

    one sign                 several signs             a tag

    +---------+---------+    +---------+---------+     A sign is a coloured square with a black symbol. A tag's pattern
    |         | +-----+ |    | +-----+ | +-----+ |     alternates every pixel, so squashing the image to the base tile
    |         | |  +  | |    | |  o  | | |  #  | |     averages it to an even grey: only a tile at full resolution shows
    |         | +-----+ |    | +-----+ | +-----+ |     which way the lines run. Tags are drawn only on images that the
    +---------+---------+    +---------+---------+     base tile halves on both sides.
    |         |         |    |         | +-----+ |
    |         |         |    |         | |  +  | |
    |         |         |    |         | +-----+ |
    +---------+---------+    +---------+---------+

The shade of the ground varies, and no image that is asked about is also trained on (see data.py). A quarter of the
combinations of a tag's pattern and place is held out (`is_held_out`): training never sees them, on any shade.
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
"""Grey levels of the ground. Normalisation makes them almost zero, so that signs stand out."""
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
"""(height, width) of images: 1:1, 3:4, 4:3, 1:2, 2:1, 1:3 and 3:1."""
TAG_SIZE = SIZES[0]
"""(height, width) of images with a tag: the base tile halves both sides."""

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
class DemoImage:
    """What one image shows: signs, or a tag, on a ground of one grey. `size` is (height, width) in pixels."""

    size: tuple[int, int]
    signs: tuple[Sign, ...]
    tag: Tag | None = None
    ground: int = 115


def plan_image(rng: random.Random, held_out: bool) -> DemoImage:
    """Plan an image to be asked about (`held_out`) or to train on.

    Half of the images have one sign, a quarter one to four, a quarter a tag. All symbols, colours, quadrants, numbers
    and patterns are equally likely, also among the held-out tags.
    """
    kind = rng.choice(("one", "one", "several", "tag"))
    count = 0 if kind == "tag" else 1 if kind == "one" else rng.randint(1, MOST_SIGNS)
    while True:
        plan = _plan_kind(rng, count)
        if plan.tag is None or is_held_out(plan.tag) == held_out:
            return plan


def is_held_out(tag: Tag) -> bool:
    """Whether a tag is kept for questions: a Latin square, so that training sees each pattern and each place."""
    return (sum(tag.corner) // CELL + PATTERNS.index(tag.pattern)) % HELD_OUT_ONE_IN == 0


def _plan_kind(rng: random.Random, count: int) -> DemoImage:
    """An image with `count` signs, or with a tag for 0."""
    ground = rng.choice(GROUND_LEVELS)
    if count == 0:
        corner = pick_cell(rng, rng.choice(QUADRANTS), TAG_SIZE)
        return DemoImage(TAG_SIZE, (), Tag(rng.choice(PATTERNS), corner), ground)
    size = rng.choice(SIZES)
    signs = tuple(
        Sign(rng.choice(SYMBOLS), rng.choice(sorted(COLOURS)), quadrant, pick_cell(rng, quadrant, size))
        for quadrant in rng.sample(QUADRANTS, count)
    )
    return DemoImage(size, signs, ground=ground)


def draw_image(plan: DemoImage) -> Image.Image:
    """The image as RGB, `plan.size` pixels."""
    height, width = plan.size
    image = Image.new("RGB", (width, height), (plan.ground,) * 3)
    draw = ImageDraw.Draw(image)
    for sign in plan.signs:
        draw_sign(draw, sign.symbol, sign.colour, sign.corner)
    if plan.tag:
        _draw_tag(image, plan.tag)
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
    else:  # bars
        draw.rectangle((x + 3, y + 3, x + 8, y + 20), fill=black)
        draw.rectangle((x + 15, y + 3, x + 20, y + 20), fill=black)


def _draw_tag(image: Image.Image, tag: Tag) -> None:
    """A pattern is the product of two signals along y and x: one that alternates every pixel, and one that alternates
    every second pixel, half a step out. Both are odd around the middle of every even pair of pixels, so that an even
    filter that halves either side, such as bicubic, gives zero. The contrast falls near the tag's border, where the
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
