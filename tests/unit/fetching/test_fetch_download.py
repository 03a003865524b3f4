"""Plain addresses and ModelScope, over loopback: resumed, verified, and in plain words when a server misbehaves."""

from __future__ import annotations

import hashlib
import ssl
import subprocess

import pytest

from llavanext_cli.errors import ConfigError, FetchError, LlavaNextError
from llavanext_cli.fetching import download, hub
from llavanext_cli.fetching.network import check_redirect
from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.run import run_fetch
from tests.unit.fetching.loopback import FileSite, Manners, ModelScopeSite, ProxySite, content, files

DATA = content(3_000_000)
OTHER = content(2_000_000, 1)
SHA256 = hashlib.sha256(DATA).hexdigest()


@pytest.fixture
def site():
    with FileSite({"/a.bin": DATA}) as site:
        yield site


def get(site, to, pinned=True, name="/a.bin", **options):
    address = site.url(name) + (f"#sha256={SHA256}" if pinned else "")
    return run_fetch(FetchRequest(to=to, names=(address,), **{"timeout": 1.0, "retries": 1, **options}))


def failure(site, to, **options) -> LlavaNextError:
    with pytest.raises(LlavaNextError) as caught:
        get(site, to, **options)
    assert "\n" not in caught.value.what and caught.value.hint and files(to) == {}
    return caught.value


def interrupt(site, to, monkeypatch, after: int, **options) -> None:
    """Stop a download after so many bytes, as Ctrl-C does; what had arrived stays."""
    with monkeypatch.context() as patch:
        real, count = download.Download._request, 0

        def request(self):
            class Digest:
                def update(_, chunk):
                    nonlocal count
                    count += len(chunk)
                    if count >= after:
                        raise KeyboardInterrupt

            self._digest = Digest()
            real(self)

        patch.setattr(download.Download, "_request", request)
        patch.setattr(download, "CHUNK", 1 << 16)
        with pytest.raises(KeyboardInterrupt):
            get(site, to, **options)


# ------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("pinned", [True, False])
def test_a_download_resumes_where_it_was_interrupted(site, tmp_path, monkeypatch, pinned):
    interrupt(site, tmp_path, monkeypatch, 1_000_000, pinned=pinned)
    assert files(tmp_path) == {}
    get(site, tmp_path, pinned)
    assert files(tmp_path) == {"a.bin": DATA}
    start = int(site.log[-1][2].removeprefix("bytes=").rstrip("-"))
    assert start >= 1_000_000 and site.headers_seen[-1][1].get("if-range", "") == ("" if pinned else site_etag())


def site_etag() -> str:
    return f'"{hashlib.md5(DATA).hexdigest()}"'


def test_a_file_that_changed_meanwhile_starts_from_zero(site, tmp_path, monkeypatch):
    interrupt(site, tmp_path, monkeypatch, 1_000_000, pinned=False)
    site.files["/a.bin"] = OTHER
    get(site, tmp_path, pinned=False)
    assert files(tmp_path) == {"a.bin": OTHER}


def test_without_an_etag_and_a_digest_nothing_is_resumed(site, tmp_path, monkeypatch):
    site.manners["/a.bin"] = Manners(etag="")
    interrupt(site, tmp_path, monkeypatch, 1_000_000, pinned=False)
    get(site, tmp_path, pinned=False)
    assert files(tmp_path) == {"a.bin": DATA} and {asked for _, _, asked in site.log} == {"bytes=0-0", ""}


def test_a_part_of_another_file_is_noticed_by_the_digest(site, tmp_path, monkeypatch):
    interrupt(site, tmp_path, monkeypatch, 1_000_000)
    part = next((tmp_path / ".llavanext/download").rglob("file"))
    part.write_bytes(bytes(part.stat().st_size))
    get(site, tmp_path)
    assert files(tmp_path) == {"a.bin": DATA}


