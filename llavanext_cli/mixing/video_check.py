"""Checks a video: header, the frames that training will take, and whether there are as many as the container says.

Training reads `sample_positions(N, frames)` of the N frames whose packets are in the file (`processing.video`). The
full check decodes the same frames with the same decoder, and leaves out what cannot fail: frames that no other frame
refers to are skipped unless they are wanted, there is no deblocking, no pixel is converted. The video is opened once:

    packets   I b b P b b P b b I b b P b b         in the order of the file, b: no frame refers to it
    wanted        *           *           *
    decoded   ├─▶ * ─▶ P ──▶ P ├─▶ I ──▶ *          jump to the next key frame where that is nearer

Where packets have no usable times, or a wanted frame does not decode, training's own reader decides.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from llavanext_cli.errors import DataError
from llavanext_cli.mixing.check_result import CheckResult
from llavanext_cli.processing.decoding import NoFramesError, frame_problem, open_video, sample_positions
from llavanext_cli.processing.image import TooLargeError
from llavanext_cli.processing.video import read_frames

if TYPE_CHECKING:
    from av import Packet
    from av.container import InputContainer
    from av.video.stream import VideoStream

TOLERANCE = 0.05
"""Part of the stated frames, or of the stated duration, that may be missing: edit lists and rounding take some."""

SPARE_FRAMES = 2
SPARE_SECONDS = 0.5

MAX_RATE = 1000.0
"""Frames a second beyond which a header is false."""

MAX_HELD_BYTES = 64 << 20
"""Videos up to this size are read into memory once; of longer ones only the packets' times are kept."""


def check_video(path: str, level: str, frames: int, size_bytes: int) -> CheckResult:
    """Check one video at level "header" or "full".

    Args:
        frames: how many of the video's frames training uses.
        size_bytes: length of the file.
    """
    import av

    try:
        container, stream = open_video(path)
        with container:
            return _check_stream(path, container, stream, level, frames, size_bytes)
    except av.error.FFmpegError as error:
        if isinstance(error, (av.error.FileNotFoundError, av.error.PermissionError, av.error.MemoryError)):
            raise  # removed, no permission, or no memory: not the content's fault
        return CheckResult("corrupt", f"{path}: cannot be read as a video ({error.strerror or error})")
    except NoFramesError as error:
        return CheckResult("no_frames", error.what)
    except TooLargeError as error:
        return CheckResult("too_large", error.what)
    except DataError as error:
        return CheckResult("corrupt", error.what)


def _check_stream(
    path: str, container: InputContainer, stream: VideoStream, level: str, frames: int, size_bytes: int
) -> CheckResult:
    stated = stream.frames
    seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
    if stated and seconds > 0 and stated / seconds > MAX_RATE:
        return CheckResult("false_count", f"{path}: the header says {stated} frames in {seconds:.1f} s")
    stream.codec_context.thread_count = 1  # every core checks its own video
    header = CheckResult(frames=stated, seconds=seconds)
    if stream.width and stream.height and (problem := frame_problem(stream.height, stream.width)):
        return CheckResult("too_large", f"{path}: {problem}")
    if level == "full":
        stream.codec_context.options = {"skip_loop_filter": "all"}
        return _check_frames(path, container, stream, frames, size_bytes, header)
    first = _first_frame(container, stream)
    if first is None:
        return _no_frames(path)
    count = stated or round(seconds * float(stream.average_rate or 0))
    return header._replace(size=_upright_size(first), frames=count)


def _no_frames(path: str) -> CheckResult:
    return CheckResult("no_frames", f"{path}: no readable frame in the video")


def _upright_size(frame: Any) -> tuple[int, int]:
    turned = round(getattr(frame, "rotation", 0) / 90) % 2
    return (frame.width, frame.height) if turned else (frame.height, frame.width)


def _first_frame(container: InputContainer, stream: VideoStream) -> Any:
    import av

    for packet in _packets(container, stream):
        try:
            for frame in packet.decode():
                return frame
        except av.error.FFmpegError:
            continue
    return None


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Packet]:
    """Packets until the end, or until the file is damaged; training's reader stops there too."""
    import av

    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _check_frames(
    path: str, container: InputContainer, stream: VideoStream, frames: int, size_bytes: int, header: CheckResult
) -> CheckResult:
    """Compare the number of frames with the header, then decode what training would."""
    held: list[Packet] = []
    shown: list[int | None] = []
    for packet in _packets(container, stream):
        if packet.size and not packet.is_discard:
            shown.append(packet.pts)
        if size_bytes <= MAX_HELD_BYTES:
            held.append(packet)
    total = len(shown)
    if not total:
        return _no_frames(path)
    if header.frames - total > max(SPARE_FRAMES, TOLERANCE * header.frames):
        return CheckResult("false_count", f"{path}: the header says {header.frames} frames, and {total} are there")
    is_timed = None not in shown and len(set(shown)) == total
    times = sorted(shown) if is_timed else []
    if is_timed and total > 1:
        span = float((times[-1] - times[0]) * stream.time_base) * total / (total - 1)
        if header.seconds - span > max(SPARE_SECONDS, TOLERANCE * header.seconds):
            return CheckResult(
                "false_count", f"{path}: the header says {header.seconds:.1f} s, and {span:.1f} s are there"
            )
    positions = sorted(set(sample_positions(total, frames)))
    if held and is_timed:
        first = _decode_wanted(stream, held, [times[position] for position in positions])
        if first is not None:
            return header._replace(size=_upright_size(first), frames=total)
    return _check_by_reader(path, frames, total, times, stream, header)


def _decode_wanted(stream: VideoStream, packets: list[Packet], wanted: list[int]) -> Any:
    """The first of the frames whose times are in `wanted` (ascending), if all of them decode without an error."""
    import av

    keys = sorted((packet.pts, number) for number, packet in enumerate(packets) if packet.size and packet.is_keyframe)
    key_times = [time for time, _ in keys]
    context, missing, first = stream.codec_context, set(wanted), None
    asked, reached, skipping = frozenset(wanted), 0, None
    try:
        for target in wanted:
            key = bisect_right(key_times, target) - 1
            if target in missing and key >= 0 and keys[key][1] > reached:
                reached = keys[key][1]
                context.flush_buffers()
            while target in missing and reached < len(packets):
                packet = packets[reached]
                reached += 1
                skip = "NONREF" if packet.size and packet.pts not in asked else "DEFAULT"
                if skip != skipping:
                    context.skip_frame = skipping = skip
                for frame in context.decode(packet if packet.size else None):
                    if frame.pts in asked:
                        if frame.is_corrupt:
                            return None
                        first = first or frame
                        missing.discard(frame.pts)
            if target in missing:
                return None
    except av.error.FFmpegError:
        return None
    return first


def _check_by_reader(
    path: str, frames: int, total: int, times: list[int], stream: VideoStream, header: CheckResult
) -> CheckResult:
    """Let training's reader read the video, and compare the times of its frames with those of the packets."""
    sizes, found = read_frames(path, frames, "pyav", _size_of, strict=True)
    if times:
        positions = sample_positions(total, frames)
        expected = [float((times[position] - times[0]) * stream.time_base) for position in positions]
        if not np.allclose(found, expected, rtol=0, atol=1e-3):
            return CheckResult("false_count", f"{path}: some of the {total} frames do not decode")
    return header._replace(size=tuple(sizes[0].tolist()), frames=total)


def _size_of(pixels: np.ndarray) -> np.ndarray:
    """Height and width, in the place of the pixels."""
    return np.array(pixels.shape[:2])
