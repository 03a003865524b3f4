"""Videos: from a file to a few frames, from frames to the tiles that the vision tower reads.

Beside image, before sample_layout. The sampled frames are `linspace(0, N - 1, count)` truncated to integers, N being
the number of frames; a video with fewer frames than wanted repeats some. Each frame is scaled until its shorter side is
R (bicubic) and cropped at the centre, bit for bit as in transformers' `LlavaNextVideoImageProcessor` (4.57.1). Rotation
noted in the container (phones) is applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from llavanext_cli.config.architecture import Architecture
from llavanext_cli.errors import DataError
from llavanext_cli.processing.decoding import FrameTransform, no_frame, open_video, read_decord, read_pyav
from llavanext_cli.processing.formats import check_file

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, Float64Array, UInt8Array

BACKENDS = ("auto", "pyav", "decord")


def read_frames(
    path: str | Path,
    count: int,
    backend: str = "auto",
    frame_transform: FrameTransform | None = None,
    strict: bool = False,
) -> tuple[AnyArray, Float64Array]:
    """Read frames spread evenly over a video.

    Args:
        path: the video.
        count: frames wanted (F), at least 1.
        backend: "pyav", "decord", or "auto": PyAV, then decord.
        frame_transform: applied to each wanted frame as soon as it is decoded, so that only results stay in memory.
        strict: refuse a video if PyAV reports that a wanted frame is damaged, as `mix` does. Training uses what the
            decoder returns, because a damaged frame must not end a run.

    Returns:
        `uint8[F, H, W, 3]`, upright RGB (or the results of `frame_transform`, stacked), and times, `float64[F]`
        seconds.

    Raises:
        NoFramesError: no video stream, or no readable frame in it.
        TooLargeError: frames are too large or too narrow.
        DataError: the file is missing, empty, or not a video.
    """
    import numpy as np

    if count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, not {backend!r}")
    path = Path(path)
    check_file(path, "video")
    try:
        if backend == "decord":
            found = read_decord(path, count, frame_transform)
        else:
            found = read_pyav(path, count, frame_transform, strict)
    except DataError:
        found = read_decord(path, count, frame_transform) if backend == "auto" and not strict else []
        if not found:
            raise
    if not found:
        raise no_frame(path)
    frames, times = zip(*found, strict=True)
    return np.stack(frames), np.array(times, np.float64)


def load_video(path: str | Path, count: int, arch: Architecture) -> tuple[UInt8Array, Float64Array]:
    """Frames scaled and cropped by `build_frame`, `uint8[F, 3, R, R]`, and times, `float64[F]` seconds. Errors as
    `read_frames`."""
    return read_frames(path, count, frame_transform=partial(build_frame, side=arch.vision.image_size))


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


def describe_times(path: str | Path, times: Sequence[float]) -> str:
    """The original LLaVA-NeXT-Video's sentence about a video: how long it is and when its frames were sampled.

    Args:
        path: the video; its header has the duration of the last frame.
        times: seconds of each frame, the video's first and last frame among them.
    """
    container, stream = open_video(path)
    with container:
        rate = float(stream.average_rate or 0)
    seconds = times[-1] + (1 / rate if rate else 0.0)
    places = ",".join(f"{moment:.2f}s" for moment in times)
    return (
        f"The video lasts for {seconds:.2f} seconds, and {len(times)} frames are uniformly sampled from it. "
        f"These frames are located at {places}.Please answer the following questions related to this video."
    )
