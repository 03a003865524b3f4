"""The Hub through huggingface_hub, against servers on loopback."""

from __future__ import annotations

import hashlib

import pytest

from llavanext_cli.errors import ConfigError, DataError, FetchError, LlavaNextError
from tests.unit.fetching.folders import check, fetch
from tests.unit.fetching.loopback import FileSite, HubSite, Manners, content, files, flip

BIG = content(2_500_000, 1)
FILES = {
    "config.json": b'{"a": 1}',
    "model.safetensors": BIG,
    "sub/tokenizer.model": content(20_000, 2),
    "notes.txt": b"hello",
}
CDN_PATH = f"/cdn/{hashlib.sha256(BIG).hexdigest()}"
TOKEN = "hf_rightrightrightrightright"


@pytest.fixture
def hub():
    with FileSite({}) as cdn, HubSite(cdn) as site:
        site.artifact = "org/model"
        site.add("org/model", FILES)
        yield site


def failure(site, to, *names, **options) -> LlavaNextError:
    with pytest.raises(LlavaNextError) as caught:
        fetch(site, to, *names, **options)
    error = caught.value
    assert "\n" not in error.what and error.hint and TOKEN not in f"{error}{error.hint}{error.__cause__}"
    return error


# --------------------------------------------------------------------------------------------------------- what arrives


def test_a_repository_arrives_whole_and_once(hub, tmp_path):
    report = fetch(hub, tmp_path)
    assert files(tmp_path) == FILES and (report.fetched, report.ready) == (4, 0)
    assert report.artifacts[0].revision == hub.repositories["model", "org/model"].branches["main"]
    assert sorted(path.name for path in (tmp_path / ".llavanext").iterdir()) == ["manifest.json"]
    sent, manifest = hub.content_sent(), (tmp_path / ".llavanext/manifest.json").read_bytes()
    report = fetch(hub, tmp_path)
    assert (report.fetched, report.ready) == (0, 4) and hub.content_sent() == sent
    assert (tmp_path / ".llavanext/manifest.json").read_bytes() == manifest


def test_a_data_set_of_many_pages(hub, tmp_path):
    many = {f"data/{number:03}.txt": b"%d" % number for number in range(20)}
    hub.add("org/set", many, "dataset")
    fetch(hub, tmp_path, "dataset:org/set")
    assert files(tmp_path) == many


