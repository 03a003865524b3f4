"""What `ask` refuses, reads from stdin or an address, and in which order media stand; no model is loaded."""

import http.server
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.inference import media_sources
from llavanext_cli.inference.ask import build_question
from llavanext_cli.processing.prompt import build_question_prompt


def order(question: str, images=("a", "b"), videos=("c",)) -> list[str]:
    return [m.path for m in build_question(question, [Path(p) for p in images], [Path(p) for p in videos]).media]


def test_placeholders_give_the_order():
    assert order("what?") == ["a", "b", "c"]
    assert order("<video> or <image> or <image>?") == ["c", "a", "b"]


@pytest.mark.parametrize(("question", "count"), [("<image> and <image>?", 1), ("<image>?", 2)])
def test_placeholders_and_media_that_do_not_match(question, count):
    with pytest.raises(DataError, match="placeholder"):
        build_question_prompt(build_question(question, [Path("a")] * count, []))


def test_a_video_placeholder_beside_pictures_alone_is_a_word():
    segments = build_question_prompt(build_question("is <video> a tag?", [Path("a")], []))
    assert [segment.kind for segment in segments] == ["text", "medium", "text"]
    assert "<video>" in segments[-1].text


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/to":
            self.send_response(302)
            self.send_header("Location", "/picture")
            self.end_headers()
        elif self.path == "/odd":
            self.send_response(302)
            self.send_header("Location", "http://[::1")
            self.end_headers()
        elif self.path == "/loop":
            self.send_response(302)
            self.send_header("Location", "/loop")
            self.end_headers()
        elif self.path == "/picture":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"p" * 1000)
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture
def server():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        threading.Thread(target=made.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{made.server_port}"
        made.shutdown()


def test_addresses_only_where_they_are_allowed(tmp_path, server):
    with pytest.raises(DataError) as fault:
        media_sources.resolve_media([f"{server}/picture"], [], tmp_path)
    assert "--allow-url" in fault.value.hint
    assert list(tmp_path.iterdir()) == []
    images, _ = media_sources.resolve_media([f"{server}/to"], [], tmp_path, allow_url=True)
    assert images[0].read_bytes() == b"p" * 1000


@pytest.mark.parametrize(("path", "expected"), [("/gone", "404"), ("/loop", "redirects")])
def test_addresses_that_give_nothing(tmp_path, server, path, expected):
    with pytest.raises(LlavaNextError, match=expected):
        media_sources.download(server + path, tmp_path / "x", 10_000)


@pytest.mark.parametrize("name", ["http://[::1", "ftp://there/a.png", "file:///a.png"])
def test_addresses_that_are_none(tmp_path, name):
    with pytest.raises(DataError, match=r"only http and https|cannot be downloaded"):
        media_sources.resolve_media([name], [], tmp_path, allow_url=True)


def test_a_redirect_to_what_is_no_address(tmp_path, server):
    with pytest.raises(DataError, match="cannot be downloaded"):
        media_sources.download(f"{server}/odd", tmp_path / "x", 500)


def test_a_fault_names_what_the_user_named(tmp_path):
    with pytest.raises(DataError) as fault, media_sources.rename_in_errors(tmp_path, ["a.png", "-"], []):
        raise DataError(f"{tmp_path / '1-image'}: no picture")
    assert str(fault.value) == "the picture on stdin: no picture"


def test_a_download_is_bounded(tmp_path, server):
    with pytest.raises(DataError, match="more than 500 bytes"):
        media_sources.download(f"{server}/picture", tmp_path / "x", 500)


def test_an_address_nobody_answers(tmp_path):
    with pytest.raises(DataError, match="cannot be downloaded"):
        media_sources.download("http://127.0.0.1:9/x", tmp_path / "x", 500)


@pytest.mark.parametrize(
    ("words", "code", "expected"),
    [
        (["-", "--image", "-"], 1, "stdin cannot be both"),
        (["-"], 1, "the question is empty"),
        ([" ", "--batch", "x", "--out", "y"], 1, "the question is empty"),
        (["what?", "--chat", "--allow-url"], 2, "--chat does not read QUESTION, --allow-url"),
        (["--batch", "x", "--image", "a.jpg", "--out", "y"], 2, "--batch does not read --image"),
        (["--batch", "x"], 2, "--batch needs a file for its answers"),
        (["what?", "--out", "y", "--batch-size", "2"], 2, "one question does not read --out, --batch-size"),
        (["what?", "--force"], 2, "one question does not read --force without --show"),
    ],
)
def test_words_that_do_not_go_together(tmp_path, words, code, expected):
    command = [sys.executable, "-m", "llavanext_cli", "ask", *words, "--checkpoint", "nowhere"]
    done = subprocess.run(command, cwd=tmp_path, input="", capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == code
    assert expected in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_a_contact_sheet_goes_into_a_file_and_nothing_else(tmp_path):
    (tmp_path / "a.png").touch()
    for show, what in ((".", ". is a folder"), ("/dev/null", "/dev/null is a device or a pipe, not a file")):
        words = ["ask", "what?", "--image", "a.png", "--show", show, "--force", "--checkpoint", "nowhere"]
        command = [sys.executable, "-m", "llavanext_cli", *words]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stderr.splitlines()[0]) == (1, f"Error: {what}")


@pytest.mark.parametrize(
    ("words", "expected"), [(["-"], "the question is empty"), (["what?", "--image", "-"], "no picture on stdin")]
)
def test_a_stdin_that_is_closed(tmp_path, tiny_checkpoint, words, expected):
    command = [sys.executable, "-m", "llavanext_cli", "ask", *words, "--checkpoint", tiny_checkpoint]
    command = ["sh", "-c", 'exec "$@" <&-', "sh", *map(str, command)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(f"Error: {expected}")
