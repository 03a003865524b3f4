"""The Hub through huggingface_hub, and ModelScope through plain HTTP, against servers on loopback."""

from __future__ import annotations

import hashlib
import os
import time

import pytest

from llavanext_cli.errors import ConfigError, DataError, FetchError, LlavaNextError
from llavanext_cli.fetching import endpoint as endpoint_module
from llavanext_cli.fetching.check import check_folder
from llavanext_cli.fetching.net import Limits
from llavanext_cli.fetching.run import run_fetch
from tests.unit.fetching.loopback import FileSite, HubSite, Manners, ModelScopeSite, content

BIG = content(2_000_000)
FILES = {
    "config.json": b'{"model_type": "llava_next_video"}',
    "model.safetensors": BIG,
    "sub/notes.txt": b"hi",
    "e": b"",
}
LIMITS = Limits(connect=2.0, stall=1.0, retries=2, pause=0.02, longest_wait=3.0)


@pytest.fixture
def hub():
    with FileSite({}) as cdn, HubSite(cdn) as site:
        site.add("org/model", FILES)
        yield site


def fetch(site, to, *names, **options):
    return run_fetch(
        names or ("org/model",), to, endpoint=site.endpoint, limits=options.pop("limits", LIMITS), **options
    )


def failure(site, to, *names, kind: type[LlavaNextError] = FetchError, **options) -> LlavaNextError:
    with pytest.raises(kind) as caught:
        fetch(site, to, *names, **options)
    assert "\n" not in caught.value.what and caught.value.hint
    return caught.value


def files(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and ".llavanext" not in path.parts
    }


def test_a_repository_arrives_whole(hub, tmp_path):
    report = fetch(hub, tmp_path)
    assert files(tmp_path) == FILES
    assert (report.fetched, report.ready) == (4, 0)
    assert report.transferred == hub.content_sent() == sum(map(len, FILES.values()))
    assert report.artifacts[0].revision == hub.repositories["model", "org/model"].branches["main"]
    assert not (tmp_path / ".llavanext" / "partial").exists() and not (tmp_path / ".cache").exists()


def test_a_data_set_and_a_folder_of_many_pages(hub, tmp_path):
    many = {f"data/{number:03}.txt": b"%d" % number for number in range(20)}
    hub.add("org/set", many, "dataset")
    fetch(hub, tmp_path, "dataset:org/set")
    assert files(tmp_path) == many
    assert sum("/tree/" in line[1] and line[0] == "GET" for line in hub.log) == 7


def test_the_second_time_no_content_is_transferred(hub, tmp_path):
    fetch(hub, tmp_path)
    before = hub.content_sent()
    manifest = (tmp_path / ".llavanext/manifest.json").read_bytes()
    report = fetch(hub, tmp_path)
    assert hub.content_sent() == before and (report.fetched, report.ready, report.transferred) == (0, 4, 0)
    assert (tmp_path / ".llavanext/manifest.json").read_bytes() == manifest


