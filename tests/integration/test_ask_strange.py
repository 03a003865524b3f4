"""`ask` and media that nobody expects: one run over a folder of them, clips of many hours, answers that do not fit."""

import json
import os
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference.batch import _claim, read_answers, run_batch
from llavanext_cli.inference.inputs import read_inputs
from llavanext_cli.processing.geometry import plan_tiles

HOURS, RATE, GOP = 4, 25, 250


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """Four hours at 25 frames a second, 360 000 frames: ten seconds of them, again and again."""
    path = tmp_path_factory.mktemp("long") / "long.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=RATE)
        stream.height, stream.width, stream.pix_fmt, stream.gop_size, stream.max_b_frames = 48, 64, "yuv420p", GOP, 0
        packets = []
        for number in range(GOP):
            picture = np.full((48, 64, 3), number, np.uint8)
            packets += stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24"))
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


def test_a_clip_of_four_hours_takes_bounded_time_and_memory(long_clip):
    code = (
        "import resource, sys, time\n"
        "from llavanext_cli.processing.video import read_frames\n"
        "import av, numpy\n"
        "before, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()\n"
        "frames, times = read_frames(sys.argv[1], 32)\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(len(frames), times[-1], (after - before) // 1024, time.process_time() - begun)"
    )
    words = [sys.executable, "-c", code, str(long_clip)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
    count, last, megabytes, seconds = map(float, done.stdout.split())
    assert count == 32
    assert last == pytest.approx(HOURS * 3600, abs=1)
    assert megabytes < 200, "360 000 frames of 9 kB are 3.3 GB"
    assert seconds < 30


@pytest.mark.full
def test_a_folder_of_strange_files(run_llavanext, tmp_path, long_clip, tiny_checkpoint, tiny_architecture):
    folder = tmp_path / "media"
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 60, 3), dtype=np.uint8)).quantize(64) for _ in range(3)]
    pictures[0].save(folder / "animated.gif", save_all=True, append_images=pictures[1:])
    pictures[0].convert("RGB").save(folder / "first.png")
    Image.fromarray(rng.integers(0, 255, (20, 30_000, 3), dtype=np.uint8)).save(folder / "wide.png")
    (folder / "garbage.jpg").write_bytes(rng.bytes(5000))
    (folder / "empty.png").touch()
    (folder / "text.mp4").write_text("no clip")
    (folder / "notes.txt").write_text("neither")
    (folder / "folder.png").mkdir()
    os.mkfifo(folder / "pipe.jpg")
    (folder / "gone.jpg").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder)
    (folder / "[markup] 'é'.png").write_bytes((folder / "first.png").read_bytes())
    (folder / "long.mp4").symlink_to(long_clip)
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


QUESTIONS = '{"id": "a", "question": "what?"}\n{"id": "b", "question": "and?"}\n'
ANSWERS = '{"index": 0, "id": "a", "answer": ""}\n'


@pytest.mark.parametrize(
    ("there", "says"),
    [
        ("my own notes\n", "line 1 is no answer"),
        (ANSWERS + '{"index": 1, "id": "z", "answer": ""}\n', "line 2 is no answer"),
        (
            ANSWERS + '{"index": 1, "id": "b", "error": ""}\n{"index": 2, "id": "c", "error": ""}\n',
            "line 3 is no answer",
        ),
    ],
)
def test_nothing_is_appended_to_another_file(tmp_path, tiny_checkpoint, there, says):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text(QUESTIONS)
    out.write_text(there)
    with pytest.raises(DataError, match=says):
        run_batch(questions, out, tiny_checkpoint)
    assert out.read_text() == there


def test_answers_of_an_earlier_run_are_counted(tmp_path):
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)
    inputs = read_inputs(tmp_path / "questions.jsonl", None)
    out = tmp_path / "answers.jsonl"
    out.write_text(ANSWERS + '{"index": 1, "id"')
    assert read_answers(out, inputs, "") == (1, [])
    assert out.read_text() == ANSWERS


@pytest.mark.parametrize(
    ("out", "says"),
    [
        ("questions.jsonl", "the file of the questions"),
        ("none/a", "no such folder"),
        (".", "a folder"),
        ("/dev/full", "is no file"),
    ],
)
def test_places_for_answers_that_are_none(tmp_path, tiny_checkpoint, out, says):
    questions = tmp_path / "questions.jsonl"
    questions.write_text(QUESTIONS)
    with pytest.raises(DataError, match=says):
        run_batch(questions, tmp_path / out, tiny_checkpoint)
    assert questions.read_text() == QUESTIONS


def test_answers_do_not_go_to_stdout(tmp_path, tiny_checkpoint):
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)
    with pytest.raises(DataError, match="not to stdout"):
        run_batch(tmp_path / "questions.jsonl", Path("-"), tiny_checkpoint)


def test_two_runs_do_not_share_a_file(tmp_path, tiny_checkpoint):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text(QUESTIONS)
    out.write_text("")
    with _claim(out), pytest.raises(LlavaNextError, match="is in use"):
        run_batch(questions, out, tiny_checkpoint)
    assert {path.name for path in tmp_path.iterdir()} == {"questions.jsonl", "answers.jsonl"}


def test_inputs_that_all_fail_are_a_failure(run_llavanext, tmp_path, tiny_checkpoint):
    questions = tmp_path / "questions.jsonl"
    out = run_llavanext.folder / "answers.jsonl"
    questions.write_text('{"id": "a", "question": "what?", "image": "gone.png"}\n')
    out.write_text('{"index": 0, "id": "a", "error": "gone"}\n')  # tried again before a model is loaded
    done = run_llavanext("ask", "--batch", questions, "--out", out, "--checkpoint", tiny_checkpoint)
    assert done.returncode == 1
    assert "Error: none of the inputs could be asked" in done.stderr
