"""Clips: from a file to a few frames, from frames to the tiles that the vision tower reads.

Beside image, before packing. Frames stand at `linspace(0, N - 1, count)` truncated to integers, N being the number of
frames; a clip with fewer frames than wanted repeats some. Each frame is scaled until its shorter side is R (bicubic)
and cropped at the centre, bit for bit as transformers' `LlavaNextVideoImageProcessor` (4.57.1) does it. Rotation
noted in the container (phones) is applied. Decoding itself is in `decoding`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.errors import DataError
from llavanext_cli.processing.decoding import Keep, no_frame, read_decord, read_pyav

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, Float64Array, UInt8Array

BACKENDS = ("auto", "pyav", "decord")


def read_frames(
    path: str | Path, count: int, backend: str = "auto", keep: Keep | None = None, strict: bool = False
) -> tuple[AnyArray, Float64Array]:
    """Read frames spread evenly over a clip.

    Args:
        path: the clip.
        count: frames wanted (F), at least 1.
        backend: "pyav" or "decord" alone, or "auto", PyAV and then decord.
        keep: applied to each wanted frame as soon as it is decoded, so that long clips of large frames need no more
            memory than their results; by default the frame itself.
        strict: refuse a clip of which PyAV says that a wanted frame is damaged. Training goes on with what the decoder
            makes of it, because a run must not end there; `mix` does not let such a clip through.

    Returns:
        `uint8[F, H, W, 3]`, upright RGB (or what `keep` made, stacked), and their times, `float64[F]` seconds.

    Raises:
        NoFramesError: no video stream, or no readable frame in it.
        TooLargeError: frames too large or too narrow.
        DataError: no such file, empty, or not a clip.
    """
    import numpy as np

    if count < 1:
        raise ValueError("at least one frame must be asked for")
    if backend not in BACKENDS:
        raise ValueError(f"backend is one of {', '.join(BACKENDS)}, not {backend!r}")
    path = Path(path)
    _check_file(path)
    try:
        kept = read_pyav(path, count, keep, strict) if backend != "decord" else read_decord(path, count, keep)
    except DataError:
        kept = read_decord(path, count, keep) if backend == "auto" and not strict else []
        if not kept:
            raise
    if not kept:
        raise no_frame(path)
    frames, times = zip(*kept, strict=True)
    return np.stack(frames), np.array(times, np.float64)


def load_clip(path: str | Path, count: int, arch: Architecture) -> tuple[UInt8Array, Float64Array]:
    """`read_frames`, of which only tiles are kept (`build_frame`): `uint8[F, 3, R, R]`, and times, `float64[F]`
    seconds. Errors as there."""
    return read_frames(path, count, keep=partial(build_frame, side=arch.vision.image_size))


def build_frame(frame: UInt8Array, side: int) -> UInt8Array:
    """One frame, `uint8[H, W, 3]`, its shorter side scaled to `side` pixels, the centre cropped: `uint8[3, R, R]`."""
    import numpy as np
    from PIL import Image

    height, width = frame.shape[:2]
    shorter = min(height, width)
    new_height, new_width = side * height // shorter, side * width // shorter
    scaled = Image.fromarray(frame).resize((new_width, new_height), Image.Resampling.BICUBIC)
    top, left = (new_height - side) // 2, (new_width - side) // 2
    pixels = np.asarray(scaled)[top : top + side, left : left + side]  # uint8[R, R, 3]
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _check_file(path: Path) -> None:
    if path.is_dir():
        raise DataError(f"{path}: is a folder, not a clip", "name the video file")
    if not path.is_file():
        raise DataError(f"{path}: no such clip", "check the path; in a data file it counts from the data root")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the clip is empty (0 bytes)", "download it again or drop the sample")
