"""Pictures: from a file to uint8 tiles, from uint8 tiles to the numbers that the vision tower reads.

After geometry, which plans the tiles, and before packing, which gives them positions. The pixels equal those of
transformers' `LlavaNextImageProcessor` (4.57.1, the one on PIL, as in llava-hf's preprocessor_config.json: bicubic,
centre crop, CLIP mean and std) bit for bit before normalisation.

Pictures are turned the way their EXIF orientation says before anything else, so that sizes and token counts are those
of the picture as displayed. Transparency is dropped, not blended, as PIL's and transformers' conversion to RGB does.
One thing is done better than there: PIL clips deep grey to 8 bits, which makes most of it white or black; here it is
scaled. Whole numbers beyond 255 (16-bit PNG, TIFF of 16 or 32 bits) are taken for 16-bit ones (`value >> 8`, what PIL
does with 16-bit colour), real numbers that all lie in 0..1 (TIFF) are multiplied by 255.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.config.model_folder import CLIP_MEAN, CLIP_STD
from llavanext_cli.errors import DataError
from llavanext_cli.processing.formats import PICTURE_FORMATS
from llavanext_cli.processing.geometry import Size, TilePlan

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from llavanext_cli.records import Float32Array, UInt8Array

MAX_PIXELS = 178_956_970
"""Greatest picture that is decoded (PIL's own limit against decompression bombs): 0.7 GB, as PIL holds RGB."""

ORIENTATION_TAG = 0x0112
QUARTER_TURNS = (5, 6, 7, 8)
"""EXIF orientations that swap height and width."""
WIDTH_TAG, HEIGHT_TAG = 0x0100, 0x0101
PNG_SIGNATURE_BYTES = 8
PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
"""Chunks that may stand anywhere and may note an orientation (as EXIF or XMP)."""


class TooLargeError(DataError):
    """A picture, or a clip's frames, of a size that is not read."""


def load_image(path: str | Path) -> PILImage.Image:
    """Read a picture as upright RGB. Of an animation the first frame is taken.

    Returns:
        A PIL picture of mode RGB, EXIF orientation applied.

    Raises:
        TooLargeError: more than `MAX_PIXELS` pixels.
        DataError: missing, empty, truncated, corrupt, or not a picture.
    """
    from PIL import ImageOps

    image = _open(path)
    with image:
        _check_pixels(image, path)
        try:
            image.load()
        except Exception as error:  # decoders raise what they like (struct.error, SyntaxError, IndexError, ...)
            raise DataError(
                f"{path}: the picture is corrupt or truncated ({_one_line(error)})",
                "replace the file or drop the sample",
            ) from error
        with contextlib.suppress(Exception):  # a broken EXIF block says nothing about the pixels
            ImageOps.exif_transpose(image, in_place=True)  # without a copy
        return _to_rgb(image)


def read_image_size(path: str | Path) -> Size:
    """(height, width) of a picture as displayed, from its header. Errors as `load_image`.

    No pixel is decoded, unless a PNG has metadata behind its pixels, which only Pillow's decoding reads.
    """
    with _open(path) as image:
        _check_pixels(image, path)
        width, height = image.size
        try:
            if image.format == "TIFF":  # some versions of Pillow have turned the size already, the tags never are
                width, height = image.tag_v2[WIDTH_TAG], image.tag_v2[HEIGHT_TAG]
            turned = _read_orientation(image) in QUARTER_TURNS
        except Exception:  # as in load_image: pixels without a readable EXIF block stay as they lie
            turned = False
        return (width, height) if turned else (height, width)


def _read_orientation(image: PILImage.Image) -> int | None:
    """The orientation that `load_image` applies. The PNG plugin's own `getexif` decodes the picture first."""
    from PIL import Image

    if image.format == "PNG" and not _has_late_metadata(image):
        return Image.Image.getexif(image).get(ORIENTATION_TAG)
    return image.getexif().get(ORIENTATION_TAG)


def _has_late_metadata(image: PILImage.Image) -> bool:
    """Whether an opened PNG has chunks behind its pixels that may hold an orientation. Chunk heads are read only."""
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
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a picture", "name the picture file")
    if not path.is_file():
        raise DataError(f"{path}: no such picture", "check the path; in a data file it counts from the data root")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the picture file is empty (0 bytes)", "download it again or drop the sample")
    try:
        return Image.open(path, formats=list(PICTURE_FORMATS))
    except (UnidentifiedImageError, KeyError) as error:  # KeyError: this Pillow is built without the last of them
        raise DataError(f"{path}: is not a picture", "use JPEG, PNG, WebP, BMP, GIF or TIFF") from error
    except Image.DecompressionBombError as error:
        raise TooLargeError(f"{path}: more than {MAX_PIXELS} pixels, refused", "scale the picture down") from error
    except Exception as error:  # permission, broken header: whatever the plugin that felt addressed raises
        raise DataError(
            f"{path}: cannot be read as a picture ({_one_line(error)})",
            "see that the file is yours to read, else replace it or drop the sample",
        ) from error


def _check_pixels(image: PILImage.Image, path: str | Path) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        what = f"{path}: {height} x {width} pixels, at most {MAX_PIXELS} are read"
        raise TooLargeError(what, "scale the picture down")


def _to_rgb(image: PILImage.Image) -> PILImage.Image:
    """`convert("RGB")`, with deep grey scaled instead of clipped."""
    import numpy as np
    from PIL import Image

    if image.mode == "RGB":
        return image  # all of it is loaded, and the file behind it no longer needed
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.int64)
        if image.mode != "I" or grey.max() > 255:  # plain "I" also carries 8-bit values
            grey = grey.clip(0, 65535) >> 8
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        grey = np.nan_to_num(np.asarray(image))
        grey = grey * 255 if grey.min() >= 0 and grey.max() <= 1 else grey
        image = Image.fromarray(grey.clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


def build_tiles(image: PILImage.Image, plan: TilePlan, arch: Architecture) -> UInt8Array:
    """Cut a picture into the tiles of its plan.

    Args:
        image: RGB, of the size that was planned.
        plan: from `plan_tiles`.

    Returns:
        `uint8[G, 3, R, R]`: the base tile (the whole picture squashed), then the grid's tiles row by row.
    """
    import numpy as np
    from PIL import Image

    if (image.height, image.width) != plan.size:
        raise ValueError(f"the plan is for {plan.size}, the picture has {(image.height, image.width)}")
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
        `float32[G, 3, R, R]`. A byte has 256 values, so the numbers are computed once in double precision and looked
        up.
    """
    import numpy as np

    values = np.arange(256, dtype=np.float64) / 255
    table = ((values - np.array(CLIP_MEAN)[:, None]) / np.array(CLIP_STD)[:, None]).astype(np.float32)  # [3, 256]
    result = np.empty(tiles.shape, np.float32)
    for channel in range(3):
        np.take(table[channel], tiles[:, channel], out=result[:, channel], mode="clip")
    return result
