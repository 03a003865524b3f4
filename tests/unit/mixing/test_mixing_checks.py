"""Checks of pictures and clips at every level: good ones with their sizes, bad ones with their reason."""

from __future__ import annotations

import os
import resource
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from llavanext_cli.mixing import video_check
from llavanext_cli.mixing.check_result import CheckResult, FileState
from llavanext_cli.mixing.checks import check_file, stat_file

IMAGE_LEVELS = ["header", "full"]


def picture(path: Path, size: tuple[int, int] = (30, 20), **options) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    Image.fromarray(pixels).save(path, **options)
    return path


def check(path: Path, level: str, kind: str = "image", frames: int = 4) -> CheckResult:
    return check_file(kind, str(path), level, frames)


# --- exists


def test_exists(tmp_path):
    path = picture(tmp_path / "a.png")
    assert stat_file(str(path)) == FileState(path.stat().st_size, path.stat().st_mtime_ns)
    (tmp_path / "link.png").symlink_to(path)
    assert isinstance(stat_file(str(tmp_path / "link.png")), FileState)


def test_what_is_not_there(tmp_path):
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    os.mkfifo(tmp_path / "pipe")
    picture(tmp_path / "a.png")
    reasons = {
        "none.jpg": "missing",
        "a.png/b.png": "missing",
        "empty.jpg": "empty_file",
        "": "not_a_file",
        "pipe": "not_a_file",
        "one": "link_loop",
        "x" * 300: "bad_path",
        "nul\0": "bad_path",
    }
    for name, reason in reasons.items():
        verdict = stat_file(f"{tmp_path}/{name}")
        assert isinstance(verdict, CheckResult) and verdict.reason == reason, name
        assert verdict.detail


def test_no_permission(tmp_path, monkeypatch):
    path = picture(tmp_path / "a.png")
    path.chmod(0)
    monkeypatch.setattr(os, "access", lambda name, mode: name != str(path))  # root may read everything
    assert stat_file(str(path)).reason == "unreadable"
    monkeypatch.undo()
    monkeypatch.setattr(os, "stat", lambda name: (_ for _ in ()).throw(PermissionError(13, "Permission denied", name)))
    assert stat_file(str(path)).reason == "unreadable"


# --- pictures


@pytest.mark.parametrize("level", IMAGE_LEVELS)
@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.webp", "a.bmp"])
def test_good_pictures(tmp_path, level, name):
    assert check(picture(tmp_path / name), level) == CheckResult(size=(20, 30))


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_a_gif_named_jpg_is_a_picture(tmp_path, level):
    picture(tmp_path / "a.gif").rename(tmp_path / "a.jpg")
    assert check(tmp_path / "a.jpg", level).size == (20, 30)


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_sizes_are_those_displayed(tmp_path, level):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert check(picture(tmp_path / "a.jpg", exif=exif), level).size == (30, 20)


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_a_text_is_no_picture(tmp_path, level):
    (tmp_path / "a.jpg").write_text("<html>404</html>")
    verdict = check(tmp_path / "a.jpg", level)
    assert verdict.reason == "corrupt" and "a.jpg" in verdict.detail


def test_a_truncated_picture_has_a_header_and_does_not_decode(tmp_path):
    path = picture(tmp_path / "a.jpg", (300, 200))
    path.write_bytes(path.read_bytes()[:5000])
    assert check(path, "header") == CheckResult(size=(200, 300))
    assert check(path, "full").reason == "corrupt"


def test_a_file_that_goes_away(tmp_path):
    assert check(tmp_path / "gone.jpg", "full").reason == "missing"
    (tmp_path / "empty.jpg").touch()
    assert check(tmp_path / "empty.jpg", "header").reason == "empty_file"


@pytest.mark.parametrize(("fault", "reason"), [(OSError(5, "I/O error"), "unreadable"), (MemoryError(), "crashed")])
def test_what_the_machine_does_not_manage_is_not_blamed_on_the_picture(tmp_path, monkeypatch, fault, reason):
    path = picture(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda *_, **__: (_ for _ in ()).throw(fault))
    assert check(path, "header").reason == reason
    assert check(path, "full").reason == reason


