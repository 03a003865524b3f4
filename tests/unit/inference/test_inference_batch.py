"""The batch runner without a model: order, faults, and kills at random moments."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.inference.batch import _pace, describe_run, read_answers
from llavanext_cli.inference.inputs import read_inputs
from llavanext_cli.inference.sampling import Sampling

RUN = textwrap.dedent("""
    import sys, time, zlib
    from contextlib import contextmanager
    from pathlib import Path
    from types import SimpleNamespace
    from llavanext_cli.errors import DataError
    from llavanext_cli.inference import batch

    class Processor:
        def count_question(self, sample, roots):
            return 10 + zlib.crc32(sample.turns[0].text.encode()) % 90
        def encode_question(self, sample, roots):
            if "broken" in sample.turns[0].text and not Path("mended").exists():
                raise DataError("broken medium")
            return SimpleNamespace(length=self.count_question(sample, roots), text=sample.turns[0].text)

    class Session:
        def answer(self, samples, sampling):
            time.sleep(PAUSE)
            together = ",".join(sample.text for sample in samples)  # an answer that shows who shared its batch
            return [SimpleNamespace(text=f"{s.text} with {zlib.crc32(together.encode())}", tokens=(1,),
                                    prompt_tokens=s.length, finish="stop") for s in samples]

    @contextmanager
    def open_session(*args, **options):
        yield Session()

    PAUSE = float(sys.argv[3])
    batch.open_session = open_session
    batch.build_sampling = lambda *args: None
    batch.check_media = lambda *args: None
    batch.describe_run = lambda *args: "these settings"
    batch.prepare = lambda *args, **options: (None, SimpleNamespace(ask=SimpleNamespace(cache_tokens=512)), Processor())
    report = batch.run_batch(Path(sys.argv[1]), Path(sys.argv[2]), Path("."), batch_size=4)
    print(report.failed)
