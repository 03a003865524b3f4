"""Images: from a file to uint8 tiles, from uint8 tiles to the numbers that the vision tower reads.

After geometry, which plans the tiles, and before sample_layout, which gives them positions. Before normalisation, the
pixels equal those of transformers' `LlavaNextImageProcessor` bit for bit (4.57.1, the one on PIL, as in llava-hf's
preprocessor_config.json: bicubic, centre crop, CLIP mean and std).

The EXIF orientation is applied first, so that sizes and token counts are those of the image as displayed. Transparency
is dropped, not blended, as in PIL's and transformers' conversion to RGB. One thing differs: PIL clips grey of more than
8 bits, which makes most of it white or black. Here it is scaled: integers beyond 255 (16-bit PNG, TIFF of 16 or 32
bits) are read as 16-bit values (`value >> 8`, which is what PIL does with 16-bit colour), and real numbers that are all
in 0..1 (TIFF) are multiplied by 255.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.model_folder import CLIP_MEAN, CLIP_STD
from llavanext_cli.errors import DataError
from llavanext_cli.processing.formats import IMAGE_FORMATS, check_file
from llavanext_cli.processing.geometry import Size, TilePlan

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from llavanext_cli.records import Float32Array, UInt8Array

MAX_PIXELS = 178_956_970
"""Largest image that is decoded (PIL's own limit against decompression bombs). PIL needs 0.7 GB for it."""

ORIENTATION_TAG = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""
WIDTH_TAG, HEIGHT_TAG = 0x0100, 0x0101
PNG_SIGNATURE_BYTES = 8
PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks that may have an orientation (as EXIF or XMP), before or after the pixels."""


class TooLargeError(DataError):
    """An image or the frames of a video are too large to be read."""


def load_image(path: str | Path) -> PILImage.Image:
    """Read an image as upright RGB. Of an animation, the first frame is read.

    Returns:
        A PIL image of mode RGB, EXIF orientation applied.

    Raises:
        TooLargeError: more than `MAX_PIXELS` pixels.
        DataError: the file is missing, empty, truncated, corrupt, or not an image.
    """
    from PIL import ImageOps

    image = _open(path)
    with image:
        _check_pixels(image, path)
        try:
            image.load()
        except Exception as error:  # decoders raise anything: struct.error, SyntaxError, IndexError, ...
            raise DataError(
                f"{path}: the image is corrupt or truncated ({_one_line(error)})",
                "replace the file or drop the sample",
            ) from error
        with contextlib.suppress(Exception):  # the pixels may be fine although the EXIF block is broken
            ImageOps.exif_transpose(image, in_place=True)
        return _to_rgb(image)


def read_image_size(path: str | Path) -> Size:
    """(height, width) of an image as displayed, from its header. Errors as `load_image`.

    No pixel is decoded, unless a PNG has metadata after its pixels: Pillow reads it only while decoding.
    """
    with _open(path) as image:
        _check_pixels(image, path)
        width, height = image.size
        try:
            if image.format == "TIFF":  # some versions of Pillow swap `size` already
                width, height = image.tag_v2[WIDTH_TAG], image.tag_v2[HEIGHT_TAG]
            turned = _read_orientation(image) in QUARTER_TURNS
        except Exception:  # as in load_image, a broken EXIF block is ignored
            turned = False
        return (width, height) if turned else (height, width)


def _read_orientation(image: PILImage.Image) -> int | None:
    """The orientation that `load_image` applies. The PNG plugin's own `getexif` decodes the image first."""
    from PIL import Image

    if image.format == "PNG" and not _has_late_metadata(image):
        return Image.Image.getexif(image).get(ORIENTATION_TAG)
    return image.getexif().get(ORIENTATION_TAG)


def _has_late_metadata(image: PILImage.Image) -> bool:
    """Whether an opened PNG has chunks after its pixels that may hold an orientation. Reads chunk headers only."""
    file: Any = image.fp  # type: ignore[attr-defined]
    place = file.tell()
    try:
        file.seek(PNG_SIGNATURE_BYTES)
        seen_pixels = False
        while len(head := file.read(8)) == 8:
            length, name = int.from_bytes(head[:4], "big"), head[4:]
            if seen_pixels and name in PNG_METADATA:
                return True
            seen_pixels = seen_pixels or name == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)  # the content and its checksum
        return False
    finally:
        file.seek(place)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _open(path: str | Path) -> PILImage.Image:
    from PIL import Image, UnidentifiedImageError

    path = Path(path)
    check_file(path, "image")
    try:
        return Image.open(path, formats=list(IMAGE_FORMATS))
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: this Pillow lacks the last format
        raise DataError(f"{path}: not an image", "use JPEG, PNG, WebP, BMP, GIF or TIFF") from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{path}: more than {MAX_PIXELS} pixels", "scale the image down") from error
    except Exception as error:  # no permission, or a broken header: each plugin raises its own
        raise DataError(
            f"{path}: cannot be read as an image ({_one_line(error)})",
            "check the file's permissions, replace it, or drop the sample",
        ) from error


def _check_pixels(image: PILImage.Image, path: str | Path) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise TooLargeError(f"{path}: {height} x {width} pixels; the limit is {MAX_PIXELS}", "scale the image down")


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    """`convert("RGB")`, with deep grey scaled instead of clipped."""
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if image.mode != "I" or grey.max() > 255:  # mode "I" may hold 8-bit values
            grey = grey.clip(0, 65535) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.min() >= 0 and grey.max() <= 1 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def build_tiles(image: PILImage.Image, plan: TilePlan, arch: Architecture) -> UInt8Array:
    """Cut an image into the tiles of its plan.

    Args:
        image: RGB, of the size that was planned.
        plan: from `plan_tiles`.

    Returns:
        `uint8[G, 3, R, R]`: the base tile (the whole image squashed), then the grid's tiles row by row.
    """
    import numpy as np
    from PIL import Image

    if (image.height, image.width) != plan.size:
        raise ValueError(f"the plan is for {plan.size}, the image has {(image.height, image.width)}")
    side = arch.vision.image_size
    base = np.asarray(image.resize((side, side), Image.Resampling.BICUBIC))  # uint8[R, R, 3]

    height, width = plan.resized
    grid = np.zeros((*plan.grid, 3), np.uint8)  # black
    inside = np.s_[plan.padding_top : plan.padding_top + height, plan.padding_left : plan.padding_left + width]
    grid[inside] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    tiles = grid.reshape(plan.rows, side, plan.columns, side, 3).swapaxes(1, 2)  # uint8[rows, columns, R, R, 3]
    tiles = tiles.reshape(-1, side, side, 3)
    return np.ascontiguousarray(np.concatenate([base[None], tiles]).transpose(0, 3, 1, 2))


def normalise(tiles: UInt8Array) -> Float32Array:
    """Scale to 0..1, then subtract CLIP's mean and divide by its standard deviation, per channel.

    Args:
        tiles: `uint8[G, 3, R, R]` (tiles or frames).

    Returns:
        `float32[G, 3, R, R]`. The 256 values of a byte are computed once, in double precision, and looked up.
    """
    import numpy as np

    values = np.arange(256, dtype=np.float64) / 255
    table = ((values - np.array(CLIP_MEAN)[:, None]) / np.array(CLIP_STD)[:, None]).astype(np.float32)  # [3, 256]
    result = np.empty(tiles.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], tiles[:, channel], out=result[:, channel], mode="clip")
    return result
