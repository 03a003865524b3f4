"""Decodes the wanted frames of a video, each with its time, by PyAV or decord. video.py scales and crops them.

Both libraries give the same frames, bit for bit. PyAV has wheels for every machine and is faster, so it is tried first;
decord (x86-64 only), where it is installed, tries what PyAV cannot read. 16 frames to tiles, median of five on two busy
x86-64 cores, PyAV and decord: 132 frames of 720p 0.73 s and 1.10 s, 250 frames of 640 x 272 0.57 s and 0.92 s, 15 000
such frames (360 key frames) 0.83 s and 1.13 s.

Containers may be wrong about their number of frames, about times, and about where a seek ends. So the header is not
trusted. PyAV first lists the packets (without decoding), which gives N, the time of each frame and the key frames. If
that list is complete and the wanted frames are far apart, PyAV seeks to the key frame before each and decodes until the
expected time. Otherwise, and whenever a frame is not where it should be, it decodes everything in sequence and counts.
One decoded frame and the `count` results are in memory at a time.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.errors import DataError
from llavanext_cli.processing.formats import VIDEO_FORMATS
from llavanext_cli.processing.image import MAX_PIXELS, TooLargeError

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, UInt8Array

MAX_ASPECT = 100
"""Longer side of a frame divided by the shorter one: a frame is scaled by its shorter side, then cropped."""

FrameTransform = Callable[["UInt8Array"], "AnyArray"]
"""From an upright RGB frame, `uint8[H, W, 3]`, to what the caller needs of it."""

AVFrameTransform = Callable[[Any], "AnyArray"]
"""The same from a frame as PyAV returns it."""


class NoFramesError(DataError):
    """The file has no video stream, or no readable frame in it."""


def sample_positions(total: int, count: int) -> list[int]:
    """Positions of `count` frames spread evenly over `total`, first and last included; some repeat in a short video."""
    import numpy as np

    positions: list[int] = np.linspace(0, total - 1, count).astype(np.int64).tolist()
    return positions


def frame_problem(height: int, width: int) -> str | None:
    """Why frames of this size are not read, because scaling them takes too much memory; else None."""
    if height * width > MAX_PIXELS:
        return f"frames of {height} x {width} pixels; the limit is {MAX_PIXELS}"
    if max(height, width) > MAX_ASPECT * min(height, width):
        return f"frames of {height} x {width} pixels: one side is more than {MAX_ASPECT} times the other"
    return None


def check_frame(path: Path, height: int, width: int) -> None:
    if problem := frame_problem(height, width):
        raise TooLargeError(f"{path}: {problem}", "scale or crop the video, or drop the sample")


def no_frame(path: Path) -> NoFramesError:
    return NoFramesError(f"{path}: no readable frame in the video", "replace the file or drop the sample")


# --- PyAV ---


@dataclass(frozen=True)
class _Index:
    """What the packets say: `times` of all frames in the order they are shown, `keys` those of key frames, in units
    of the stream.

    `times` is empty if times are missing or repeat.
    """

    total: int
    times: list[int]
    keys: list[int]

    def start_of(self, position: int) -> int:
        """Position of the last key frame that is shown no later than the frame at `position`; -1 if there is none."""
        number = bisect_right(self.keys, self.times[position]) - 1
        return bisect_right(self.times, self.keys[number]) - 1 if number >= 0 else -1


def read_pyav(
    path: Path, count: int, frame_transform: FrameTransform | None, strict: bool
) -> list[tuple[AnyArray, float]]:
    """(transformed frame, seconds) for each wanted position."""
    import av

    transform = _from_av(path, frame_transform, strict)
    try:
        index = _index_packets(path)
        frames = _read_seeking(path, sample_positions(index.total, count), index, transform) if index.times else None
        if frames is None:
            frames = _read_in_sequence(path, count, index.total, transform)
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be read as a video ({error.strerror or error})", _FORMAT_HINT) from error
    if not frames:
        raise no_frame(path)
    return frames


_FORMAT_HINT = "use MP4, MKV, WebM, AVI or MOV; replace the file if it should be one"


def open_video(path: str | Path) -> tuple[Any, Any]:
    """Open a video: its container, which the caller closes, and the stream to decode. The only place that opens videos.

    Raises:
        NoFramesError: no video stream.
        DataError: the format is not in `VIDEO_FORMATS`.
        av.error.FFmpegError: the file cannot be opened, or is not a video.
    """
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(VIDEO_FORMATS)}
    try:
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:  # FFmpeg's error for a format that is not on the list
        raise DataError(f"{path}: not a video in a supported format", _FORMAT_HINT) from error
    if not container.streams.video:
        container.close()
        raise NoFramesError(f"{path}: no video stream", "choose a file with a video track")
    stream: Any = container.streams.best("video") or container.streams.video[0]
    stream.thread_type = "AUTO"
    return container, stream


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets until the end, or until the rest of the file cannot be parsed."""
    import av

    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _decoded(packets: Iterator[Any]) -> Iterator[Any]:
    """Frames of packets, in the order they are shown. Packets that cannot be decoded are skipped."""
    import av

    for packet in packets:
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            continue


def _index_packets(path: Path) -> _Index:
    container, stream = open_video(path)
    with container:
        # the last packet is empty and flushes the decoder; discarded ones are decoded but not shown
        packets = [(p.pts, p.is_keyframe) for p in _packets(container, stream) if p.size and not p.is_discard]
    times = [time for time, _ in packets]
    if None in times or len(set(times)) != len(times):
        return _Index(len(packets), [], [])
    return _Index(len(packets), sorted(times), sorted(time for time, is_key in packets if is_key))