""")


def test_answers_tell_what_they_were_made_with(tmp_path):
    def describe(seed: int = 0, ends: object = 2) -> str:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        checkpoint = SimpleNamespace(digest="d", folder=tmp_path)
        processor = SimpleNamespace(tokenizer=SimpleNamespace(eos_id=2))
        preset = SimpleNamespace(data=SimpleNamespace(frames=8), runtime=SimpleNamespace(compute_dtype="float32"))
        return describe_run(checkpoint, processor, preset, Sampling(seed=seed))

    assert describe() == describe(ends=[2]) and len({describe(), describe(seed=1), describe(ends=[2, 7])}) == 3


def start(questions: Path, out: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(questions), str(out), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=questions.parent)


@pytest.fixture
def questions(tmp_path) -> Path:
    lines = [json.dumps({"id": f"q{n}", "question": f"question {n}"}) for n in range(75)]
    lines[7] = "{this is not JSON"
    lines[30] = json.dumps({"id": "b", "question": "broken"})
    lines[55] = json.dumps({"id": "c", "question": "x", "picture": "a.jpg"})
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines) + "\n")
    return path


def test_twenty_kills_change_nothing(tmp_path, questions):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    undisturbed = start(questions, whole, 0)
    assert undisturbed.communicate()[0] == "3\n"
    rng = random.Random(0)
    kills, grown = 0, 0
    while kills < 20:
        size = killed.stat().st_size if killed.exists() else 0
        process = start(questions, killed, 0.05)
        # most moments lie in the work, some in starting up
        latest = time.monotonic() + (60 if rng.random() < 0.75 else rng.random())
        while time.monotonic() < latest and (killed.stat().st_size if killed.exists() else 0) == size:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.08)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        grown += killed.exists() and killed.stat().st_size > size
        if killed.exists() and rng.random() < 0.3:  # a line that the disk kept half of
            with killed.open("a") as file:
                file.write('{"index": 3, "id"')
        if killed.exists() and killed.read_bytes() == whole.read_bytes():
            killed.unlink()
    assert grown >= 5, "the kills never hit work in progress"
    start(questions, killed, 0).communicate()
    assert killed.read_text() == whole.read_text()


def test_one_line_an_input_in_order(tmp_path, questions):
    out = tmp_path / "out.jsonl"
    start(questions, out, 0).communicate()
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["index"] for line in lines] == list(range(75))
    assert "line 8: not valid JSON" in lines[7]["error"]
    assert lines[30] == {"index": 30, "id": "b", "error": "broken medium"}
    assert "unknown key 'picture'" in lines[55]["error"]
    assert all("answer" in line for line in lines if line["index"] not in (7, 30, 55))


def test_faults_are_tried_again_and_kills_lose_nothing(tmp_path):
    """Every fifth question is broken at first; then the rest is answered, and they are, in one run after another."""
    lines = [json.dumps({"id": f"{n}", "question": f"{'broken' if n % 5 == 0 else 'question'} {n}"}) for n in range(60)]
    questions, whole, killed = (tmp_path / name for name in ("questions.jsonl", "whole.jsonl", "killed.jsonl"))
    questions.write_text("\n".join(lines))
    start(questions, killed, 0).communicate()
    first = killed.read_text().splitlines()
    killed.write_text("".join(f"{line}\n" for line in first[:45]))
    (tmp_path / "mended").touch()
    start(questions, whole, 0).communicate()
    rng, seen = random.Random(0), set()
    for _ in range(40):
        size = killed.stat().st_size
        process = start(questions, killed, 0.1)
        while process.poll() is None and killed.stat().st_size == size:
            time.sleep(0.005)
        time.sleep(rng.random() * 0.2)
        process.kill()
        process.communicate()
        answers = [json.loads(line) for line in killed.read_text().splitlines()]
        assert [answer["index"] for answer in answers] == list(range(len(answers)))
        assert all("answer" in answers[at] for at in range(45) if at % 5), "what was there stays"
        seen.add(sum("error" in answer for answer in answers))
        if len(answers) == 60 and "error" not in killed.read_text():
            break
    assert len(seen) > 2
    assert [line for at, line in enumerate(killed.read_text().splitlines()) if at % 5 == 0] == [
        line for at, line in enumerate(whole.read_text().splitlines()) if at % 5 == 0
    ]


def test_faults_that_stay_need_no_model(tmp_path, questions):
    out = tmp_path / "out.jsonl"
    start(questions, out, 0).communicate()
    before = out.read_text()
    again = start(questions, out, 60)  # seconds a batch
    assert again.communicate(timeout=50)[0] == "3\n"
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": "and its colour?"}, "line 1 answers another question: 'and its colour"),
        ({"made_with": "b"}, "line 1 was made with another checkpoint"),
        ({"id": "z"}, "line 1 is no answer"),
        ({"index": 1}, "line 1 is no answer"),
    ],
)
def test_answers_of_another_run_are_refused(tmp_path, change, says):
    line = {"index": 0, "id": "a", "question": "what?", "answer": "", "made_with": "a"}
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    questions.write_text('{"id": "a", "question": "what?"}\n')
    out.write_text(json.dumps(line) + "\n")
    assert read_answers(out, read_inputs(questions, None), "a") == (1, [])
    out.write_text(json.dumps(line | change) + "\n")
    with pytest.raises(DataError, match=says) as fault:
        read_answers(out, read_inputs(questions, None), "a")
    assert "--force" in fault.value.hint


@pytest.mark.parametrize("roots", [["pictures"], {"m": 7}, "pictures"])
def test_roots_that_are_none(tmp_path, roots):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"llavanext_mix": 1, "roots": roots}) + '\n{"question": "what?"}\n')
    with pytest.raises(DataError, match=r"q\.jsonl, line 1: roots must name a folder for each source"):
        read_inputs(path, None)


def test_a_folder_with_strange_files(tmp_path):
    for name in ("b.JPG", "a.png", "clip.mp4", "notes.txt", ".hidden.png", "deep/c.webp"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    inputs = read_inputs(tmp_path, "what?")
    assert [item.id for item in inputs.items] == ["a.png", "b.JPG", "clip.mp4", "deep/c.webp"]
    assert inputs.skipped == 1
    assert inputs.items[2].sample.media[0].kind == "video"


def test_a_folder_needs_a_question_and_media(tmp_path):
    with pytest.raises(DataError, match="needs a question"):
        read_inputs(tmp_path, None)
    with pytest.raises(DataError, match="no pictures or clips"):
        read_inputs(tmp_path, "what?")


def test_a_file_begins_with_a_mark_and_holds_no_empty_questions(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"question": "what?"}\n{"question": " "}\n')
    first, second = read_inputs(path, None).items
    assert first.sample.turns[0].text == "what?"
    assert second.fault == "q.jsonl, line 2: the question is empty"


def test_a_device_holds_no_questions():
    with pytest.raises(DataError, match="/dev/zero: is no file"):
        read_inputs(Path("/dev/zero"), None)


def test_placeholders_of_a_line_give_the_order(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "<video> or <image>?", "image": "a.jpg", "video": "c.mp4"}\n')
    assert [m.kind for m in read_inputs(path, None).items[0].sample.media] == ["video", "image"]


@pytest.mark.parametrize(("done", "seconds", "expected"), [(880, 1, "880 a second"), (1, 60, "1 a minute")])
def test_a_pace_is_a_plain_number(done, seconds, expected):
    assert _pace(done, 1, seconds).startswith(f"{expected}, ")


def test_media_of_a_line_lie_beside_its_file(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text('{"question": "what?", "images": ["a.jpg", "b.jpg"], "video": "c.mp4"}\n')
    media = read_inputs(path, None).items[0].sample.media
    assert [(m.kind, m.path) for m in media] == [
        ("image", str(tmp_path / "a.jpg")),
        ("image", str(tmp_path / "b.jpg")),
        ("video", str(tmp_path / "c.mp4")),
    ]