def png_header(path: Path, width: int, height: int) -> Path:
    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    head = part(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = part(b"IDAT", zlib.compress(bytes(1000)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + body + part(b"IEND", b""))
    return path


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_no_decompression_bomb(tmp_path, level):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    verdict = check(png_header(tmp_path / "a.png", 60_000, 60_000), level)
    assert verdict.reason == "too_large" and "pixels" in verdict.detail
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 << 10, "KiB"


# --- clips


@pytest.mark.parametrize("level", IMAGE_LEVELS)
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("b.mp4", "mpeg4"), ("c.webm", "libvpx")]
)
@pytest.mark.parametrize("frames", [1, 4, 40])
def test_good_clips(write_clip, level, name, codec, frames):
    verdict = check(write_clip(name, 30, codec=codec), level, "video", frames)
    assert verdict.reason == "" and verdict.size == (96, 128) and verdict.frames == 30
    assert verdict.seconds == pytest.approx(3.0, abs=0.15)


def test_the_quick_way_decides_without_the_slow_one(write_clip, monkeypatch):
    monkeypatch.setattr(video_check, "read_frames", None)
    for key_every in (1, 12, 250):
        assert check(write_clip(f"{key_every}.mp4", 60, key_every=key_every), "full", "video", 7).reason == ""


def test_large_clips_are_not_held_in_memory(write_clip, monkeypatch):
    path = write_clip("a.mp4", 30)
    monkeypatch.setattr(video_check, "MAX_HELD_BYTES", 10)
    assert check(path, "full", "video") == CheckResult(size=(96, 128), frames=30, seconds=3.0)
    monkeypatch.setattr(video_check, "_decode_wanted", None)
    assert check(path, "full", "video").frames == 30


@pytest.mark.parametrize("level", ["header", "full"])
def test_a_clip_that_training_would_refuse_for_its_shape(write_clip, level):
    verdict = check(write_clip("thin.mkv", 3, size=(2, 4096), codec="ffv1"), level, "video")
    assert verdict.reason == "too_large" and "frames of 2 x 4096 pixels" in verdict.detail


def test_a_rotated_clip_has_the_size_displayed(write_clip):
    path = write_clip("a.mp4", 10)
    data = bytearray(path.read_bytes())
    matrix = data.index(struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 1 << 30), data.index(b"tkhd"))
    data[matrix : matrix + 36] = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    for level in IMAGE_LEVELS:
        assert check(path, level, "video").size == (128, 96)


@pytest.mark.parametrize("level", IMAGE_LEVELS)
@pytest.mark.parametrize(
    "content", [b"this is no clip\n" * 100, b"\0" * 4096, b"\x00\x00\x00\x20ftypisom" + b"\0" * 500]
)
def test_a_text_is_no_clip(tmp_path, level, content):
    (tmp_path / "a.mp4").write_bytes(content)
    assert check(tmp_path / "a.mp4", level, "video").reason in ("corrupt", "no_frames")


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_sound_alone_is_no_clip(tmp_path, level):
    import av

    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    assert check(tmp_path / "a.mp4", level, "video").reason == "no_frames"


def patch_count(path: Path, frames: int) -> None:
    """Let the tables of an MP4 claim so many frames: entries of stts and stsz."""
    data = bytearray(path.read_bytes())
    for table, place in ((b"stts", 12), (b"stsz", 12)):
        at = data.index(table) + place
        data[at : at + 4] = struct.pack(">I", frames)
    path.write_bytes(data)


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_a_clip_that_claims_a_million_frames(write_clip, level):
    path = write_clip("a.mp4", 30)
    patch_count(path, 1_000_000)
    assert check(path, level, "video").reason in ("false_count", "corrupt", "no_frames")


def test_a_clip_cut_off_has_a_header_and_too_few_frames(write_clip):
    """With its index in front, as files for the web have it, a truncated download opens like a whole one."""
    path = write_clip("a.mkv", 120)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 3])
    assert check(path, "header", "video").reason == ""
    assert check(path, "full", "video").reason == "false_count"