def _read_seeking(
    path: Path, positions: list[int], index: _Index, transform: AVFrameTransform
) -> list[tuple[AnyArray, float]] | None:
    """Jump from key frame to key frame. None if that saves nothing, or if a frame is missing at its time."""
    import av

    wanted = sorted(set(positions))
    starts = [index.start_of(position) for position in wanted]
    if min(starts) < 0 or 2 * _seeking_cost(wanted, starts) > index.total:
        return None
    found: dict[int, tuple[AnyArray, float]] = {}
    container, stream = open_video(path)
    with container:
        frames: Iterator[Any] = iter(())
        reached = -1  # position of the last decoded frame
        for position, start in zip(wanted, starts, strict=True):
            if start > reached:
                try:
                    container.seek(index.times[start], stream=stream)
                except av.error.FFmpegError:
                    return None
                frames = _decoded(_packets(container, stream))
            target = index.times[position]
            frame = next((f for f in frames if f.pts is None or f.pts >= target), None)
            if frame is None or frame.pts != target or frame.is_corrupt:
                return None
            found[position] = (transform(frame), float((target - index.times[0]) * stream.time_base))
            reached = position
    return _in_order(found, positions)


def _seeking_cost(wanted: list[int], starts: list[int]) -> int:
    """Frames to decode: from the last key frame, or from the last wanted frame if that is nearer."""
    before = [-1, *wanted]
    return sum(position - max(start, last) for position, start, last in zip(wanted, starts, before, strict=False))


def _read_in_sequence(
    path: Path, count: int, expected: int, transform: AVFrameTransform
) -> list[tuple[AnyArray, float]]:
    """Decode everything; if the number of frames is not the expected one, do it again with the right number."""
    found: dict[int, tuple[AnyArray, float]] = {}
    for _ in range(2):
        positions = sample_positions(max(expected, 1), count)
        found, total = _collect(path, set(positions), transform)
        if total == expected:
            break
        expected = total
    return _in_order(found, positions) if found else []


def _collect(
    path: Path, wanted: set[int], transform: AVFrameTransform
) -> tuple[dict[int, tuple[AnyArray, float]], int]:
    """The wanted frames by position, and the number of all frames."""
    found: dict[int, tuple[AnyArray, float]] = {}
    total, start = 0, None
    container, stream = open_video(path)
    rate = float(stream.average_rate or 0)
    with container:
        for frame in _decoded(_packets(container, stream)):
            if start is None:
                start = frame.pts
            if total in wanted:
                timed = frame.pts is not None and start is not None
                seconds = float((frame.pts - start) * stream.time_base) if timed else total / rate if rate else 0.0
                found[total] = (transform(frame), seconds)
            total += 1
    return found, total


def _in_order(found: dict[int, tuple[AnyArray, float]], positions: list[int]) -> list[tuple[AnyArray, float]]:
    """One entry for each position. A position that was never reached gets the nearest frame before it, or the first."""
    have = sorted(found)
    return [found[have[max(bisect_right(have, position) - 1, 0)]] for position in positions]


def _from_av(path: Path, frame_transform: FrameTransform | None, strict: bool) -> AVFrameTransform:
    """Turns a PyAV frame into upright RGB, `uint8[H, W, 3]`, then applies `frame_transform`."""
    import numpy as np
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # creating one costs more than converting a small frame

    def transform(frame: Any) -> AnyArray:
        check_frame(path, frame.height, frame.width)
        if strict and frame.is_corrupt:
            raise DataError(f"{path}: one of the sampled frames is damaged", "replace the file or drop the sample")
        pixels: AnyArray = reformatter.reformat(frame, format="rgb24").to_ndarray()
        if turns := round(frame.rotation / 90):  # degrees, counter-clockwise
            pixels = np.ascontiguousarray(np.rot90(pixels, turns))
        return frame_transform(pixels) if frame_transform else pixels

    return transform


# --- decord ---


def read_decord(path: Path, count: int, frame_transform: FrameTransform | None) -> list[tuple[AnyArray, float]]:
    """As `read_pyav`; empty if decord is not installed or fails, or if `open_video` fails."""
    import av

    decord = _import_decord()
    if decord is None:
        return []
    decord.logging.set_level(decord.logging.QUIET)
    try:
        open_video(path)[0].close()  # checks the format: decord would open a playlist
        reader = decord.VideoReader(str(path), num_threads=1)
        positions = sample_positions(len(reader), count)
        found = {}
        for position in sorted(set(positions)):
            pixels = reader[position].asnumpy()
            if pixels.shape[2] != 3:  # decord takes the padding of rows under 64 pixels for more channels
                return []
            check_frame(path, *pixels.shape[:2])
            pixels = frame_transform(pixels) if frame_transform else pixels
            found[position] = (pixels, float(reader.get_frame_timestamp(position)[0]))
        return _in_order(found, positions)
    except (decord.DECORDError, av.error.FFmpegError, RuntimeError, IndexError, ValueError):
        return []


def _import_decord() -> Any:
    """decord, or None if it is not installed or cannot be loaded. There are wheels for x86-64 only.

    Its library contains an old C++ runtime. Loaded with RTLD_GLOBAL, as decord does, MindSpore would call into that
    runtime and abort. So it is loaded with RTLD_LOCAL.
    """
    import ctypes
    from unittest import mock

    try:
        with mock.patch.object(ctypes, "RTLD_GLOBAL", ctypes.RTLD_LOCAL):
            import decord
    except (ImportError, OSError):
        return None
    return decord
