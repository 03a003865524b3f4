"""Anyres geometry: from an image's size to its tiles and its tokens.

mixing (which counts), image (which cuts) and sample_layout (which places) all use the numbers computed here, so they
cannot differ.

An image of 480 x 640 (height x width), tiles of R = 336 pixels, P = 24 patches a side:

    1. The grid: `select_best_resolution` tries every pinpoint and returns the one that keeps most of the image:
       672 x 672, two rows and two columns of tiles.

    2. The image is resized to fit and centred; the rest is black. An odd border pixel goes to the bottom or the right.

                    672                                   base tile: the whole
        +-----------------------------+  -                image squashed
        |  black, 84 rows             |  | 84             +-----------+
        +--------------+--------------+  -                |           |
        |              :              |  |                |  336x336  |   always tile 0
        |    tile 1    :    tile 2    |  |                |           |
        |- - - - - - - + - - - - - - -|  | 504            +-----------+
        |    tile 3    :    tile 4    |  |
        |              :              |  |                G = 1 + rows * columns = 5 tiles
        +--------------+--------------+  -
        |  black, 84 rows             |  | 84
        +-----------------------------+  -

    3. The grid has 48 x 48 patches. Rows that are entirely black are cut off ("unpad"), which leaves the rectangle
       (top 6, left 0, height 36, width 48). Each of its rows ends with the learned newline `|`.

        base  0 1 2 ... 575                                  576
        grid  (6, 0) (6, 1) ... (6, 47) |                     48 + 1
              (7, 0) (7, 1) ... (7, 47) |                     48 + 1
              ...
              (41,0) (41,1) ... (41,47) |                     48 + 1

       tokens = 576 + 36 * 48 + 36 = 2340

A frame of a video has no grid: its P x P patches are pooled to `frame_side` x `frame_side`, and nothing separates
frames.

All numbers are integers, with one exception. transformers multiplies by a double, `scale = target / original`, and
truncates or rounds up the product: 19 * (336 / 19) is 336.00000000000006 there, and its ceiling is 337. Checkpoints
were trained on those pixels, so `select_best_resolution` and `_resized` repeat exactly these operations (exact integers
would differ for one size in a few thousand). Doubles are the same on every machine.

Source: transformers 4.57.1 `image_processing_utils.select_best_resolution`, `get_patch_output_size`,
`LlavaNextVideoProcessor._get_number_of_features`, `modeling_llava_next_video.unpad_image`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.errors import CheckpointError

Size = tuple[int, int]
"""(height, width), in pixels unless said otherwise."""


@dataclass(frozen=True)
class TilePlan:
    """How one image is cut and how many tokens it takes. Sizes are (height, width).

    Attributes:
        size: the image as displayed, pixels.
        grid: the chosen pinpoint, pixels.
        rows, columns: tiles down and across the grid.
        resized: the image inside the grid, pixels.
        padding_top, padding_left: black pixels above and left of it.
        patch_top, patch_left, patch_height, patch_width: what is left of the grid after unpadding, in patches.
        base_tokens: features of the base tile.
        tokens: positions the image takes in the sequence: base, unpadded grid, one newline after each of its rows.
    """

    size: Size
    grid: Size
    rows: int
    columns: int
    resized: Size
    padding_top: int
    padding_left: int
    patch_top: int
    patch_left: int
    patch_height: int
    patch_width: int
    base_tokens: int
    tokens: int

    @property
    def tiles(self) -> int:
        """Tiles of the image, the base tile among them (its share of G)."""
        return 1 + self.rows * self.columns


def select_best_resolution(size: Size, pinpoints: Sequence[Size]) -> Size:
    """The pinpoint that keeps most of the image's pixels; of equals, the one with the least unused area; of those, the
    first.

    Args:
        size: the image, (height, width) in pixels.
        pinpoints: the grids to choose from, (height, width) in pixels.

    Returns:
        One of the pinpoints. If an image is so thin that no pinpoint keeps a whole row of pixels, the smallest.
    """
    height, width = size
    best = pinpoints[0]
    most_kept, least_wasted = 0, math.inf
    for grid_height, grid_width in pinpoints:
        scale = min(grid_width / width, grid_height / height)
        kept = min(int(width * scale) * int(height * scale), height * width)
        wasted = grid_height * grid_width - kept
        if kept > most_kept or (kept == most_kept and wasted < least_wasted):
            best, most_kept, least_wasted = (grid_height, grid_width), kept, wasted
    return best


def plan_tiles(size: Size, arch: Architecture) -> TilePlan:
    """Plan the tiles of one image.

    Args:
        size: the image as displayed, (height, width) in pixels, both at least 1.
        arch: tile size, patch size and pinpoints.

    Raises:
        CheckpointError: the pinpoint does not consist of whole tiles.
    """
    height, width = size
    if height < 1 or width < 1:
        raise ValueError(f"an image must have at least one pixel, not {height} x {width}")
    side, patches = arch.vision.image_size, arch.vision.patches
    grid_height, grid_width = select_best_resolution(size, arch.image_grid_pinpoints)
    check_grid((grid_height, grid_width), side)
    rows, columns = grid_height // side, grid_width // side

    resized_height, resized_width = _resized((height, width), (grid_height, grid_width))
    padding_top, padding_left = (grid_height - resized_height) // 2, (grid_width - resized_width) // 2

    patch_height, patch_width = patches * rows, patches * columns
    patch_top = patch_left = 0
    if width * patch_height > height * patch_width:  # wider than the grid: rows above and below are black
        patch_top = (patch_height - height * patch_width // width) // 2
        patch_height -= 2 * patch_top
    else:
        patch_left = (patch_width - width * patch_height // height) // 2
        patch_width -= 2 * patch_left

    return TilePlan(
        size=(height, width),
        grid=(grid_height, grid_width),
        rows=rows,
        columns=columns,
        resized=(resized_height, resized_width),
        padding_top=padding_top,
        padding_left=padding_left,
        patch_top=patch_top,
        patch_left=patch_left,
        patch_height=patch_height,
        patch_width=patch_width,
        base_tokens=arch.tile_features,
        tokens=arch.image_tokens(patch_height, patch_width),
    )


def check_grid(grid: Size, side: int) -> None:
    """Raise a `CheckpointError` if a pinpoint does not consist of whole tiles of `side` pixels."""
    if grid[0] % side or grid[1] % side or min(grid) < side:
        raise CheckpointError(
            f"image_grid_pinpoints: {list(grid)} does not consist of whole tiles of {side} x {side} pixels",
            "check image_grid_pinpoints and vision_config.image_size in the checkpoint's config.json",
        )


def _resized(size: Size, grid: Size) -> Size:
    """The largest size of the same aspect that fits the grid; the free side is rounded up, as a double (see
    above)."""
    height, width = size
    scale_width, scale_height = grid[1] / width, grid[0] / height
    if scale_width < scale_height:
        return min(math.ceil(height * scale_width), grid[0]), grid[1]
    return grid[0], min(math.ceil(width * scale_height), grid[1])


def count_video_tokens(frames: int, arch: Architecture) -> int:
    """Positions that a video with this many sampled frames takes in the sequence."""
    return frames * arch.frame_features