def test_a_clip_whose_end_does_not_decode(write_clip):
    path = write_clip("a.mp4", 60, size=(192, 256), key_every=60)
    data = bytearray(path.read_bytes())
    start = data.index(b"mdat")
    end = len(data) - 5000 if data.index(b"moov") < start else data.index(b"moov") - 4
    for position in range(start + (end - start) // 2, end):
        data[position] = 0xFF
    path.write_bytes(data)
    assert check(path, "header", "video").reason == ""
    assert check(path, "full", "video", 8).reason in ("false_count", "corrupt")


def write_noise(path: Path, *streams: tuple[int, int]) -> Path:
    """A clip of 60 frames of noise, with a stream for each (width, height); the last one is the default stream."""
    import av
    from av.stream import Disposition

    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        written = []
        for width, height in streams:
            stream = container.add_stream("libx264", rate=12)
            stream.width, stream.height, stream.pix_fmt, stream.gop_size = width, height, "yuv420p", 12
            stream.disposition = Disposition.default if (width, height) == streams[-1] else Disposition(0)
            written.append(stream)
        for _ in range(60):
            for stream in written:
                pixels = random.integers(0, 60, (stream.height, stream.width, 3), np.uint8)
                container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        for stream in written:
            container.mux(stream.encode())
    return path


def test_a_frame_that_its_decoder_calls_damaged(tmp_path):
    """The decoder fills the hole and continues. Training would take the frame, so that it must come out here."""
    import av

    from llavanext_cli.processing.video import read_frames

    path = write_noise(tmp_path / "a.mp4", (160, 128))
    assert check(path, "full", "video", 16).reason == ""
    with av.open(str(path)) as container:
        packets = [(packet.pts, packet.pos) for packet in container.demux(video=0) if packet.size]
    _, place = sorted(packets)[7]  # the positions are 0, 3, 7, ...
    data = bytearray(path.read_bytes())
    data[place + 16 : place + 216] = bytes(200)
    path.write_bytes(data)
    verdict = check(path, "full", "video", 16)
    assert verdict.reason == "corrupt" and "one of the sampled frames is damaged" in verdict.detail
    assert check(path, "full", "video", 2).reason == "", "frames 0 and 59 are whole"
    assert len(read_frames(path, 16)[0]) == 16


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_of_several_streams_the_one_that_training_reads(tmp_path, level):
    from llavanext_cli.processing.video import read_frames

    path = write_noise(tmp_path / "a.mkv", (64, 64), (160, 128))
    assert read_frames(path, 2)[0].shape[1:3] == (128, 160)
    assert check(path, level, "video").size == (128, 160)


@pytest.mark.parametrize("level", IMAGE_LEVELS)
def test_a_playlist_is_no_clip(write_clip, tmp_path, level):
    path = tmp_path / "b.mp4"
    path.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{write_clip('a.mp4')}\n#EXT-X-ENDLIST\n")
    assert check(path, level, "video").reason == "corrupt"


def test_what_passes_here_is_read_by_training(write_clip):
    """The check and the reader agree on which frames there are."""
    from llavanext_cli.processing.decoding import sample_positions
    from llavanext_cli.processing.video import read_frames

    path = write_clip("a.mp4", 50)
    verdict = check(path, "full", "video", 16)
    frames, times = read_frames(path, 16)
    assert frames.shape == (16, *verdict.size, 3)
    assert [round(time * 10) for time in times] == sample_positions(verdict.frames, 16)


MISLEADING = "178956970, no video stream, no readable frame"


@pytest.mark.parametrize("level", IMAGE_LEVELS)
@pytest.mark.parametrize(("name", "kind"), [("a.jpg", "image"), ("a.mp4", "video")])
def test_the_words_of_a_path_are_no_verdict(tmp_path, level, name, kind):
    path = tmp_path / MISLEADING / name
    path.parent.mkdir()
    path.write_text("ffconcat version 1.0\nfile a.ts\n")  # a playlist
    assert check(path, level, kind).reason == "corrupt"


def test_frames_that_only_the_reader_finds_too_large(write_clip, monkeypatch):
    """As where a header has no size, or frames grow within a clip."""
    from llavanext_cli.processing import decoding

    monkeypatch.setattr(video_check, "_decode_wanted", lambda *_: None)
    path = write_clip("a.mp4", 30)
    monkeypatch.setattr(decoding, "MAX_PIXELS", 100)
    monkeypatch.setattr(video_check, "frame_problem", lambda *_: None)
    assert check(path, "full", "video").reason == "too_large"
