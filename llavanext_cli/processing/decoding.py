"""Clips: the wanted frames of a file, decoded by PyAV or decord.

Beneath video, which scales and crops what comes out.

Two readers give the same frames to the bit: PyAV, which has wheels for every machine, and decord, which has them for
x86-64 only. PyAV reads, everywhere: all machines then read alike, and it was the faster one. A clip that it cannot
read is tried with decord, where that is installed. 16 frames to tiles, median of five on two busy x86-64 cores, PyAV
against decord: of 132 frames of 720p 0.73 s and 1.10 s, of 250 frames of 640 x 272 0.57 s and 0.92 s, of 15 000 such
frames (360 key frames) 0.83 s and 1.13 s.

Containers lie: about their number of frames, about times, about where a seek ends. So the header is not asked. PyAV
first lists the packets (no decoding), which gives N, the time of each frame and the key frames. Where that list is
sound and the wanted frames are far apart, it seeks to the key frame before each and decodes up to the very time
expected; in every other case, and whenever a frame is not where it should be, it decodes in sequence and counts for
itself. What is kept at a time is one decoded frame and the `count` results.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llavanext_cli.errors import DataError
from llavanext_cli.processing.formats import CLIP_FORMATS
from llavanext_cli.processing.image import MAX_PIXELS, TooLargeError

if TYPE_CHECKING:
    from llavanext_cli.records import AnyArray, UInt8Array

MAX_ASPECT = 100
"""How many times the shorter side the longer may be: a frame is scaled by its shorter side, then cropped."""

Keep = Callable[["UInt8Array"], "AnyArray"]
"""What is kept of a decoded `uint8[H, W, 3]` frame."""

KeepFrame = Callable[[Any], "AnyArray"]
"""The same, of a frame as PyAV hands it out."""


class NoFramesError(DataError):
    """A clip without a video stream, or without a readable frame in it."""


def sample_positions(total: int, count: int) -> list[int]:
    """Positions of `count` frames spread over a clip of `total`, first and last included; some repeat if it is
    short."""
    import numpy as np

    positions: list[int] = np.linspace(0, total - 1, count).astype(np.int64).tolist()
    return positions


def frame_problem(height: int, width: int) -> str | None:
    """Why frames of this size are not read, or None: scaling them would take more memory than a clip is worth."""
    if height * width > MAX_PIXELS:
        return f"frames of {height} x {width} pixels, at most {MAX_PIXELS} are read"
    if max(height, width) > MAX_ASPECT * min(height, width):
        return f"frames of {height} x {width} pixels, one side more than {MAX_ASPECT} times the other"
    return None


def check_frame(path: Path, height: int, width: int) -> None:
    if problem := frame_problem(height, width):
        raise TooLargeError(f"{path}: {problem}", "scale or crop the clip, or drop the sample")


def no_frame(path: Path) -> NoFramesError:
    return NoFramesError(f"{path}: no readable frame in the clip", "replace the file or drop the sample")


# --- PyAV ---


@dataclass(frozen=True)
class _Index:
    """What the packets say: `times` of all frames in the order they are shown, `keys` those of key frames (stream
    units).

    Empty `times`: nothing to rely on, because times are missing or repeat.
    """

    total: int
    times: list[int]
    keys: list[int]

    def start_of(self, position: int) -> int:
        """Position of the last key frame that is shown no later than the frame at `position`; -1 if there is none."""
        number = bisect_right(self.keys, self.times[position]) - 1
        return bisect_right(self.times, self.keys[number]) - 1 if number >= 0 else -1


def read_pyav(path: Path, count: int, keep: Keep | None, strict: bool) -> list[tuple[Any, float]]:
    """(kept frame, seconds) for each wanted position."""
    import av

    keep_frame = _keeper(path, keep, strict)
    try:
        index = _index_packets(path)
        kept = _read_seeking(path, sample_positions(index.total, count), index, keep_frame) if index.times else None
        if kept is None:
            kept = _read_in_sequence(path, count, index.total, keep_frame)
    except av.error.FFmpegError as error:
        raise DataError(f"{path}: cannot be read as a clip ({error.strerror or error})", _FORMAT_HINT) from error
    if not kept:
        raise no_frame(path)
    return kept


_FORMAT_HINT = "use MP4, MKV, WebM, AVI or MOV; replace the file if it should be one"


def open_clip(path: str | Path) -> tuple[Any, Any]:
    """Open a clip: its container, to be closed, and the stream whose frames are taken. All clips are opened here.

    Raises:
        NoFramesError: no video stream.
        DataError: a format that is none of `CLIP_FORMATS`.
        av.error.FFmpegError: the file cannot be opened, or is none of a clip.
    """
    import av

    options = {"protocol_whitelist": "file", "format_whitelist": ",".join(CLIP_FORMATS)}
    try:
        container = av.open(f"file:{path}", options=options, metadata_errors="replace")
    except av.error.ArgumentError as error:  # what FFmpeg says of a format that is not on the list
        raise DataError(f"{path}: is not a clip of a known format", _FORMAT_HINT) from error
    if not container.streams.video:
        container.close()
        raise NoFramesError(f"{path}: has no video stream", "give a clip with a picture track")
    stream: Any = container.streams.best("video") or container.streams.video[0]
    stream.thread_type = "AUTO"
    return container, stream


def _packets(container: Any, stream: Any) -> Iterator[Any]:
    """Packets until the end, or until the file makes no more sense."""
    import av

    try:
        yield from container.demux(stream)
    except av.error.FFmpegError:
        return


def _decoded(packets: Iterator[Any]) -> Iterator[Any]:
    """Frames of packets, in the order they are shown; what cannot be decoded is passed over."""
    import av

    for packet in packets:
        try:
            yield from packet.decode()
        except av.error.FFmpegError:
            continue


def _index_packets(path: Path) -> _Index:
    container, stream = open_clip(path)
    with container:
        # the last packet is an empty one that flushes the decoder; discarded ones are decoded but not shown
        packets = [(p.pts, p.is_keyframe) for p in _packets(container, stream) if p.size and not p.is_discard]
    times = [time for time, _ in packets]
    if None in times or len(set(times)) != len(times):
        return _Index(len(packets), [], [])
    return _Index(len(packets), sorted(times), sorted(time for time, is_key in packets if is_key))


def _read_seeking(
    path: Path, positions: list[int], index: _Index, keep_frame: KeepFrame
) -> list[tuple[Any, float]] | None:
    """Jump from key frame to key frame. None where that is no gain, or where a frame was not met at its time."""
    import av

    wanted = sorted(set(positions))
    starts = [index.start_of(position) for position in wanted]
    if min(starts) < 0 or 2 * _seeking_cost(wanted, starts) > index.total:
        return None
    kept: dict[int, tuple[Any, float]] = {}
    container, stream = open_clip(path)
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
            kept[position] = (keep_frame(frame), float((target - index.times[0]) * stream.time_base))
            reached = position
    return _in_order(kept, positions)


def _seeking_cost(wanted: list[int], starts: list[int]) -> int:
    """Frames to decode: from the last key frame, or from the last wanted frame where that is nearer."""
    before = [-1, *wanted]
    return sum(position - max(start, last) for position, start, last in zip(wanted, starts, before, strict=False))


def _read_in_sequence(path: Path, count: int, expected: int, keep_frame: KeepFrame) -> list[tuple[Any, float]]:
    """Decode from first to last. Where another number of frames came than was expected, do it again with that
    number."""
    kept: dict[int, tuple[Any, float]] = {}
    for _ in range(2):
        positions = sample_positions(max(expected, 1), count)
        kept, total = _collect(path, set(positions), keep_frame)
        if total == expected:
            break
        expected = total
    return _in_order(kept, positions) if kept else []


def _collect(path: Path, wanted: set[int], keep_frame: KeepFrame) -> tuple[dict[int, tuple[Any, float]], int]:
    """The wanted frames by position, and the number of all frames."""
    kept: dict[int, tuple[Any, float]] = {}
    total, start = 0, None
    container, stream = open_clip(path)
    rate = float(stream.average_rate or 0)
    with container:
        for frame in _decoded(_packets(container, stream)):
            if start is None:
                start = frame.pts
            if total in wanted:
                timed = frame.pts is not None and start is not None
                seconds = float((frame.pts - start) * stream.time_base) if timed else total / rate if rate else 0.0
                kept[total] = (keep_frame(frame), seconds)
            total += 1
    return kept, total


def _in_order(kept: dict[int, tuple[Any, float]], positions: list[int]) -> list[tuple[Any, float]]:
    """One entry a position; a position that was never reached gets the nearest frame before it, or the first."""
    have = sorted(kept)
    return [kept[have[max(bisect_right(have, position) - 1, 0)]] for position in positions]


def _keeper(path: Path, keep: Keep | None, strict: bool) -> KeepFrame:
    """From a PyAV frame to upright RGB, `uint8[H, W, 3]`, and through `keep`."""
    import numpy as np
    from av.video.reformatter import VideoReformatter

    reformatter = VideoReformatter()  # one for all frames: making one costs more than converting a small frame

    def keep_frame(frame: Any) -> AnyArray:
        check_frame(path, frame.height, frame.width)
        if strict and frame.is_corrupt:
            raise DataError(f"{path}: a frame that training takes is damaged", "replace the file or drop the sample")
        pixels: AnyArray = reformatter.reformat(frame, format="rgb24").to_ndarray()
        if turn := round(frame.rotation / 90):  # degrees, counter-clockwise
            pixels = np.ascontiguousarray(np.rot90(pixels, turn))
        return keep(pixels) if keep else pixels

    return keep_frame


# --- decord ---


def read_decord(path: Path, count: int, keep: Keep | None) -> list[tuple[Any, float]]:
    """As `read_pyav`; nothing where decord is not installed or gives up, or where PyAV would not open the file."""
    import av

    decord = _import_decord()
    if decord is None:
        return []
    decord.logging.set_level(decord.logging.QUIET)
    try:
        open_clip(path)[0].close()  # decord itself would follow a playlist
        reader = decord.VideoReader(str(path), num_threads=1)
        positions = sample_positions(len(reader), count)
        kept = {}
        for position in sorted(set(positions)):
            pixels = reader[position].asnumpy()
            if pixels.shape[2] != 3:  # it takes the padding of rows narrower than 64 pixels for further channels
                return []
            check_frame(path, *pixels.shape[:2])
            kept[position] = (keep(pixels) if keep else pixels, float(reader.get_frame_timestamp(position)[0]))
        return _in_order(kept, positions)
    except (decord.DECORDError, av.error.FFmpegError, RuntimeError, IndexError, ValueError):
        return []


def _import_decord() -> Any:
    """decord, or None where it is not installed or does not load. There are wheels for x86-64 only.

    Its library holds an old C++ runtime and would offer it to the whole process; MindSpore, imported later, would call
    into that and abort. So the library is loaded for itself alone.
    """
    import ctypes
    from unittest import mock

    try:
        with mock.patch.object(ctypes, "RTLD_GLOBAL", ctypes.RTLD_LOCAL):
            import decord
    except (ImportError, OSError):
        return None
    return decord