@pytest.mark.parametrize("size", [len(DATA), len(DATA) + 10])
def test_a_part_that_is_complete_or_too_long(site, tmp_path, monkeypatch, size):
    interrupt(site, tmp_path, monkeypatch, 1_000_000)
    part = next((tmp_path / ".llavanext/download").rglob("file"))
    part.write_bytes((DATA + bytes(10))[:size])
    sent = site.sent["/a.bin"]
    get(site, tmp_path)
    assert files(tmp_path) == {"a.bin": DATA}
    if size == len(DATA):
        assert site.sent["/a.bin"] - sent == 1  # the request that asks for the size


@pytest.mark.parametrize(
    "manners",
    [Manners(cut_every=900_000), Manners(ranges=False, cut_once_at=900_000), Manners(stall_at=900_000)],
    ids=["cut again and again", "no ranges, cut once", "silent once"],
)
def test_a_connection_that_breaks(site, tmp_path, manners):
    site.manners["/a.bin"] = manners
    get(site, tmp_path)
    assert files(tmp_path) == {"a.bin": DATA}


def test_several_files_at_once(tmp_path):
    names = {f"/{number}.bin": content(500_000, number) for number in range(6)}
    with FileSite(names, {name: Manners(rate=1_000_000) for name in names}) as site:
        addresses = tuple(site.url(name) for name in names)
        report = run_fetch(FetchRequest(to=tmp_path, names=addresses, jobs=6))
    assert files(tmp_path) == {name[1:]: data for name, data in names.items()}
    assert report.fetched == report.unverified == 6 and report.seconds < 2.5  # in turns it is 3 s


# ---------------------------------------------------------------------------------------------------------- bad servers


@pytest.mark.parametrize(
    ("manners", "what"),
    [
        (Manners(statuses=[404] * 9), "127.0.0.1 does not have a.bin (HTTP 404)"),
        (Manners(statuses=[403] * 9), "127.0.0.1 does not give out a.bin (HTTP 403)"),
        (Manners(statuses=[500] * 9), "127.0.0.1 is busy (HTTP 500): a.bin"),
        (Manners(statuses=[(429, {"Retry-After": "86400"})] * 9), "is busy (HTTP 429) and asks to wait 86400 s"),
        (Manners(statuses=[(429, {"Retry-After": "nonsense"})] * 9), "127.0.0.1 is busy (HTTP 429): a.bin"),
        (Manners(statuses=[418]), "127.0.0.1 answers HTTP 418 for a.bin"),
        (Manners(ranges=False, cut_every=100_000), "does not deliver a.bin: the connection broke"),
        (Manners(ranges=False, announce=1000), "127.0.0.1 does not deliver a.bin: the connection broke"),
        (Manners(redirect="/a.bin"), "127.0.0.1 redirects in a circle"),
        (Manners(redirect="file:///etc/passwd"), "127.0.0.1 redirects from http to file, which is not safe"),
    ],
)
def test_bad_servers(site, tmp_path, manners, what):
    site.manners["/a.bin"] = manners
    assert what in failure(site, tmp_path).what
    site.manners.clear()
    get(site, tmp_path)
    assert files(tmp_path) == {"a.bin": DATA}


def test_a_server_that_is_busy_for_a_moment(site, tmp_path):
    site.manners["/a.bin"] = Manners(statuses=[503, (429, {"Retry-After": "1"})])
    get(site, tmp_path, retries=3)
    assert files(tmp_path) == {"a.bin": DATA}


def test_changed_bytes_are_deleted(site, tmp_path):
    site.files["/a.bin"] = b"x" + DATA[1:]
    assert "a.bin differs from the published file: sha256" in failure(site, tmp_path).what
    assert not list((tmp_path / ".llavanext").rglob("file"))


def test_a_web_page_in_place_of_a_file(site, tmp_path):
    site.manners["/a.bin"] = Manners(page=True)
    error = failure(site, tmp_path, pinned=False)
    assert "answers with a web page instead of the file a.bin" in error.what and "ORG/REPO" in error.hint


def test_nobody_answers(site, tmp_path, monkeypatch):
    site.server.shutdown()
    site.server.server_close()
    assert f"127.0.0.1:{site.port} refuses the connection" in failure(site, tmp_path).what
    with pytest.raises(FetchError, match=r"the host nowhere.invalid cannot be found \(DNS\)"):
        run_fetch(FetchRequest(to=tmp_path, names=("http://nowhere.invalid/a.bin",), retries=0))
    monkeypatch.setenv("http_proxy", f"http://user:secretword@127.0.0.1:{site.port}")
    error = failure(site, tmp_path)
    assert "the proxy between here and 127.0.0.1 does not work" in error.what
    assert "secretword" not in f"{error}{error.hint}{error.__cause__}"


