"""Videos: which frames are read, that every way of reading gives the same, containers that lie, and what is refused."""

import dataclasses
import struct
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from llavanext_cli.config.architecture import Architecture, VisionArchitecture
from llavanext_cli.errors import DataError
from llavanext_cli.processing import decoding, video
from llavanext_cli.processing.decoding import NoFramesError, sample_positions
from llavanext_cli.processing.image import TooLargeError
from llavanext_cli.processing.video import build_frame, load_video, read_frames

ARCH = Architecture(vision=VisionArchitecture(image_size=56, patch_size=14))


def decode_all(path) -> np.ndarray:
    """Every frame, the plainest way."""
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_positions():
    assert sample_positions(132, 16) == [0, 8, 17, 26, 34, 43, 52, 61, 69, 78, 87, 96, 104, 113, 122, 131]
    assert sample_positions(3, 6) == [0, 0, 0, 1, 1, 2]
    assert sample_positions(1, 3) == [0, 0, 0]
    assert sample_positions(50, 1) == [0]


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize(
    ("name", "codec"), [("a.mp4", "libx264"), ("a.mkv", "libx264"), ("b.mp4", "mpeg4"), ("c.webm", "libvpx")]
)
@pytest.mark.parametrize("count", [1, 4, 30, 40])
def test_the_frames_at_the_positions(write_clip, backend, name, codec, count):
    if backend == "decord":
        pytest.importorskip("decord")
    path = write_clip(name, 30, codec=codec)
    frames, times = read_frames(path, count, backend)
    positions = sample_positions(30, count)
    assert frames.dtype == np.uint8
    assert np.array_equal(frames, decode_all(path)[positions])
    assert times.dtype == np.float64
    assert np.abs(times - np.array(positions) / 10).max() < 2e-3


@pytest.mark.parametrize(("key_every", "seeks"), [(5, True), (300, False)])
def test_far_apart_frames_are_sought_and_the_same(write_clip, monkeypatch, key_every, seeks):
    path = write_clip(frames=300, size=(32, 48), key_every=key_every)
    sequential = []
    original = decoding._collect
    monkeypatch.setattr(decoding, "_collect", lambda *args: sequential.append(1) or original(*args))
    frames, times = read_frames(path, 6)
    assert bool(sequential) is not seeks
    assert np.array_equal(frames, decode_all(path)[sample_positions(300, 6)])
    assert times.tolist() == pytest.approx([p / 10 for p in sample_positions(300, 6)])


def test_a_seek_that_ends_elsewhere_is_noticed(write_clip, monkeypatch):
    path = write_clip(frames=200, size=(32, 48), key_every=4)
    index = decoding._index_packets(path)
    # each time but the last lies a little before the one noted, so that a seek meets the frame after the wanted one
    shifted = decoding._Index(index.total, [time + 1 for time in index.times[:-1]] + index.times[-1:], [])
    shifted = dataclasses.replace(shifted, keys=[time + 1 for time in index.keys])
    monkeypatch.setattr(decoding, "_index_packets", lambda _: shifted)
    frames, _ = read_frames(path, 5)
    assert np.array_equal(frames, decode_all(path)[sample_positions(200, 5)])


@pytest.mark.parametrize("claimed", [0, 7, 1000])
def test_a_wrong_number_of_frames_is_noticed(write_clip, monkeypatch, claimed):
    path = write_clip(frames=20)
    monkeypatch.setattr(decoding, "_index_packets", lambda _: decoding._Index(claimed, [], []))
    frames, _ = read_frames(path, 5)
    assert np.array_equal(frames, decode_all(path)[sample_positions(20, 5)])


def test_a_stream_without_times(write_clip):
    # a bare H.264 stream has no container: no length, no times
    path = write_clip("bare.h264", 24)
    assert decoding._index_packets(path).times == []
    frames, times = read_frames(path, 4)
    assert np.array_equal(frames, decode_all(path)[sample_positions(24, 4)])
    assert (np.diff(times) > 0).all()


