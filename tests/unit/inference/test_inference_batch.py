"""The batch runner without a model: order, errors, other runs' answers, and kills at random moments."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.files import claim
from llavanext_cli.inference.answers_file import check_out, read_answers
from llavanext_cli.inference.batch import describe_run, run_batch
from llavanext_cli.inference.inputs import read_inputs
from llavanext_cli.inference.request import AskRequest
from llavanext_cli.inference.sampling import Sampling

RUN = textwrap.dedent("""
    import sys, time, zlib
    from contextlib import contextmanager
    from pathlib import Path
    from types import SimpleNamespace
    from llavanext_cli.errors import DataError
    from llavanext_cli.inference import batch
    from llavanext_cli.inference.request import AskRequest

    class Processor:
        def count_question(self, sample, roots):
            return 10 + zlib.crc32(sample.turns[0].text.encode()) % 90
        def encode_question(self, sample, roots):
            if "broken" in sample.turns[0].text and not Path("repaired").exists():
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
    batch.check_media = lambda *args: None
    batch.describe_run = lambda *args: "these settings"
    batch.prepare = lambda *args, **options: SimpleNamespace(
        settings=SimpleNamespace(cache_tokens=512), processor=Processor(), preset=None, sampling=None)
    request = AskRequest(Path("."), batch=Path(sys.argv[1]), out=Path(sys.argv[2]), batch_size=4)
    print(batch.run_batch(request).failed)