def test_a_proxy_is_used(tmp_path, monkeypatch):
    pages = {"http://files.example/a.bin": lambda proxy, handler: proxy.serve(handler, OTHER, Manners())}
    with ProxySite(pages) as proxy:
        monkeypatch.setenv("http_proxy", proxy.endpoint)
        run_fetch(FetchRequest(to=tmp_path, names=("http://files.example/a.bin",)))
    assert files(tmp_path) == {"a.bin": OTHER}


@pytest.mark.parametrize(
    ("address", "what"),
    [
        ("https://host", "an address needs a host and must end in a file's name"),
        ("https:///a.bin", "an address needs a host"),
        ("https://host/a.bin#md5=1", "must be sha256= and 64 hexadecimal digits"),
        ("ftp://host/a.bin", "unknown artifact 'ftp://host/a.bin'"),
    ],
)
def test_addresses_that_are_not_of_a_file(tmp_path, address, what):
    with pytest.raises(ConfigError, match=what):
        run_fetch(FetchRequest(to=tmp_path / "to", names=(address,)))
    assert not (tmp_path / "to").exists()


# --------------------------------------------------------------------------------------------------------------- safety


@pytest.fixture
def secure_site(site, tmp_path_factory, monkeypatch):
    """A site over https, whose certificate is trusted."""
    folder = tmp_path_factory.mktemp("tls")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 1 -subj /CN=a -addext subjectAltName=IP:127.0.0.1"
    words = [*command.split(), "-keyout", str(folder / "key"), "-out", str(folder / "pem")]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(folder / "pem"))
    with FileSite({}) as secure:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(folder / "pem", folder / "key")
        secure.server.socket = context.wrap_socket(secure.server.socket, server_side=True)
        secure.files["/a.bin"] = DATA
        secure.url = lambda path: f"https://127.0.0.1:{secure.port}{path}"
        yield secure


def test_https_never_becomes_http(secure_site, site, tmp_path, monkeypatch):
    get(secure_site, tmp_path / "direct")
    assert files(tmp_path / "direct") == {"a.bin": DATA}
    secure_site.manners["/b.bin"] = Manners(redirect=site.url("/a.bin"))
    error = failure(secure_site, tmp_path / "to", name="/b.bin")
    assert error.what == "127.0.0.1 redirects from https to http, which is not safe" and site.log == []
    monkeypatch.delenv("REQUESTS_CA_BUNDLE")
    assert "the certificate of 127.0.0.1 is not trusted" in failure(secure_site, tmp_path / "new").what
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "gone"))
    error = failure(secure_site, tmp_path / "new")
    assert "the file of certificates is missing" in error.what and "REQUESTS_CA_BUNDLE" in error.hint


def test_the_hub_s_files_are_not_redirected_to_http(monkeypatch, tmp_path):
    import huggingface_hub

    class Metadata:
        location = "http://cdn.example/file"

    monkeypatch.setattr(huggingface_hub, "get_hf_file_metadata", lambda url, timeout: Metadata)
    origin = hub.Origin("hf", "org/model", "model", "main", "config.json")
    with pytest.raises(FetchError, match=r"huggingface.co redirects from https to http"):
        hub.Hub("https://huggingface.co", 1.0, 0).download(origin, tmp_path)
    check_redirect("http://a/b", "https://a/b")


def test_passwords_and_signatures_are_used_and_not_written(site, tmp_path):
    address = site.url("/a.bin").replace("://", "://user:topsecret@") + "?sig=topsecret"
    report = run_fetch(FetchRequest(to=tmp_path, names=(address,)))
    assert {headers["authorization"].partition(" ")[0] for _, headers in site.headers_seen} == {"Basic"}
    assert {path for path, _ in site.headers_seen} == {"/a.bin?sig=topsecret"}
    assert "topsecret" not in str(report) + (tmp_path / ".llavanext/manifest.json").read_text()


