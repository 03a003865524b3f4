"""`ask --devices 2`: two workers share each layer and answer what one answers; the first one talks."""

import json

import pytest

from tests.integration.conftest import sample, write_samples

SHORT = ["--max-new-tokens", "8", "--set", "ask.cache_tokens=512", "--set", "runtime.threads=1"]


@pytest.mark.slow
def test_two_workers_answer_as_one(run_llavanext, tmp_path, media, tiny_checkpoint):
    questions = write_samples(
        tmp_path / "questions.jsonl",
        media,
        [
            sample("picture", "image", "1.png", "what is it?", "a cat"),
            sample("clip", "video", "clip.mp4", "what happens?", "two"),
            sample("gone", "image", "gone.png", "what?", "a cat"),
            sample("text", None, "", "how many birds are there?", "three"),
        ],
    )
    words = ["ask", "--batch", questions, "--batch-size", "2", "--checkpoint", tiny_checkpoint, *SHORT]
    for out, devices in (("one.jsonl", "1"), ("two.jsonl", "2")):
        done = run_llavanext(*words, "--out", out, "--devices", devices)
        assert done.returncode == 0, done.stderr
    one, two = ((run_llavanext.folder / name).read_text() for name in ("one.jsonl", "two.jsonl"))
    assert len({json.loads(line).get("answer") for line in one.splitlines()}) == 4
    assert two == one


@pytest.mark.slow
def test_a_chat_over_two_workers(run_llavanext, media, tiny_checkpoint):
    words = ["ask", "--chat", "--image", media / "1.png", "--checkpoint", tiny_checkpoint, *SHORT]
    typed = "what is it?\n/dance\nand how many?\n"
    one, two = (run_llavanext(*words, "--devices", count, typed=typed) for count in ("1", "2"))
    assert one.returncode == two.returncode == 0, two.stderr
    assert one.stdout.count("\n") >= 2
    assert two.stdout == one.stdout
    assert two.stderr == one.stderr


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--devices", "3"], "3 devices cannot share num_attention_heads 4 evenly"),
        (["--devices", "4"], "4 devices cannot share num_key_value_heads 2 evenly"),
        (["--set", "parallel.data=2", "--set", "parallel.devices=2"], "one answer has no samples to be shared"),
    ],
)
def test_devices_that_cannot_share(run_llavanext, tiny_checkpoint, words, expected):
    done = run_llavanext("ask", "what?", "--checkpoint", tiny_checkpoint, *words)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