def test_what_is_there_already_is_recognised(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(BIG)
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    report = fetch(hub, tmp_path)
    assert (report.fetched, report.adopted) == (2, 2) and hub.cdn.sent[CDN_PATH] == 0


def test_the_hub_s_own_cache_is_used(hub, tmp_path):
    from huggingface_hub import constants, hf_hub_download

    hf_hub_download("org/model", "model.safetensors", endpoint=hub.endpoint, cache_dir=constants.HF_HUB_CACHE)
    sent = hub.cdn.sent[CDN_PATH]
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES and hub.cdn.sent[CDN_PATH] == sent


def test_a_new_commit_replaces_what_was_fetched_and_nothing_else(hub, tmp_path):
    fetch(hub, tmp_path)
    hub.add("org/model", FILES | {"config.json": b"{}"})
    sent = hub.content_sent()
    assert fetch(hub, tmp_path).fetched == 1
    assert files(tmp_path) == FILES | {"config.json": b"{}"} and hub.content_sent() - sent == 2


def test_files_that_somebody_changed_are_not_overwritten(hub, tmp_path):
    fetch(hub, tmp_path)
    (tmp_path / "config.json").write_text("my own")
    error = failure(hub, tmp_path)
    assert "files that differ from what would be fetched: 1" in error.what and error.details == ("config.json",)
    assert "--force" in error.hint and (tmp_path / "config.json").read_text() == "my own"
    fetch(hub, tmp_path, force=True)
    assert files(tmp_path) == FILES


def test_two_repositories_need_two_folders(hub, tmp_path):
    hub.add("org/other", {"config.json": b"[]"})
    error = failure(hub, tmp_path / "to", "org/model", "org/other")
    assert error.what == "org/model and org/other both have a config.json: they need separate folders"
    assert error.hint == f"llavanext fetch org/other --to {tmp_path}/to/other" and not (tmp_path / "to").exists()
    fetch(hub, tmp_path)
    assert "files that differ from what would be fetched: 1" in failure(hub, tmp_path, "org/other").what


def test_only_and_revision(hub, tmp_path):
    first = hub.repositories["model", "org/model"].branches["main"]
    hub.add("org/model", FILES | {"config.json": b"2"}, branch="v2")
    fetch(hub, tmp_path / "a", only=("*.json", "notes*"))
    assert set(files(tmp_path / "a")) == {"config.json", "notes.txt"}
    for revision, data in (("v2", b"2"), (first, FILES["config.json"])):
        fetch(hub, tmp_path / revision, only=("config.json",), revision=revision)
        assert files(tmp_path / revision) == {"config.json": data}


def test_a_dry_run_touches_nothing(hub, tmp_path):
    report = fetch(hub, tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists() and hub.content_sent() == 0
    assert (report.fetched, report.transferred) == (4, sum(map(len, FILES.values())))


def test_without_a_network_a_complete_folder_is_enough(hub, tmp_path):
    fetch(hub, tmp_path)
    nowhere = {"endpoint": "http://127.0.0.1:9"}
    assert fetch(hub, tmp_path, **nowhere).ready == 4
    assert failure(hub, tmp_path, revision="v2", **nowhere).what == "127.0.0.1:9 refuses the connection"
    (tmp_path / "config.json").unlink()
    assert failure(hub, tmp_path, **nowhere).what == "127.0.0.1:9 refuses the connection"


# ------------------------------------------------------------------------------------------------------ bad connections


@pytest.mark.parametrize(
    "manners",
    [Manners(cut_every=900_000), Manners(ranges=False, cut_once_at=900_000), Manners(stall_at=900_000)],
    ids=["cut again and again", "no ranges, cut once", "silent once"],
)
def test_a_connection_that_breaks(hub, tmp_path, manners):
    hub.cdn.manners[CDN_PATH] = manners
    fetch(hub, tmp_path, retries=2)
    assert files(tmp_path) == FILES


def test_a_connection_that_breaks_too_often(hub, tmp_path):
    hub.cdn.manners[CDN_PATH] = Manners(ranges=False, cut_every=900_000)
    error = failure(hub, tmp_path)
    assert error.what == "the connection to 127.0.0.1 broke before the answer was complete"
    assert "it resumes" in error.hint and "model.safetensors" not in files(tmp_path)


def test_changed_bytes_are_deleted(hub, tmp_path):
    hub.cdn.files[CDN_PATH] = BIG
    real = hub.cdn.serve
    hub.cdn.serve = lambda handler, data, *rest: real(handler, b"x" + data[1:] if data == BIG else data, *rest)
    assert "model.safetensors differs from the published file: sha256" in failure(hub, tmp_path).what
    assert "model.safetensors" not in files(tmp_path)
    hub.cdn.serve = real
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES


def test_a_small_file_with_changed_bytes(hub, tmp_path):
    real = hub.serve
    hub.serve = lambda handler, data, *rest: real(handler, b"x" * len(data) if data == b"hello" else data, *rest)
    assert "notes.txt differs from the published file: git blob" in failure(hub, tmp_path).what


def test_a_small_file_that_rots_is_repaired(hub, tmp_path):
    fetch(hub, tmp_path)
    flip(tmp_path / "config.json")
    assert check(hub, tmp_path).broken[0].startswith("config.json: sha256") and files(tmp_path) == FILES


# ------------------------------------------------------------------------------------------------------------- refusals


def test_gated(hub, tmp_path, monkeypatch):
    hub.add("org/gated", FILES, gated=True, token=TOKEN)
    error = failure(hub, tmp_path, "org/gated")
    assert error.what == "org/gated is gated: you must accept its terms first"
    assert f"accept them at {hub.endpoint}/org/gated" in error.hint and "HF_TOKEN" in error.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(hub, tmp_path, "org/gated")
    assert files(tmp_path) == FILES


def test_private_and_missing(hub, tmp_path, monkeypatch):
    hub.add("org/private", FILES, token=TOKEN)
    error = failure(hub, tmp_path, "org/private")
    assert error.what == "127.0.0.1 has no model org/private, or it is private" and "set HF_TOKEN" in error.hint
    assert "dataset:org/private" in error.hint
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    fetch(hub, tmp_path, "org/private")
    assert "has no dataset none/like-it" in failure(hub, tmp_path, "dataset:none/like-it").what
    assert "did you mean video-7b" in failure(hub, tmp_path, "org/LLaVA-NeXT-Video-7B-hf").hint
    error = failure(hub, tmp_path, "org/model", revision="v9")
    assert error.what == "127.0.0.1 does not have org/model at revision v9 (HTTP 404)" and "--revision" in error.hint


@pytest.mark.parametrize(
    ("status", "what"),
    [
        ((401, {"X-Error-Message": "Invalid credentials in Authorization header"}), "rejects the token (HTTP 401)"),
        (403, "127.0.0.1 does not give out org/model at revision main (HTTP 403)"),
        (418, "127.0.0.1 answers HTTP 418 for org/model at revision main"),
        (
            (429, {"Retry-After": "3600"}),
            "127.0.0.1 is busy (HTTP 429) and asks to wait 3600 s: org/model at revision main",
        ),
        (503, "127.0.0.1 is busy (HTTP 503): org/model at revision main"),
    ],
)
def test_a_hub_that_refuses(hub, tmp_path, status, what):
    hub.status = [status] * 5
    assert what in failure(hub, tmp_path / "to").what and not (tmp_path / "to").exists()


def test_a_hub_that_is_busy_for_a_moment(hub, tmp_path):
    hub.status = [(429, {"Retry-After": "1"}), 502]
    fetch(hub, tmp_path, retries=2)
    assert files(tmp_path) == FILES


def test_a_file_that_is_refused(hub, tmp_path):
    hub.manners["config.json"] = Manners(statuses=[403] * 9)
    assert failure(hub, tmp_path).what == "127.0.0.1 does not give out config.json of org/model (HTTP 403)"
    hub.manners["config.json"] = Manners(statuses=[404] * 9)
    assert failure(hub, tmp_path).what == "127.0.0.1 does not have config.json of org/model (HTTP 404)"


@pytest.mark.parametrize("answer", [b"<html>login</html>", b"[]", b'{"id": 7}'])
def test_something_that_is_not_a_hub(tmp_path, answer):
    with FileSite({"/api/models/org/model/revision/main": answer}) as site:
        error = failure(site, tmp_path / "to", "org/model")
    assert "127.0.0.1 does not answer as a Hub does" in error.what or "does not have" in error.what
    assert not (tmp_path / "to").exists()


def test_what_huggingface_hub_refuses_itself(hub, tmp_path, monkeypatch):
    assert "org/a--b at revision main: Cannot have -- or .. in repo_id" in failure(hub, tmp_path, "org/a--b").what
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_ENABLE_HF_TRANSFER", True)
    assert "Fast download using 'hf_transfer' is enabled" in failure(hub, tmp_path).what


def test_offline(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    from huggingface_hub.utils import reset_sessions

    reset_sessions()
    error = failure(hub, tmp_path)
    reset_sessions()
    assert error.what == "HF_HUB_OFFLINE is set, so nothing can be fetched" and error.hint == "unset HF_HUB_OFFLINE"


@pytest.mark.parametrize("fault", [RuntimeError, ConnectionError])
def test_xet_that_fails_names_the_way_around_it(hub, tmp_path, monkeypatch, fault):
    import huggingface_hub

    def broken(*args, **named):
        raise fault("Data processing error: CAS service error\n  at src/lib.rs:7")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", broken)
    error = failure(hub, tmp_path)
    assert error.what.startswith("127.0.0.1 does not deliver ") and error.what.endswith("CAS service error")
    assert "HF_HUB_DISABLE_XET=1" in error.hint


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil", ".llavanext/manifest.json", "a/../../evil", "a\nb"])
def test_names_that_are_not_safe(hub, tmp_path, name):
    hub.add("org/hostile", {name: b"evil"})
    error = failure(hub, tmp_path / "to", "org/hostile")
    assert isinstance(error, DataError) and "is not safe" in error.what
    assert not (tmp_path / "to").exists() and not list(tmp_path.rglob("*evil*"))


# --------------------------------------------------------------------------------------------------------------- tokens


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    report = fetch(hub, tmp_path)
    assert {headers.get("authorization") for _, headers in hub.headers_seen} == {f"Bearer {TOKEN}"}
    assert hub.cdn.headers_seen and not any("authorization" in headers for _, headers in hub.cdn.headers_seen)
    written = (tmp_path / ".llavanext/manifest.json").read_text()
    assert TOKEN not in written + str(report) and "secretsignature" not in written


@pytest.mark.parametrize("token", ["hf_a b", "hf_\u4e2d", "token=hf_a,b"])
def test_a_token_that_is_not_one(hub, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    error = failure(hub, tmp_path)
    assert error.what == "HF_TOKEN: the token has characters that a token cannot have" and token not in error.hint


@pytest.mark.parametrize("endpoint", ["nonsense", "ftp://host", "https://", "https://user:hf_secret@host"])
def test_endpoints_that_are_not_addresses(hub, tmp_path, endpoint):
    with pytest.raises(ConfigError, match=r"--endpoint: .* is not an address such as https://host") as caught:
        fetch(hub, tmp_path, endpoint=endpoint)
    assert "hf_secret" not in str(caught.value)


def test_the_environment_s_endpoint(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    fetch(hub, tmp_path, endpoint=None)
    assert files(tmp_path) == FILES
    monkeypatch.setenv("HF_ENDPOINT", "huggingface.co")
    with pytest.raises(ConfigError, match=r"HF_ENDPOINT: 'huggingface.co' is not an address"):
        fetch(hub, tmp_path, endpoint=None)


def test_an_artifact_that_is_not_at_the_source(hub, tmp_path, monkeypatch):
    with pytest.raises(FetchError, match="refuses the connection"):
        fetch(hub, tmp_path, source="modelscope", endpoint="http://127.0.0.1:9", retries=0)
    from llavanext_cli.fetching.registry import ARTIFACTS, Artifact, Place

    monkeypatch.setitem(ARTIFACTS, "here-only", Artifact("here-only", "", "", hub=Place("org/model")))
    with pytest.raises(ConfigError, match="here-only is not available from modelscope"):
        fetch(hub, tmp_path, "here-only", source="modelscope")
