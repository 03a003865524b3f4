"""Servers that never end, and an environment that is wrong: each is one error, in time."""

from __future__ import annotations

import errno
import time
from pathlib import Path

import pytest
import yaml

from llavanext_cli.errors import FetchError, LlavaNextError
from llavanext_cli.fetching.faults import UnreachableError, explain_disk
from llavanext_cli.fetching.net import Limits, Net
from llavanext_cli.fetching.nextsteps import next_commands
from llavanext_cli.fetching.run import run_fetch
from llavanext_cli.fetching.transfer import download_url
from tests.unit.fetching.loopback import FileSite, HubSite, Manners, content

LIMITS = Limits(connect=2.0, stall=0.5, retries=0, pause=0.02, longest_wait=3.0)
BIG = content(200_000)


def fetch(endpoint, to, *names, **options):
    return run_fetch(names or ("org/model",), to, endpoint=endpoint, limits=LIMITS, **options)


def drip(site, handler, head: bytes) -> bool:
    """A byte every 0.2 s, for ever: no read of the socket times out."""
    handler.wfile.write(head)
    for _ in range(100):
        if site.closing.wait(0.2):
            break
        handler.wfile.write(b"a")
    return True


@pytest.fixture
def hub():
    with HubSite() as site:
        site.add("org/model", {"a.bin": BIG, "c.json": b"{}"})
        yield site


def test_headers_that_never_end(tmp_path):
    with FileSite({"/a.bin": BIG}) as site:
        site.hook = lambda handler: drip(site, handler, b"HTTP/1.1 206 Partial Content\r\nX-A: ")
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"does not answer"):
            download_url(Net(LIMITS), site.url("/a.bin"), tmp_path / "a")
        assert time.monotonic() - started < 10


@pytest.mark.parametrize("source", ["hf", "modelscope"])
def test_a_listing_that_never_ends(tmp_path, source):
    with FileSite({}) as site:
        site.hook = lambda handler: drip(site, handler, b'HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{"sha": "')
        started = time.monotonic()
        with pytest.raises(UnreachableError, match=r"does not finish its answer: less than 1000 bytes a second"):
            fetch(site.endpoint, tmp_path, source=source)
        assert time.monotonic() - started < 10


def test_a_listing_whose_pages_lead_in_a_circle(hub, tmp_path):
    plain = hub.answer_json
    hub.PAGE = 1

    def answer(handler, value, status=200, headers=None):
        if "Link" in (headers or {}):
            headers = {"Link": f'<{hub.endpoint}{handler.path}>; rel="next"'}
        plain(handler, value, status, headers)

    hub.answer_json = answer
    with pytest.raises(FetchError, match=r"answers, but not as a Hub does"):
        fetch(hub.endpoint, tmp_path)
    assert len(hub.log) < 10


@pytest.mark.parametrize("change", [{"size": 10**400}, {"path": "c.json"}], ids=["size", "path twice"])
def test_a_listing_that_cannot_be_true(hub, tmp_path, change):
    plain = hub.answer_json
    hub.answer_json = lambda handler, value, *rest, **named: plain(
        handler, [v | change for v in value] if isinstance(value, list) else value, *rest, **named
    )
    with pytest.raises(FetchError, match=r"answers, but not as a Hub does"):
        fetch(hub.endpoint, tmp_path)


@pytest.mark.parametrize("total", [999_999_999_999_999_999, 10**15])
def test_a_total_that_no_disk_holds(tmp_path, total):
    with FileSite({"/a.bin": BIG}, {"/a.bin": Manners(wrong_total=total)}) as site:
        with pytest.raises(FetchError, match=r"a\.bin needs .* and .* free"):
            download_url(Net(LIMITS), site.url("/a.bin"), tmp_path / "a")
        assert not (tmp_path / "a").exists()


def test_hf_transfer_is_not_needed(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", True)
    fetch(hub.endpoint, tmp_path)
    assert (tmp_path / "a.bin").read_bytes() == BIG
    assert constants.HF_HUB_ENABLE_HF_TRANSFER is True


@pytest.mark.parametrize(
    ("variable", "value", "what"),
    [
        ("HF_HUB_ETAG_TIMEOUT", "abc", "HF_HUB_ETAG_TIMEOUT is no number of seconds"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "1.5", "HF_HUB_DOWNLOAD_TIMEOUT is no number of seconds"),
        ("REQUESTS_CA_BUNDLE", "/no/such.pem", "REQUESTS_CA_BUNDLE names no file of certificates: '/no/such.pem'"),
        ("HTTPS_PROXY", "http://[::1", "HTTPS_PROXY holds no address of a proxy"),
        ("https_proxy", "http://h:99999", "https_proxy holds no address of a proxy"),
    ],
)
def test_variables_that_are_wrong(tmp_path, monkeypatch, variable, value, what):
    monkeypatch.setenv(variable, value)
    with pytest.raises(LlavaNextError) as caught:
        fetch("https://127.0.0.1:1", tmp_path)
    assert caught.value.what == what and caught.value.hint


def test_a_token_file_that_is_no_text(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    (tmp_path / "token").write_bytes(b"\xff\xfe")
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "token"))
    with pytest.raises(LlavaNextError, match=r"token holds no token"):
        fetch(hub.endpoint, tmp_path)


def test_a_refusal_is_said_of_the_server_that_refuses(tmp_path):
    with FileSite({}) as cdn, HubSite(cdn) as hub:
        hub.add("org/model", {"a.bin": BIG})
        import hashlib

        cdn.manners[f"/cdn/{hashlib.sha256(BIG).hexdigest()}"] = Manners(statuses=[403] * 9)
        with pytest.raises(FetchError, match=r"where 127\.0\.0\.1 keeps the files of org/model, answers HTTP 403"):
            fetch(hub.endpoint, tmp_path)


def test_compressed_although_asked_not_to(tmp_path):
    with HubSite() as hub:
        hub.add("org/model", {"a.bin": BIG})
        hub.manners["a.bin"] = Manners(encoding="gzip")
        with pytest.raises(FetchError, match=r"does not deliver a\.bin: it comes compressed, though asked not to"):
            fetch(hub.endpoint, tmp_path)


def test_nobody_waits_for_years(tmp_path):
    with FileSite({"/a.bin": BIG}, {"/a.bin": Manners(statuses=[(503, {"Retry-After": "9" * 15})])}) as site:
        with pytest.raises(FetchError, match=r"come back in more than a day$") as caught:
            download_url(Net(LIMITS), site.url("/a.bin"), tmp_path / "a")
        assert "another day" in caught.value.hint


def test_a_renaming_that_fails_names_its_goal():
    fault = OSError(errno.EPERM, "no", "/partial/file", None, "/to/a.bin")
    assert explain_disk(fault, "/to").what == "cannot write to /to/a.bin: Operation not permitted"


def test_the_mix_of_a_folder_with_a_line_end_can_be_read():
    command = next_commands({"mix665k": ["llava_v1_5_mix665k.json"]}, Path("/d/a\nb"))[1]
    text = command[command.index("datasets:") : command.rindex("' >")]
    assert yaml.safe_load(text)["datasets"][0]["json_path"] == "/d/a\nb/llava_v1_5_mix665k.json"