""")


def start(questions: Path, out: Path, pause: float) -> subprocess.Popen:
    command = [sys.executable, "-c", RUN, str(questions), str(out), str(pause)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=questions.parent)


def test_one_line_for_each_input_in_order_and_errors_that_stay_need_no_model(tmp_path):
    lines = [json.dumps({"id": f"q{n}", "question": f"question {n}"}) for n in range(10)]
    lines[7] = "{this is not JSON"
    lines[3] = json.dumps({"id": "b", "question": "broken"})
    questions, out = tmp_path / "questions.jsonl", tmp_path / "out.jsonl"
    questions.write_text("\n".join(lines) + "\n")
    assert start(questions, out, 0).communicate()[0] == "2\n"
    before = out.read_text()
    answers = [json.loads(line) for line in before.splitlines()]
    assert [answer["index"] for answer in answers] == list(range(10))
    assert "line 8: not valid JSON" in answers[7]["error"]
    assert answers[3] == {"index": 3, "id": "b", "error": "broken medium"}
    assert all("answer" in answer for answer in answers if answer["index"] not in (3, 7))

    again = start(questions, out, 60)  # seconds for each batch
    assert again.communicate(timeout=50)[0] == "2\n"
    assert out.read_text() == before


def test_twenty_kills_change_nothing(tmp_path):
    """Every fifth of the first questions was broken. Once they are repaired, killed runs answer them and the rest just
    as one undisturbed run does."""
    lines = [json.dumps({"id": f"{n}", "question": f"{'broken' if n % 5 == 0 else 'question'} {n}"}) for n in range(75)]
    questions, begun, whole, killed = (tmp_path / name for name in ("questions.jsonl", "begun", "whole", "killed"))
    questions.write_text("\n".join(lines))
    start(questions, begun, 0).communicate()
    begun.write_text("".join(begun.read_text().splitlines(keepends=True)[:30]))
    (tmp_path / "repaired").touch()
    for copy in (whole, killed):
        shutil.copyfile(begun, copy)
    assert start(questions, whole, 0).communicate()[0] == "0\n"
    rng = random.Random(0)
    kills, stages = 0, set()
    while kills < 20:
        before = killed.read_bytes()
        process = start(questions, killed, 0.05)
        # most kills hit the work, some the start
        latest = time.monotonic() + (60 if rng.random() < 0.75 else rng.random())
        while time.monotonic() < latest and process.poll() is None and killed.read_bytes() == before:
            time.sleep(0.002)
        time.sleep(rng.random() * 0.08)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            kills += 1
        process.communicate()
        answers = [json.loads(line) for line in killed.read_bytes().split(b"\n")[:-1]]
        assert [answer["index"] for answer in answers] == list(range(len(answers)))
        assert all("answer" in answers[n] for n in range(30) if n % 5), "an earlier answer was lost"
        stages.add((len(answers), sum("error" in answer for answer in answers)))
        if rng.random() < 0.3:  # a line that the disk kept half of
            with killed.open("a") as file:
                file.write('{"index": 3, "id"')
        if killed.read_bytes() == whole.read_bytes():
            shutil.copyfile(begun, killed)
    assert len(stages) >= 5, "the kills never hit work in progress"
    start(questions, killed, 0).communicate()
    assert killed.read_text() == whole.read_text()


def test_answers_record_what_they_were_made_with(tmp_path):
    def describe(seed: int = 0, ends: object = 2) -> str:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": ends}))
        return describe_run(
            SimpleNamespace(
                checkpoint=SimpleNamespace(digest="d", folder=tmp_path),
                processor=SimpleNamespace(tokenizer=SimpleNamespace(eos_id=2)),
                preset=SimpleNamespace(
                    data=SimpleNamespace(frames=8), runtime=SimpleNamespace(compute_dtype="float32")
                ),
                sampling=Sampling(seed=seed),
            )
        )

    assert describe() == describe(ends=[2]) and len({describe(), describe(seed=1), describe(ends=[2, 7])}) == 3


QUESTIONS = '{"id": "a", "question": "what?"}\n{"id": "b", "question": "and?"}\n'
ANSWER = {"index": 0, "id": "a", "question": "what?", "answer": "", "made_with": "a"}


@pytest.fixture
def out(tmp_path) -> Path:
    (tmp_path / "questions.jsonl").write_text(QUESTIONS)
    return tmp_path / "answers.jsonl"


def read(out: Path) -> tuple[int, list[int]]:
    return read_answers(out, read_inputs(out.with_name("questions.jsonl"), None).items, "a")


def test_answers_of_an_earlier_run_are_counted_and_half_a_line_is_removed(out):
    whole = json.dumps(ANSWER) + '\n{"index": 1, "id": "b", "error": "gone"}\n'
    out.write_text(whole + '{"index": 2, "id"')
    assert read(out) == (2, [1])
    assert out.read_text() == whole


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"question": "and its colour?"}, "line 1 answers another question: 'and its colour"),
        ({"made_with": "b"}, "line 1 was made with another checkpoint"),
        ({"id": "z"}, r"line 1 is not an answer to a question of this run \(z\)"),
        ({"index": 1}, "line 1 is not an answer to a question of this run"),
    ],
)
def test_answers_of_another_run_are_refused(out, change, says):
    out.write_text(json.dumps(ANSWER | change) + "\n")
    before = out.read_text()
    with pytest.raises(DataError, match=says) as fault:
        read(out)
    assert "--force" in fault.value.hint
    assert out.read_text() == before


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("questions.jsonl", "would damage the input"),
        ("none/a", "does not exist"),
        (".", "is a folder, not a file"),
        ("/dev/full", "is a device or a pipe, not a file"),
        ("notes.txt", "exists and is not a file of answers"),
    ],
)
def test_places_where_no_answers_are_written(out, name, says):
    out.with_name("notes.txt").write_text("my own notes\n")
    with pytest.raises(LlavaNextError, match=says):
        check_out(out.parent / name, out.with_name("questions.jsonl"))
    assert out.with_name("notes.txt").read_text() == "my own notes\n"


def test_answers_do_not_go_to_stdout(out):
    with pytest.raises(DataError, match="not to stdout"):
        check_out(Path("-"), out.with_name("questions.jsonl"))


def test_two_runs_do_not_share_a_file(out, monkeypatch):
    monkeypatch.setattr("llavanext_cli.inference.batch.prepare", lambda *_, **__: None)
    monkeypatch.setattr("llavanext_cli.inference.batch.describe_run", lambda *_: "")
    out.write_text("")
    request = AskRequest(Path("model"), batch=out.with_name("questions.jsonl"), out=out)
    with claim(out), pytest.raises(LlavaNextError, match="is in use by another llavanext command"):
        run_batch(request)
    assert {path.name for path in out.parent.iterdir()} == {"questions.jsonl", "answers.jsonl"}
