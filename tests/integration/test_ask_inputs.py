"""What `ask` refuses before a model is loaded, in one line with a hint."""

import subprocess
import sys

import pytest
from typer.testing import CliRunner

from llavanext_cli.app import app


def refused(*words: object, code: int = 1) -> str:
    """The message of a command that fails, on one line."""
    done = CliRunner().invoke(app, ["ask", *map(str, words)], input="")
    assert done.exit_code == code, done.output
    assert done.stdout == ""
    assert code == 2 or "Hint: " in done.stderr
    return " ".join(done.stderr.replace("│", " ").split())


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["-", "--image", "-"], 1, "stdin cannot be both question and image"),
        (["-"], 1, "the question is empty"),
        ([" ", "--batch", "x", "--out", "y"], 1, "the question is empty"),
        ([], 1, "the question is missing"),
        (["what?", "--chat", "--allow-url"], 2, "--chat cannot be combined with QUESTION, --allow-url"),
        (["--batch", "x", "--image", "a.jpg", "--out", "y"], 2, "--batch cannot be combined with --image"),
        (["--batch", "x"], 2, "--batch needs a file for its answers"),
        (["what?", "--out", "y", "--batch-size", "2"], 2, "one question cannot be combined with --out, --batch-size"),
        (["what?", "--force"], 2, "one question cannot be combined with --force without --show"),
    ],
)
def test_options_that_do_not_go_together(words, code, expected):
    assert expected in refused(*words, "--checkpoint", "nowhere", code=code)


def test_a_contact_sheet_replaces_images_only_and_only_with_force(tmp_path):
    for name in ("sheet.png", "notes.txt"):
        (tmp_path / name).touch()
    words = ["what?", "--image", tmp_path / "a.png", "--checkpoint", "nowhere", "--show"]
    assert "sheet.png already holds an image Hint: add --force" in refused(*words, tmp_path / "sheet.png")
    assert "notes.txt exists and is not an image" in refused(*words, tmp_path / "notes.txt", "--force")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--preset", "tiny-aks"], "tiny-aks"),
        (
            ["--image", "1.png", "--set", "ask.cache_tokens=112"],
            "but at most 111 fit Hint: add --set ask.cache",
        ),
        (
            ["--video", "clip.mp4", "--frames", "200", "--set", "ask.cache_tokens=4096"],
            "Hint: the checkpoint has 512 positions: add --frames ",
        ),
        (["--image", "-"], "no image on stdin (0 bytes)"),
        (["--devices", "3"], "3 devices cannot share num_attention_heads 4 evenly"),
        (["--devices", "4"], "4 devices cannot share num_key_value_heads 2 evenly"),
        (["--set", "parallel.data=2", "--set", "parallel.devices=2"], "data parallelism is for training: set it to 1"),
    ],
)
def test_a_question_that_does_not_fit_the_checkpoint(media, tiny_checkpoint, monkeypatch, words, expected):
    monkeypatch.chdir(media)
    assert expected in refused("what?", "--checkpoint", tiny_checkpoint, *words)


def test_a_batch_whose_questions_all_fail_is_a_failure(tmp_path, tiny_checkpoint):
    questions, out = tmp_path / "questions.jsonl", tmp_path / "answers.jsonl"
    questions.write_text('{"id": "a", "question": "what?", "image": "gone.png"}\n')
    out.write_text('{"index": 0, "id": "a", "error": "gone"}\n')  # tried again before a model is loaded
    words = ["--batch", questions, "--out", out, "--checkpoint", tiny_checkpoint]
    assert "Error: all questions failed Hint: see" in refused(*words)


@pytest.mark.parametrize(
    ("words", "expected"), [(["-"], "the question is empty"), (["what?", "--image", "-"], "no image on stdin")]
)
def test_a_stdin_that_is_closed(tmp_path, tiny_checkpoint, words, expected):
    command = [sys.executable, "-m", "llavanext_cli", "ask", *words, "--checkpoint", tiny_checkpoint]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *map(str, command)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {expected}")
