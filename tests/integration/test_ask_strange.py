"""`ask` and unusual media: one batch over a folder of them, and a video of four hours."""

import json
import os
import subprocess
import sys

import av
import numpy as np
import pytest
from PIL import Image

from llavanext_cli.processing.geometry import plan_tiles

HOURS, RATE, GOP = 4, 25, 250


@pytest.fixture(scope="module")
def long_video(tmp_path_factory):
    """Four hours at 25 frames a second, 360 000 frames: ten seconds of them, again and again."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.max_b_frames = 48, 64, "yuv420p", GOP, 0
        packets = []
        for number in range(GOP):
            frame = np.full((48, 64, 3), number, np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24"))
        packets += stream.encode()
        contents = [(bytes(packet), packet.is_keyframe) for packet in packets]
        assert len(contents) == GOP and contents[0][1]
        for number in range(HOURS * 3600 * RATE):
            data, is_key = contents[number % GOP]
            packet = av.Packet(data)
            packet.stream, packet.time_base = stream, stream.codec_context.time_base
            packet.pts = packet.dts = number
            packet.is_keyframe = is_key
            container.mux(packet)
    return path


def test_a_video_of_four_hours_takes_bounded_time_and_memory(long_video):
    code = (
        "import re, sys, time\n"
        "from llavanext_cli.processing.video import read_frames\n"
        "import av, numpy\n"
        "peak = lambda: int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
        "before, begun = peak(), time.process_time()\n"
        "frames, times = read_frames(sys.argv[1], 32)\n"
        "print(len(frames), times[-1], (peak() - before) // 1024, time.process_time() - begun)"
    )
    words = [sys.executable, "-c", code, str(long_video)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    count, last, megabytes, seconds = map(float, done.stdout.split())
    assert count == 32
    assert last == pytest.approx(HOURS * 3600, abs=1)
    assert megabytes < 200, "360 000 frames of 9 kB are 3.3 GB"
    assert seconds < 30


@pytest.mark.full
def test_a_folder_of_strange_files(run_llavanext, tmp_path, long_video, tiny_checkpoint, tiny_architecture):
    folder = tmp_path / "media"
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).quantize(64) for _ in range(3)]
    images[0].save(folder / "animated.gif", save_all=True, append_images=images[1:])
    images[0].convert("RGB").save(folder / "first.png")
    Image.fromarray(rng.integers(0, 255, (20, 30_000, 3), dtype=np.uint8)).save(folder / "wide.png")
    (folder / "garbage.jpg").write_bytes(rng.bytes(5000))
    (folder / "empty.png").touch()
    (folder / "text.mp4").write_text("not a video")
    (folder / "notes.txt").write_text("neither")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "[markup] 'é'.png").write_bytes((folder / "first.png").read_bytes())
    (folder / "long.mp4").symlink_to(long_video)
    with open(os.fsencode(folder) + b"/not \xff utf8.png", "wb") as file:
        file.write((folder / "first.png").read_bytes())

    words = ["ask", "what is it?", "--batch", folder, "--out", "answers.jsonl", "--checkpoint", tiny_checkpoint]
    words += ["--batch-size", "4", "--max-new-tokens", "4", "--set", "ask.cache_tokens=512"]
    done = run_llavanext(*words)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    out = run_llavanext.folder / "answers.jsonl"
    lines = {line["id"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert set(lines) == {
        *("animated.gif", "first.png", "wide.png", "garbage.jpg", "empty.png", "text.mp4", "long.mp4"),
        *("[markup] 'é'.png", "not \udcff utf8.png"),
    }
    assert lines["animated.gif"]["answer"] == lines["first.png"]["answer"]
    assert lines["not \udcff utf8.png"]["answer"] == lines["[markup] 'é'.png"]["answer"] == lines["first.png"]["answer"]
    text = lines["first.png"]["prompt_tokens"] - plan_tiles((40, 60), tiny_architecture).tokens
    assert lines["wide.png"]["prompt_tokens"] == text + plan_tiles((20, 30_000), tiny_architecture).tokens
    assert "answer" in lines["long.mp4"]
    for name in ("garbage.jpg", "empty.png", "text.mp4"):
        assert name in lines[name]["error"] and "answer" not in lines[name]
    whole = out.read_text()
    assert run_llavanext(*words).returncode == 0  # nothing is left to be done
    assert out.read_text() == whole