def test_a_title_that_is_not_utf8(write_clip):
    # old encoders write Latin-1; libx264's mp4 names the muxer
    path = write_clip("title.mp4", 24)
    sound, _ = read_frames(path, 4)
    data = path.read_bytes()
    assert data.count(b"Lavf") == 1
    path.write_bytes(data.replace(b"Lavf", b"caf\xe9"))
    frames, _ = read_frames(path, 4)
    assert np.array_equal(frames, sound)


def test_a_video_that_was_cut_off_gives_the_frames_it_has(write_clip):
    path = write_clip("cut.mkv", 60, size=(240, 320), key_every=10)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    left = decode_all(path)
    assert 5 < len(left) < 60
    frames, _ = read_frames(path, 6)
    assert np.array_equal(frames, left[sample_positions(len(left), 6)])


def test_a_damaged_middle_is_passed_over(write_clip):
    path = write_clip("hole.mkv", 60, size=(240, 320), key_every=10)
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 300] = bytes(300)
    path.write_bytes(data)
    frames, times = read_frames(path, 8)
    assert frames.shape == (8, 240, 320, 3)
    assert (np.diff(times) >= 0).all()


MATRICES = {  # 16.16 fixed point (a, b, c, d of the track's display matrix), and NumPy's equivalent
    90: ((0, 1, -1, 0), -1),
    180: ((-1, 0, 0, -1), 2),
    270: ((0, -1, 1, 0), 1),
}


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("backend", ["pyav", "decord"])
def test_rotation_noted_in_the_container(write_clip, degrees, backend):
    if backend == "decord":
        pytest.importorskip("decord")
    path = write_clip(frames=6)
    stored = decode_all(path)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    (a, b, c, d), turns = MATRICES[degrees]
    data[at : at + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    frames, _ = read_frames(path, 3, backend)
    assert np.array_equal(frames, np.rot90(stored, turns, axes=(1, 2))[sample_positions(6, 3)])


@pytest.mark.parametrize("size", [(96, 128), (128, 96), (100, 100), (31, 200), (57, 58)])
def test_frames_are_scaled_and_cropped(size):
    frame = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    built = build_frame(frame, 56)
    assert built.shape == (3, 56, 56)
    height, width = [56 * n // min(size) for n in size]
    scaled = np.asarray(Image.fromarray(frame).resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - 56) // 2, (width - 56) // 2
    assert np.array_equal(built.transpose(1, 2, 0), scaled[top : top + 56, left : left + 56])


def test_load_video_keeps_only_tiles(write_clip):
    path = write_clip(frames=12)
    tiles, times = load_video(path, 5, ARCH)
    frames, expected = read_frames(path, 5)
    assert np.array_equal(tiles, [build_frame(frame, 56) for frame in frames])
    assert np.array_equal(times, expected)


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
def test_frames_that_would_fill_the_memory_are_refused(write_clip, backend):
    """4096 x 2 pixels, scaled to a tile of 336, would be 688 128 pixels wide."""
    if backend == "decord":
        pytest.importorskip("decord")
    path = write_clip("thin.mkv", 3, size=(2, 4096), codec="ffv1")
    with pytest.raises(TooLargeError) as caught:
        read_frames(path, 2, backend)
    assert caught.value.what == f"{path}: frames of 2 x 4096 pixels: one side is more than 100 times the other"
    assert caught.value.hint


def test_large_frames_are_refused_before_they_are_converted(write_clip, monkeypatch):
    monkeypatch.setattr(decoding, "MAX_PIXELS", 1000)
    with pytest.raises(DataError, match="frames of 64 x 96 pixels; the limit is 1000"):
        read_frames(write_clip(frames=3, size=(64, 96)), 2)


def test_a_video_that_pyav_cannot_read_is_tried_with_decord(write_clip, monkeypatch):
    pytest.importorskip("decord")
    path = write_clip(frames=12)
    expected, times = read_frames(path, 4)

    def refuse(*_):
        raise DataError("PyAV's word")

    monkeypatch.setattr(video, "read_pyav", refuse)
    frames, seconds = read_frames(path, 4)
    assert np.array_equal(frames, expected) and np.allclose(seconds, times)
    with pytest.raises(DataError, match="PyAV's word"):
        read_frames(path, 4, "pyav")
    monkeypatch.setattr(video, "read_decord", lambda *_: [])
    with pytest.raises(DataError, match="PyAV's word"):
        read_frames(path, 4)


def test_mindspore_loads_after_decord(write_clip):
    pytest.importorskip("decord")
    code = (
        "from llavanext_cli.processing.video import read_frames\n"
        f"print(read_frames({str(write_clip(frames=3))!r}, 2, 'decord')[0].shape)\n"
        "import mindspore\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "(2, 96, 128, 3)\n"), done.stderr


def test_decord_leaves_alone_what_it_would_read_wrong(write_clip):
    """Rows of fewer than 64 pixels, whose padding it takes for channels."""
    pytest.importorskip("decord")
    with pytest.raises(NoFramesError):
        read_frames(write_clip(frames=3, size=(48, 48)), 2, "decord")


@pytest.mark.parametrize("backend", ["auto", "pyav", "decord"])
@pytest.mark.parametrize(
    "text",
    [
        "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n",
        "ffconcat version 1.0\nfile {}\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 5004 RTP/AVP 96\n",
    ],
)
def test_a_list_of_other_files_is_no_video(write_clip, tmp_path, text, backend):
    """FFmpeg would open what a playlist names, wherever that lies."""
    path = tmp_path / "root" / "a.m3u8"
    path.parent.mkdir()
    path.write_text(text.format(write_clip(frames=12)))
    with pytest.raises(DataError) as caught:
        read_frames(path, 2, backend)
    assert "not a video in a supported format" in caught.value.what or backend == "decord"


def test_a_name_is_a_name_and_no_address(write_clip, monkeypatch):
    path = write_clip(frames=12)
    path.rename(path.with_name("pipe:0?x=%41 #1.mp4"))
    monkeypatch.chdir(path.parent)
    assert read_frames("pipe:0?x=%41 #1.mp4", 2, "pyav")[0].shape[0] == 2


def test_a_long_video_is_never_held(write_clip):
    """300 frames of 480 x 640 are 276 MB; reading 4 of them must not need a tenth of that."""
    import tracemalloc

    path = write_clip(frames=300, size=(480, 640), key_every=300, codec="mpeg4")
    tracemalloc.start()
    load_video(path, 4, ARCH)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 15e6


def test_files_that_are_no_videos(tmp_path, write_clip):
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 50)
    with av.open(str(tmp_path / "sound.mkv"), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        for packet in [*stream.encode(frame), *stream.encode()]:
            container.mux(packet)
    whole = write_clip("whole.mp4").read_bytes()
    (tmp_path / "noindex.mp4").write_bytes(whole[:1500])
    cases = {
        "none.mp4": "no such video",
        "empty.mp4": "0 bytes",
        "text.mp4": "cannot be read as a video",
        "noindex.mp4": "cannot be read as a video",
        "sound.mkv": "no video stream",
        ".": "a folder, not a video",
    }
    for name, words in cases.items():
        for backend in ("pyav", "auto"):
            with pytest.raises(DataError, match=words) as caught:
                read_frames(tmp_path / name, 4, backend)
            assert "\n" not in caught.value.what
            assert str(tmp_path) in caught.value.what
            assert caught.value.hint


def test_a_video_whose_frames_are_all_broken(write_clip):
    path = write_clip(frames=10)
    data = bytearray(path.read_bytes())
    at = data.find(b"mdat") + 4
    size = int.from_bytes(data[at - 8 : at - 4], "big") - 8
    data[at : at + size] = bytes(size)
    path.write_bytes(data)
    with pytest.raises(NoFramesError, match="no readable frame"):
        read_frames(path, 4)


def test_wrong_arguments_are_bugs(write_clip):
    path = write_clip(frames=3)
    with pytest.raises(ValueError, match="count must be at least 1"):
        read_frames(path, 0)
    with pytest.raises(ValueError, match="backend must be one of"):
        read_frames(path, 1, "opencv")