# ----------------------------------------------------------------------------------------------------------- ModelScope


@pytest.fixture
def scope():
    with ModelScopeSite() as scope:
        scope.add("org/model", {"config.json": b"{}", "sub/model.safetensors": DATA})
        yield scope


def scoped(scope, to, name="org/model", **options):
    request = FetchRequest(to=to, names=(name,), source="modelscope", endpoint=scope.endpoint, retries=0, **options)
    return run_fetch(request)


def test_a_model_of_modelscope(scope, tmp_path):
    assert scoped(scope, tmp_path).fetched == 2
    assert files(tmp_path) == {"config.json": b"{}", "sub/model.safetensors": DATA}
    sent = scope.sent.total()
    assert scoped(scope, tmp_path).ready == 2 and scope.sent.total() == sent


def test_a_data_set_of_many_pages(scope, tmp_path):
    many = {f"data/{number:03}.txt": b"%d" % number for number in range(230)}
    scope.add("org/set", many, "dataset")
    scoped(scope, tmp_path, "dataset:org/set", only=("*1.txt",))
    assert files(tmp_path) == {path: data for path, data in many.items() if path.endswith("1.txt")}


def test_files_without_a_digest_are_fetched_once(scope, tmp_path):
    scope.digests = False
    assert scoped(scope, tmp_path).unverified == 2
    assert scoped(scope, tmp_path).ready == 2


def test_the_token_is_a_cookie_of_modelscope_alone(scope, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secret")
    with FileSite({"/a.bin": DATA}) as other:
        elsewhere = other.url("/a.bin").replace("127.0.0.1", "localhost")
        scope.manners["sub/model.safetensors"] = Manners(redirect=elsewhere)
        scoped(scope, tmp_path)
        assert not any("cookie" in headers for _, headers in other.headers_seen) and other.log
    assert all(headers["cookie"] == "m_session_id=ms-secret" for _, headers in scope.headers_seen)


def test_what_modelscope_does_not_have_or_give(scope, tmp_path):
    with pytest.raises(FetchError, match=r"has no model org/nothing at revision 'master'"):
        scoped(scope, tmp_path, "org/nothing")
    with FileSite({}, {"/api/v1/models/org/model/repo/files": Manners(statuses=[403])}) as refusing:
        with pytest.raises(FetchError, match=r"does not give out org/model \(HTTP 403\)") as caught:
            scoped(refusing, tmp_path)
        assert "MODELSCOPE_API_TOKEN" in caught.value.hint


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        (b"<html>", "does not answer as ModelScope does"),
        (b'{"Code": 200, "Data": []}', "does not answer as ModelScope does"),
        (b'{"Code": 200, "Data": {"Files": [7]}}', "does not answer as ModelScope does"),
        (b'{"Code": 7, "Message": "closed"}', r"refuses org/model \(code 7\): closed"),
    ],
)
def test_answers_that_are_not_a_listing(tmp_path, answer, what):
    with FileSite({"/api/v1/models/org/model/repo/files": answer}) as site, pytest.raises(FetchError, match=what):
        scoped(site, tmp_path)


def test_one_file_has_the_same_digest_at_both_homes(scope, tmp_path, monkeypatch):
    from llavanext_cli.fetching.registry import ARTIFACTS, DATASET, Artifact, Place, WebFile

    web = WebFile("http://nowhere.invalid/a.bin", len(DATA), SHA256)
    artifact = Artifact("pinned", "", "", modelscope=Place("org/set", DATASET), web=web, include=("a.bin",))
    monkeypatch.setitem(ARTIFACTS, "pinned", artifact)
    scope.add("org/set", {"a.bin": OTHER}, "dataset")
    with pytest.raises(FetchError, match=f"a.bin has {len(OTHER)} bytes at 127.0.0.1, not {len(DATA)}"):
        scoped(scope, tmp_path, "pinned")
    scope.add("org/set", {"a.bin": DATA}, "dataset")
    scoped(scope, tmp_path, "pinned")
    assert files(tmp_path) == {"a.bin": DATA}
