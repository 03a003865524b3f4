"""An image of exactly what the model saw: each image's base tile and grid of tiles, each video's frames.

    base   │ tile tile       frame frame frame frame
           │ tile tile       0.0 s 1.3 s 2.7 s 4.0 s

The pixels are those that the vision tower gets, before they are normalised, with black borders and crops.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.errors import DataError
from llavanext_cli.files import replacing
from llavanext_cli.processing.sample_layout import VideoPlan

if TYPE_CHECKING:
    from PIL import Image

    from llavanext_cli.config.architecture import Architecture
    from llavanext_cli.processing.processor import Media

COLUMNS = 8
"""Frames in a row."""
GAP, MARGIN, CAPTION = 4, 12, 18
"""Pixels between tiles, around everything, and for a line of text."""
LEAST_SIDE = 112
"""Smaller tiles are enlarged by a whole factor."""
PAPER, INK = (255, 255, 255), (60, 60, 60)


def write_contact_sheet(path: Path, media: Media, arch: Architecture, names: Sequence[str]) -> None:
    """Draw a contact sheet to a file, whole or not at all; the suffix decides the format.

    Raises:
        DataError: the file cannot be written.
    """
    if not path.suffix:
        raise DataError(f"{path} has no suffix, so its format is unknown", f"use --show {path}.png")
    try:
        with replacing(path) as partial:
            draw_contact_sheet(media, arch, names).save(partial)
    except (OSError, ValueError) as fault:  # ValueError: an unknown suffix
        reason = fault.strerror if isinstance(fault, OSError) and fault.strerror else str(fault)
        raise DataError(f"{path} cannot be written: {reason}", "use a name such as --show sheet.png") from fault


def draw_contact_sheet(media: Media, arch: Architecture, names: Sequence[str]) -> Image.Image:
    """Draw a question's decoded media, one block below another, as RGB.

    Args:
        media: from `Processor.load_media`.
        arch: of the checkpoint.
        names: one caption for each medium.
    """
    side = arch.vision.image_size
    factor = -(-LEAST_SIDE // side)
    blocks: list[Image.Image] = []
    tiles_before = frames_before = videos = 0
    for plan, name in zip(media.plans, names, strict=True):
        if isinstance(plan, VideoPlan):
            frames = media.frames[frames_before : frames_before + plan.frames]
            captions = [f"{seconds:.1f} s" for seconds in media.times[videos]]
            blocks.append(_block(f"{name}: {len(frames)} frames", frames, COLUMNS, factor, captions))
            frames_before, videos = frames_before + plan.frames, videos + 1
            continue
        tiles = media.tiles[tiles_before : tiles_before + plan.tiles]
        tiles_before += plan.tiles
        base = _block(f"{name}: base tile", tiles[:1], 1, factor)
        grid = _block(f"{plan.rows} x {plan.columns} tiles", tiles[1:], plan.columns, factor)
        blocks.append(_beside(base, grid))
    return _stack(blocks)


def _block(
    title: str, pixels: Sequence, columns: int, factor: int, captions: Sequence[str] = ()
) -> Image.Image:  # pixels: uint8[T, 3, R, R]
    """Tiles in rows under a title, each with its caption below."""
    from PIL import Image, ImageDraw

    side = pixels.shape[-1] * factor
    step = side + GAP + (CAPTION if captions else 0)
    rows = -(-len(pixels) // columns)
    width = min(columns, len(pixels)) * (side + GAP) - GAP
    block = Image.new("RGB", (max(width, 9 * len(title)), CAPTION + rows * step), PAPER)
    draw = ImageDraw.Draw(block)
    draw.text((0, 2), title, fill=INK)
    for number, tile in enumerate(pixels):
        left, top = number % columns * (side + GAP), CAPTION + number // columns * step
        image = Image.fromarray(tile.transpose(1, 2, 0)).resize((side, side), Image.Resampling.NEAREST)
        block.paste(image, (left, top))
        if captions:
            draw.text((left + 2, top + side + 2), captions[number], fill=INK)
    return block


def _beside(left: Image.Image, right: Image.Image) -> Image.Image:
    from PIL import Image

    both = Image.new("RGB", (left.width + 4 * GAP + right.width, max(left.height, right.height)), PAPER)
    both.paste(left, (0, 0))
    both.paste(right, (left.width + 4 * GAP, 0))
    return both


def _stack(blocks: Sequence[Image.Image]) -> Image.Image:
    from PIL import Image

    width = max((block.width for block in blocks), default=0) + 2 * MARGIN
    sheet = Image.new("RGB", (width, sum(block.height + MARGIN for block in blocks) + MARGIN), PAPER)
    top = MARGIN
    for block in blocks:
        sheet.paste(block, (MARGIN, top))
        top += block.height + MARGIN
    return sheet
