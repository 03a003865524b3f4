"""The media of a question: their order, and those that come from stdin or an address."""

import http.server
import io
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.inference import media_sources
from llavanext_cli.inference.questions import build_question
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


def test_a_video_placeholder_is_a_word_where_there_are_only_images():
    segments = build_question_prompt(build_question("is <video> a tag?", [Path("a")], []))
    assert [segment.kind for segment in segments] == ["text", "medium", "text"]
    assert "<video>" in segments[-1].text


REDIRECTS = {"/to": "/image", "/odd": "http://[::1", "/loop": "/loop"}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path in REDIRECTS:
            self.send_response(302)
            self.send_header("Location", REDIRECTS[self.path])
            self.end_headers()
        elif self.path == "/image":
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


def test_addresses_are_read_only_where_they_are_allowed(tmp_path, server):
    with pytest.raises(DataError, match="web addresses are not downloaded by default") as fault:
        media_sources.resolve_media([f"{server}/image"], [], tmp_path)
    assert "--allow-url" in fault.value.hint
    assert list(tmp_path.iterdir()) == []
    images, _ = media_sources.resolve_media([f"{server}/to"], [], tmp_path, allow_url=True)
    assert images[0].read_bytes() == b"p" * 1000


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("/gone", "/gone: the server answers HTTP 404"),
        ("/loop", r"cannot be downloaded \(TooManyRedirects\)"),
        ("/odd", "cannot be downloaded"),
        ("/image", "the file has more than 500 bytes"),
        ("http://127.0.0.1:9/x", r"cannot be downloaded \(ConnectionError\)"),
        ("http://[::1", r"cannot be downloaded \(InvalidURL\)"),
        ("ftp://there/a.png", r"cannot be downloaded \(InvalidSchema\)"),
    ],
)
def test_downloads_that_fail(tmp_path, server, address, says):
    url = server + address if address.startswith("/") else address
    with pytest.raises(DataError, match=says):
        media_sources.download(url, tmp_path / "x", 500)


def test_an_image_on_stdin(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"pixels")))
    images, _ = media_sources.resolve_media(["a.png", "-"], [], tmp_path)
    assert images[0] == Path("a.png") and images[1].read_bytes() == b"pixels"
    with pytest.raises(DataError, match=r"no image on stdin \(0 bytes\)"):
        media_sources.resolve_media(["-"], [], tmp_path)
    with pytest.raises(DataError, match="only one image can come from stdin"):
        media_sources.resolve_media(["-", "-"], [], tmp_path)


def test_an_error_shows_the_name_that_the_user_gave(tmp_path):
    with pytest.raises(DataError) as fault, media_sources.rename_in_errors(tmp_path, ["a.png", "-"], []):
        raise DataError(f"{tmp_path / '1-image'}: not an image")
    assert str(fault.value) == "the image on stdin: not an image"
