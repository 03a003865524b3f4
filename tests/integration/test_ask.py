"""`llavanext ask` as a user runs it: one question, and a file of them."""

import json

import pytest

from llavanext_cli.processing.geometry import plan_tiles
from tests.integration.conftest import SIZES, sample, write_samples

SHORT = ["--max-new-tokens", "6", "--set", "ask.cache_tokens=512"]


@pytest.mark.slow
def test_token_counts_are_those_of_the_formulas(run_llavanext, media, tiny_checkpoint, tiny_architecture):
    words = ["ask", "what is it?", "--image", media / "1.png", "--checkpoint", tiny_checkpoint, "--json", *SHORT]
    done = run_llavanext(*words, "--show", "sheet.png")
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["media_tokens"] == plan_tiles(SIZES[1], tiny_architecture).tokens
    assert answer["tiles"] == 5
    assert 0 < len(answer["tokens"]) <= 6
    assert [path.name for path in run_llavanext.folder.iterdir()] == ["sheet.png"]
    assert "WARNING" not in done.stderr


@pytest.mark.slow
def test_a_batch_answers_in_order_and_resumes_where_it_stopped(run_llavanext, tmp_path, media, tiny_checkpoint):
    lines = [sample(f"q{n}", "image", f"{n % 6}.png", "what is it?", "a cat") for n in range(5)]
    lines.insert(2, sample("clip", "video", "clip.mp4", "what happens?", "two"))
    lines.insert(4, sample("gone", "image", "gone.png", "what?", "a cat"))
    questions = write_samples(tmp_path / "questions.jsonl", media, lines)
    words = ["ask", "--batch", questions, "--out", "answers.jsonl", "--checkpoint", tiny_checkpoint]
    words += ["--batch-size", "3", *SHORT]
    done = run_llavanext(*words)
    assert done.returncode == 0, done.stderr
    out = run_llavanext.folder / "answers.jsonl"
    whole = out.read_text()
    answers = [json.loads(line) for line in whole.splitlines()]
    assert [a["id"] for a in answers] == [line["id"] for line in lines]
    assert [a["index"] for a in answers] == list(range(7))
    assert "gone.png" in answers[4]["error"]
    assert all("answer" in a for a in answers if a["id"] != "gone")
    assert answers[0]["reference"] == "a cat"

    out.write_text("".join(line + "\n" for line in whole.splitlines()[:3]) + '{"index": 3, "id"')
    again = run_llavanext(*words)
    assert again.returncode == 0, again.stderr
    assert out.read_text() == whole