def test_what_is_there_already_is_recognised(hub, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(BIG)
    (tmp_path / "config.json").write_bytes(FILES["config.json"])
    report = fetch(hub, tmp_path)
    assert report.adopted == 2 and report.transferred < 100 and files(tmp_path) == FILES
    assert fetch(hub, tmp_path).ready == 4


def test_the_hub_s_own_cache_is_used(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants, hf_hub_download

    hf_hub_download("org/model", "model.safetensors", endpoint=hub.endpoint, cache_dir=constants.HF_HUB_CACHE)
    before = hub.content_sent()
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES and hub.content_sent() - before < 100


def test_a_new_commit_replaces_what_was_fetched_and_nothing_else(hub, tmp_path):
    fetch(hub, tmp_path)
    hub.add("org/model", FILES | {"config.json": b"{}"})
    before = hub.content_sent()
    notes = []
    fetch(hub, tmp_path, note=notes.append)
    assert (tmp_path / "config.json").read_bytes() == b"{}" and hub.content_sent() - before < 100
    hub.add("org/model", {"config.json": b"{}", "model.safetensors": BIG})
    fetch(hub, tmp_path, note=notes.append)
    assert [note.partition(" stay")[0].split(" of ")[0] for note in notes] == ["2 files"]


def test_files_that_somebody_changed_are_not_overwritten(hub, tmp_path):
    fetch(hub, tmp_path)
    (tmp_path / "config.json").write_text("my own")
    error = failure(hub, tmp_path, kind=DataError)
    assert error.details == ("config.json",) and "--force" in error.hint and "--check" in error.hint
    assert (tmp_path / "config.json").read_text() == "my own"
    fetch(hub, tmp_path, force=True)
    assert files(tmp_path) == FILES


def test_two_repositories_need_two_folders(hub, tmp_path):
    hub.add("org/other", {"config.json": b"[]"})
    error = failure(hub, tmp_path, "org/model", "org/other", kind=ConfigError)
    assert "both have a config.json" in error.what and error.hint == f"llavanext fetch org/other --to {tmp_path}/other"
    fetch(hub, tmp_path, "org/model")
    assert "belongs to something else" in failure(hub, tmp_path, "org/other", kind=ConfigError).what


def test_only_and_revision(hub, tmp_path):
    first = hub.repositories["model", "org/model"].branches["main"]
    hub.add("org/model", FILES | {"config.json": b"2"}, branch="v2")
    fetch(hub, tmp_path / "a", only=["*.json", "notes*"])
    assert sorted(files(tmp_path / "a")) == ["config.json", "sub/notes.txt"]
    fetch(hub, tmp_path / "b", only=["config.json"], revision="v2")
    assert files(tmp_path / "b") == {"config.json": b"2"}
    fetch(hub, tmp_path / "c", only=["config.json"], revision=first)
    assert files(tmp_path / "c") == {"config.json": FILES["config.json"]}
    assert "no file that is wanted: *.nope" in failure(hub, tmp_path / "d", only=["*.nope"], kind=ConfigError).what
    assert not (tmp_path / "d").exists()


def test_a_dry_run_touches_nothing(hub, tmp_path):
    report = fetch(hub, tmp_path / "new", dry_run=True)
    assert not (tmp_path / "new").exists() and hub.content_sent() == 0
    total = sum(map(len, FILES.values()))
    assert (report.fetched, report.transferred, report.needed) == (4, total, total) and report.free > total


# ---------------------------------------------------------------------------------------------------- broken transfers


def test_a_connection_cut_at_every_100_kb_is_no_obstacle(hub, tmp_path):
    hub.cdn.manners = {f"/cdn/{hashlib.sha256(BIG).hexdigest()}": Manners(cut_every=100_000)}
    report = fetch(hub, tmp_path)
    assert files(tmp_path) == FILES
    assert report.transferred == sum(map(len, FILES.values()))


def test_silence_is_noticed_and_the_rest_is_asked_for(hub, tmp_path):
    hub.cdn.manners = {f"/cdn/{hashlib.sha256(BIG).hexdigest()}": Manners(stall_at=500_000, stall_times=1)}
    started = time.monotonic()
    report = fetch(hub, tmp_path)
    assert files(tmp_path) == FILES and report.transferred == sum(map(len, FILES.values()))
    assert time.monotonic() - started < 10


def test_a_server_without_ranges_and_one_cut(hub, tmp_path):
    hub.cdn.manners = {f"/cdn/{hashlib.sha256(BIG).hexdigest()}": Manners(ranges=False, cut_once_at=300_000)}
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES


@pytest.mark.parametrize("lie", [1000, -1000])
def test_a_server_that_lies_about_the_length(hub, tmp_path, lie):
    hub.cdn.manners = {f"/cdn/{hashlib.sha256(BIG).hexdigest()}": Manners(ranges=False, announce=lie)}
    if lie > 0:  # the whole file came, and its digest says so
        fetch(hub, tmp_path)
        assert files(tmp_path) == FILES
    else:
        assert "does not deliver model.safetensors" in failure(hub, tmp_path).what
        assert "model.safetensors" not in files(tmp_path)


def test_changed_bytes_are_found_and_thrown_away(hub, tmp_path):
    wrong = b"x" + BIG[1:]
    path = f"/cdn/{hashlib.sha256(BIG).hexdigest()}"

    def hook(handler):
        if handler.path.startswith(path):
            hub.cdn.serve(handler, wrong, Manners())
            return True
        return False

    hub.cdn.hook = hook
    error = failure(hub, tmp_path)
    assert "model.safetensors is not what it should be: sha256" in error.what
    assert "model.safetensors" not in files(tmp_path) and hub.cdn.sent[path] == 2 * len(BIG)
    hub.cdn.hook = None
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES


def test_a_small_file_with_changed_bytes(hub, tmp_path):
    commit = hub.repositories["model", "org/model"].branches["main"]
    listed = dict(hub.repositories["model", "org/model"].commits[commit])

    def lie(handler, repository, revision, path):
        if path == "config.json":
            served = b'{"model_type": "llava_next_VIDEO"}'
            blob = hashlib.sha1(b"blob %d\0" % len(served) + listed[path]).hexdigest()
            hub.answer(handler, 200, served, {"X-Repo-Commit": commit, "ETag": f'"{blob}"'})
        else:
            HubSite._reply_file(hub, handler, repository, revision, path)

    hub._reply_file = lie
    assert "config.json is not what it should be: git blob" in failure(hub, tmp_path).what
    assert "config.json" not in files(tmp_path)


# ------------------------------------------------------------------------------------------------------------- refusals


def test_gated(hub, tmp_path, monkeypatch):
    hub.add("org/gated", FILES, gated=True, token="hf_rightrightright")
    error = failure(hub, tmp_path, "org/gated")
    assert error.what == "org/gated is gated: its owner wants its terms accepted first"
    assert f"accept them at {hub.endpoint}/org/gated" in error.hint and "HF_TOKEN" in error.hint
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    error = failure(hub, tmp_path, "org/gated")
    assert "not of an account that did" in error.hint and "hf_wrong" not in f"{error}{error.hint}{error.__cause__}"
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    fetch(hub, tmp_path, "org/gated")
    assert files(tmp_path) == FILES


def test_private(hub, tmp_path, monkeypatch):
    hub.add("org/private", FILES, token="hf_rightrightright")
    assert "or it is private" in failure(hub, tmp_path, "org/private").what
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    fetch(hub, tmp_path, "org/private")
    assert files(tmp_path) == FILES


def test_a_data_set_that_is_not_there_although_a_token_is(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    assert "has no dataset none/like-it" in failure(hub, tmp_path, "dataset:none/like-it").what


def test_the_token_goes_to_the_hub_and_nowhere_else(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    fetch(hub, tmp_path)
    sent = {headers.get("authorization") for _, headers in hub.headers_seen}
    assert sent == {"Bearer hf_rightrightright"}
    assert hub.cdn.headers_seen and not any("authorization" in headers for _, headers in hub.cdn.headers_seen)
    written = b"".join(path.read_bytes() for path in (tmp_path / ".llavanext").rglob("*") if path.is_file())
    assert b"hf_right" not in written and b"secretsignature" not in written


def test_a_listing_that_points_elsewhere_does_not_get_the_token(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    with FileSite({"/more": b"[]"}) as thief:
        plain = hub.answer_json
        link = f'<{thief.url("/more")}>; rel="next"'
        hub.answer_json = lambda handler, value, status=200, headers=None: plain(
            handler, value, status, {"Link": link} if isinstance(value, list) else headers
        )
        fetch(hub, tmp_path)
        assert thief.headers_seen and "authorization" not in thief.headers_seen[0][1]


def test_no_token_in_the_clear_to_a_public_address(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    assert endpoint_module.hub_token("http://93.184.215.14") is False
    assert (
        endpoint_module.hub_token("https://93.184.215.14")
        == endpoint_module.hub_token("http://10.1.2.3")
        == "hf_rightrightright"
    )


def test_near_names(hub, tmp_path):
    hub.add("org/model-7b-hf", FILES)
    error = failure(hub, tmp_path, "org/model-7b")
    assert "has no model org/model-7b, or it is private" in error.what and "org/model-7b-hf" in error.hint
    assert "dataset:org/model-7b" in error.hint
    error = failure(hub, tmp_path, "llava-hf/LLaVA-NeXT-Video-7B")
    assert error.hint.startswith("Did you mean llava-hf/LLaVA-NeXT-Video-7B-hf")
    error = failure(hub, tmp_path, revision="man")
    assert error.what == "org/model has no revision 'man'" and "main" in error.hint
    assert not files(tmp_path)


@pytest.mark.parametrize(
    ("status", "what"),
    [
        (401, "has no model org/model, or it is private"),
        (403, "forbids access to org/model"),
        (418, "answers HTTP 418 for org/model"),
        (500, r"is in trouble (HTTP 500), 3 times in a row"),
        ((429, {"Retry-After": "9999"}), "asks us to slow down (429), and to come back in 2.8 h"),
    ],
)
def test_statuses_of_the_listing(hub, tmp_path, status, what):
    hub.status = [status] * 20
    assert what in failure(hub, tmp_path).what


def test_a_token_that_is_not_known(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrongwrongwrong")
    hub.status = [401] * 20
    assert failure(hub, tmp_path).what == "127.0.0.1 does not know the token that is set"


def test_busy_for_a_while(hub, tmp_path):
    hub.status = [503, (429, {"Retry-After": "1"})]
    fetch(hub, tmp_path)
    assert files(tmp_path) == FILES


def test_a_login_page_in_place_of_the_hub(tmp_path):
    with FileSite({}) as portal:
        portal.hook = lambda handler: portal.answer(handler, 200, b"<html>log in</html>") or True
        assert "not as a Hub does" in failure(portal, tmp_path).what
        portal.hook = lambda handler: portal.answer_json(handler, {"hello": "world"}) or True
        assert "not as a Hub does" in failure(portal, tmp_path).what
        portal.hook = lambda handler: portal.answer_json(handler, [1, 2]) or True
        assert "not as a Hub does" in failure(portal, tmp_path).what


LISTINGS = [
    {"size": "12"},
    {"size": -1},
    {"size": True},
    {"oid": "xyz"},
    {"oid": None},
    {"path": 7},
    {"path": None},
    {"lfs": {"oid": "short", "size": 3, "pointerSize": 1}},
    {"lfs": {"oid": "0" * 64, "size": None, "pointerSize": 1}},
    {"lfs": []},
]


@pytest.mark.parametrize("change", LISTINGS)
def test_a_listing_that_is_nonsense(hub, tmp_path, change):
    plain = hub.answer_json

    def answer(handler, value, status=200, headers=None):
        if isinstance(value, list):
            value = [{"type": "file", "path": "a", "size": 3, "oid": "0" * 40, **change}]
        plain(handler, value, status)

    hub.answer_json = answer
    assert "not as a Hub does" in failure(hub, tmp_path / "x").what and not (tmp_path / "x").exists()


def test_a_listing_that_is_nested_too_deeply(hub, tmp_path):
    hub.answer_json = lambda handler, *more, **named: hub.answer(handler, 200, b"[" * 200_000)
    assert "not as a Hub does" in failure(hub, tmp_path / "x").what


def test_a_redirect_that_is_no_text(hub, tmp_path):
    plain = hub.answer
    hub.answer = lambda handler, status, body=b"", headers=None: plain(
        handler, status, body, {**headers, "Location": "http://h/\xff\xfe"} if status == 302 else headers
    )
    assert "redirects to an address that is not on the web" in failure(hub, tmp_path).what


@pytest.mark.parametrize("token", ["令牌", "two words", "a;b", 'a"b', "hf_\x01"])
def test_a_token_that_is_none(hub, tmp_path, monkeypatch, token):
    monkeypatch.setenv("HF_TOKEN", token)
    error = failure(hub, tmp_path / "x", kind=ConfigError)
    assert error.what == "the token in HF_TOKEN holds characters that no token has" and hub.log == []


@pytest.mark.parametrize("seconds", [0.0, -1.0, float("nan"), float("inf")])
def test_a_timeout_that_is_none(seconds):
    with pytest.raises(ConfigError, match=r"--timeout is a number of seconds"):
        Limits(stall=seconds)


@pytest.mark.parametrize("path", ["../evil", "/etc/evil", "a/../../evil", ".llavanext/manifest.json", "a\\b", "x\ny"])
def test_a_listing_with_names_that_leave_the_folder(hub, tmp_path, path):
    hub.add("org/evil", {"good": b"1", path: b"evil"})
    assert "offers a file that is not safe to write" in failure(hub, tmp_path / "in", "org/evil", kind=DataError).what
    assert not (tmp_path / "in").exists() and not (tmp_path / "evil").exists()
    fetch(hub, tmp_path / "in", "org/evil", only=["good"])
    assert files(tmp_path / "in") == {"good": b"1"}


def test_a_redirect_to_a_file_is_refused(hub, tmp_path):
    hub.cdn = None
    plain = hub.answer
    hub.answer = lambda handler, status, body=b"", headers=None: plain(
        handler, status, body, {**headers, "Location": "file:///etc/passwd"} if status == 302 else headers
    )
    assert "redirects to an address that is not on the web (file://)" in failure(hub, tmp_path).what


# --------------------------------------------------------------------------------------------------------- no network


def test_without_a_network_a_folder_that_is_whole_is_enough(hub, tmp_path):
    fetch(hub, tmp_path / "a")
    fetch(hub, tmp_path / "b", only=["config.json"])
    hub.server.shutdown()
    hub.server.server_close()
    notes = []
    report = fetch(hub, tmp_path / "a", note=notes.append)
    assert report.ready == 4 and "refuses the connection; going by what is in" in notes[0]
    os.remove(tmp_path / "a" / "e")
    assert "e is not whole, and the network cannot be reached" in failure(hub, tmp_path / "a").what
    assert "refuses the connection" in failure(hub, tmp_path / "new").what and not (tmp_path / "new").exists()
    assert "refuses the connection" in failure(hub, tmp_path / "a", revision="other").what


def test_offline_by_request(hub, tmp_path, monkeypatch):
    from huggingface_hub import constants

    fetch(hub, tmp_path / "a")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.log)
    assert fetch(hub, tmp_path / "a").ready == 4
    assert failure(hub, tmp_path / "b").what == "HF_HUB_OFFLINE is set" and len(hub.log) == asked


def test_a_name_that_does_not_resolve(tmp_path):
    with pytest.raises(FetchError, match=r"no host called nowhere\.invalid \(DNS\)"):
        run_fetch(["org/model"], tmp_path / "x", endpoint="https://nowhere.invalid", limits=LIMITS)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    "endpoint", ["nonsense", "ftp://x", "https://", "https://u:p@host", "https://h:99999999", "https://h?a"]
)
def test_endpoints_that_are_none(tmp_path, endpoint):
    with pytest.raises(ConfigError, match=r"endpoint"):
        run_fetch(["org/model"], tmp_path / "x", endpoint=endpoint)


def test_the_environment_names_the_mirror(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint + "/")
    run_fetch(["org/model"], tmp_path)
    assert files(tmp_path) == FILES


# ----------------------------------------------------------------------------------------------------------- ModelScope


@pytest.fixture
def scope():
    with ModelScopeSite() as site:
        site.add("org/other", {"x": b"1"})
        site.add("org/model", FILES)
        yield site


def test_modelscope_models_and_data_sets(scope, tmp_path):
    many = {f"data/{number:03}.txt": b"%d" % number for number in range(250)}
    scope.add("org/set", many, "dataset")
    report = fetch(scope, tmp_path / "a", source="modelscope")
    assert files(tmp_path / "a") == FILES and report.artifacts[0].revision == "master"
    fetch(scope, tmp_path / "b", "dataset:org/set", source="modelscope")
    assert files(tmp_path / "b") == many
    before = scope.sent.total()
    assert fetch(scope, tmp_path / "a", source="modelscope").ready == 4 and scope.sent.total() == before


@pytest.mark.parametrize(
    ("source", "variable", "server"),
    [("hf", "HF_ENDPOINT", HubSite), ("modelscope", "MODELSCOPE_DOMAIN", ModelScopeSite)],
)
@pytest.mark.parametrize("option", ["hf", "modelscope"])
def test_a_check_repairs_from_the_mirror_that_the_environment_names(
    tmp_path, monkeypatch, source, variable, server, option
):
    with server() as first, server() as mirror:
        first.add("org/model", FILES)
        mirror.add("org/model", FILES)
        fetch(first, tmp_path, source=source)
        (tmp_path / "sub/notes.txt").unlink()
        asked = len(first.log)
        monkeypatch.setenv(variable, mirror.endpoint)
        check_folder(tmp_path, source=option, limits=LIMITS)
        assert files(tmp_path) == FILES
        assert mirror.log and len(first.log) == asked


def test_modelscope_without_digests(scope, tmp_path):
    scope.digests = False
    fetch(scope, tmp_path, source="modelscope")
    assert files(tmp_path) == FILES and fetch(scope, tmp_path, source="modelscope").ready == 4


def test_modelscope_files_are_fetched_in_parts(scope, tmp_path):
    scope.manners = {"model.safetensors": Manners(cut_every=100_000)}
    fetch(scope, tmp_path, source="modelscope")
    assert files(tmp_path) == FILES


def test_modelscope_token(scope, tmp_path, monkeypatch):
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-secretsecret")
    with FileSite({"/elsewhere": BIG}) as cdn:
        scope.manners = {"model.safetensors": Manners(redirect=cdn.url("/elsewhere"))}
        fetch(scope, tmp_path, source="modelscope")
        assert {headers.get("cookie") for _, headers in scope.headers_seen} == {"m_session_id=ms-secretsecret"}
        assert cdn.headers_seen and not any("cookie" in headers for _, headers in cdn.headers_seen)
    written = b"".join(path.read_bytes() for path in (tmp_path / ".llavanext").rglob("*") if path.is_file())
    assert files(tmp_path) == FILES and b"ms-secret" not in written


@pytest.mark.parametrize(
    ("answer", "what"),
    [
        ((404, b'{"Code": 10010205001}'), "has no model org/model at revision 'master'"),
        ((200, b"<html>"), "not as ModelScope does"),
        ((200, b'{"Code": 200, "Data": {"Files": [1]}}'), "not as ModelScope does"),
        ((200, b'{"Code": 200, "Data": {"Files": {}}}'), "not as ModelScope does"),
        ((200, b'{"Code": 10, "Message": "closed\\ntoday"}'), "refuses org/model (code 10): closed today"),
        ((403, b"{}"), "does not give out org/model (HTTP 403)"),
        ((418, b"{}"), "answers HTTP 418"),
        ((502, b"{}"), "is in trouble (HTTP 502)"),
    ],
)
def test_modelscope_refusals(scope, tmp_path, answer, what):
    scope.override = lambda handler: scope.answer(handler, *answer) or True
    assert what in failure(scope, tmp_path / "x", source="modelscope").what
    assert not (tmp_path / "x").exists()


def test_modelscope_has_not_everything(tmp_path, monkeypatch):
    from llavanext_cli.fetching.registry import ARTIFACTS, Artifact, Place

    artifact = Artifact("only-hub", "", "", hub=Place("a/b"))
    with pytest.raises(ConfigError, match=r"only-hub is not at modelscope") as caught:
        run_fetch([], tmp_path / "x", artifacts=[artifact], source="modelscope")
    assert "video-7b" in caught.value.hint and all(a.modelscope for a in ARTIFACTS.values())
