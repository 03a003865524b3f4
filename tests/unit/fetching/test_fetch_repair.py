"""What a check finds and mends, and what a dry run foresees."""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile

import pytest

from llavanext_cli.errors import ConfigError, DataError, FetchError
from llavanext_cli.fetching.check import check_folder
from llavanext_cli.fetching.net import Net
from llavanext_cli.fetching.registry import Artifact, Place, Unpacking, WebFile
from llavanext_cli.fetching.run import run_fetch
from llavanext_cli.fetching.transfer import download_url
from tests.unit.fetching.folders import CLIPS, COCO, LIMITS, fetch, files
from tests.unit.fetching.loopback import FileSite, HubSite, ModelScopeSite, content

BIG = content(300_000)


def flip(path) -> None:
    """Change a byte, and neither the size nor the time."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# ------------------------------------------------------------------------------------------------------------ the check


@pytest.mark.parametrize("change", ["short", "no digest", "brackets"])
def test_a_list_of_members_that_is_damaged_is_not_believed(clips, tmp_path, change):
    fetch(clips, tmp_path)
    path = next((tmp_path / ".llavanext/unpacked").glob("x_videos_1*"))
    lines = path.read_text().splitlines(keepends=True)
    if change == "short":
        (tmp_path / json.loads(lines.pop())["path"]).unlink()
    elif change == "brackets":
        lines[0] = "[" * 100_000 + "\n"
    else:
        lines[0] = json.dumps(json.loads(lines[0]) | {"sha256": ""}) + "\n"
    path.write_text("".join(lines))
    with pytest.raises(DataError) as caught:
        check_folder(tmp_path, repair=False, limits=LIMITS)
    assert caught.value.details == ("x_videos_1.tar.gz: the list of its files is lost",)
    check_folder(tmp_path, limits=LIMITS)
    assert CLIPS[0].items() <= files(tmp_path).items()
    assert check_folder(tmp_path, limits=LIMITS).broken == ()


def test_a_kept_tar_repairs_without_a_network(clips, tmp_path):
    fetch(clips, tmp_path, keep_archives=True)
    lost = tmp_path / next(iter(CLIPS[0]))
    lost.unlink()
    next((tmp_path / ".llavanext/unpacked").glob("x_videos_2*")).unlink()
    before = clips.content_sent()
    report = check_folder(tmp_path, limits=LIMITS)
    assert len(report.broken) == 2 and clips.content_sent() == before
    assert lost.read_bytes() == CLIPS[0][next(iter(CLIPS[0]))] and check_folder(tmp_path, limits=LIMITS).broken == ()
    assert (tmp_path / "x_videos_1.tar.gz").exists() and (tmp_path / "x_videos_2.tar.gz").exists()


@pytest.mark.parametrize("members", ["whole", "broken", "list lost"])
def test_a_kept_archive_that_is_broken_comes_again(clips, tmp_path, members):
    fetch(clips, tmp_path, keep_archives=True)
    whole = files(tmp_path)
    flip(tmp_path / "x_videos_1.tar.gz")
    if members == "broken":
        flip(tmp_path / next(iter(CLIPS[0])))
    elif members == "list lost":
        next((tmp_path / ".llavanext/unpacked").glob("x_videos_1*")).unlink()
    before = clips.content_sent()
    check_folder(tmp_path, limits=LIMITS)
    assert clips.content_sent() - before == len(whole["x_videos_1.tar.gz"])
    assert files(tmp_path) == whole and check_folder(tmp_path, limits=LIMITS).broken == ()


def test_links_are_recorded_checked_and_repaired(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in (("academic_source/a.mp4", b"film"), ("academic_source/b.mp4", None)):
            entry = tarfile.TarInfo(name)
            if data is None:
                entry.type, entry.linkname = tarfile.SYMTYPE, "a.mp4"
            entry.size = len(data or b"")
            tar.addfile(entry, io.BytesIO(data or b""))
    with FileSite({"/x.tar.gz": packed.getvalue()}) as site:
        digest = hashlib.sha256(packed.getvalue()).hexdigest()
        web = WebFile(site.url("/x.tar.gz"), len(packed.getvalue()), digest)
        site.artifact = Artifact("x", "", "", web=web, unpacking=Unpacking("*.tar.gz", "", ("academic_source",)))
        fetch(site, tmp_path)
        link = tmp_path / "academic_source/b.mp4"
        assert check_folder(tmp_path, limits=LIMITS).broken == () and os.readlink(link) == "a.mp4"
        link.unlink()
        link.write_bytes(b"film")  # the same bytes, and not a link
        report = check_folder(tmp_path, limits=LIMITS)
        assert report.broken == ("academic_source/b.mp4: it is no link to a.mp4",)
        assert os.readlink(link) == "a.mp4" and check_folder(tmp_path, limits=LIMITS).broken == ()


@pytest.mark.parametrize(
    "change",
    [
        {"size": float("inf")},
        {"size": 10**400},
        {"size": -1},
        {"mtime_ns": float("inf")},
        {"sha256": ""},
        {"origin": {"source": "url", "url": "http://[::1"}},
        {"origin": {"source": "url", "url": "file:///etc/passwd"}},
        {"origin": {"source": "hf", "repo": "../..", "kind": "model", "endpoint": "http://127.0.0.1:1", "path": "x"}},
        {"origin": {"source": "hf", "repo": "a/b", "kind": "model", "endpoint": "", "path": "x"}},
    ],
    ids=str,
)
def test_a_record_that_nobody_wrote(clips, tmp_path, change):
    fetch(clips, tmp_path)
    path = tmp_path / ".llavanext/manifest.json"
    manifest = json.loads(path.read_text())
    next(iter(manifest["files"].values())).update(change)
    path.write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"manifest\.json cannot be used"):
        check_folder(tmp_path, limits=LIMITS)


def test_a_manifest_that_is_a_pipe(clips, tmp_path):
    (tmp_path / ".llavanext").mkdir()
    os.mkfifo(tmp_path / ".llavanext/manifest.json")
    with pytest.raises(DataError, match=r"manifest\.json cannot be used"):
        fetch(clips, tmp_path)


# ---------------------------------------------------------------------------------------------------------- the dry run


@pytest.fixture
def site():
    with FileSite({"/a.bin": BIG, "/clip[1].mp4": b"film", "/org/model": b"<html>", "/page.html": b"<html>"}) as plain:
        yield plain


def run(to, *names, **options):
    return run_fetch(names, to, limits=LIMITS, **options)


def test_a_dry_run_asks_an_address_for_its_size(site, tmp_path):
    report = run(tmp_path, site.url("/a.bin"), dry_run=True)
    assert (report.transferred, report.needed, report.unverified) == (len(BIG), len(BIG), 1)
    assert site.sent.total() <= 1 and not any(tmp_path.iterdir())
    with pytest.raises(FetchError, match=r"has no /nothing\.bin"):
        run(tmp_path, site.url("/nothing.bin"), dry_run=True)


def test_a_dry_run_counts_what_is_on_its_way_and_nothing_else(clips, tmp_path):
    stages = tmp_path / ".llavanext/partial/another/one"
    stages.mkdir(parents=True)
    (stages / "part").write_bytes(bytes(10_000_000))
    report = fetch(clips, tmp_path, dry_run=True)
    archives = sum(len(data) for path, data in clips.repositories["dataset", "org/clips"].commits.popitem()[1].items())
    assert 0.9 * archives < report.transferred <= archives


def test_a_dry_run_sees_files_that_are_in_the_way(tmp_path):
    with HubSite() as hub:
        hub.add("org/model", {"a.bin": BIG})
        (tmp_path / "a.bin").write_bytes(bytes(len(BIG)))
        for dry_run in (True, False):
            with pytest.raises(DataError, match=r"holds 1 file already, other than would be fetched") as caught:
                run(tmp_path, "org/model", endpoint=hub.endpoint, dry_run=dry_run)
            assert caught.value.details == ("a.bin",)


# ------------------------------------------------------------------------------------------------- names and addresses


def test_a_name_with_brackets(site, tmp_path):
    run(tmp_path, site.url("/clip%5B1%5D.mp4"))
    assert files(tmp_path) == {"clip[1].mp4": b"film"}
    run(tmp_path, site.url("/clip%5B1%5D.mp4"), only=["clip[1].mp4"])


def test_a_page_is_no_file(site, tmp_path):
    plain = site.serve
    site.serve = lambda *args: plain(*args[:3], {"Content-Type": "text/html; charset=utf-8"})
    with pytest.raises(FetchError, match=r"answers with a web page in place of a file: model") as caught:
        run(tmp_path, site.url("/org/model"))
    assert "ORG/REPO" in caught.value.hint
    run(tmp_path, site.url("/page.html"), f"{site.url('/a.bin')}#sha256={hashlib.sha256(BIG).hexdigest()}")
    assert download_url(Net(LIMITS), site.url("/org/model"), tmp_path / "known", size=6) == 6


def test_the_pinned_digest_holds_for_modelscope_too(tmp_path):
    with ModelScopeSite() as scope:
        scope.add("org/coco", {"x.zip": b"not the pictures"}, "dataset")
        web = WebFile("http://127.0.0.1:1/x.zip", 16, hashlib.sha256(b"of the same size").hexdigest())
        scope.artifact = Artifact("x", "", "", web=web, modelscope=Place("org/coco", "dataset"), include=("x.zip",))
        with pytest.raises(FetchError, match=r"x\.zip at .* has another size or digest than the one at"):
            fetch(scope, tmp_path, source="modelscope")
        scope.digests = False
        with pytest.raises(FetchError, match=r"x\.zip is not what it should be: sha256"):
            fetch(scope, tmp_path, source="modelscope")
        assert files(tmp_path) == {}


def test_words_that_are_none(clips, tmp_path, monkeypatch):
    for words in ({"revision": "\udcff"}, {"only": ["\udcff"]}):
        with pytest.raises(ConfigError, match=r"'\\udcff' is not valid text"):
            fetch(clips, tmp_path, **words)
    for act in (lambda to: fetch(clips, to), check_folder):
        with pytest.raises(ConfigError, match=r"there is no home folder for ~nobody-here/x"):
            act(type(tmp_path)("~nobody-here/x"))
    with pytest.raises(ConfigError, match=r"clips has no shard 3, 4, 5, 6, 7, …$"):
        fetch(clips, tmp_path, shards="1-999999")


def test_what_could_not_be_verified_is_counted(site, pictures, tmp_path):
    assert run(tmp_path / "a", site.url("/a.bin")).unverified == 1
    assert fetch(pictures, tmp_path / "b").unverified == 0 and COCO.items() <= files(tmp_path / "b").items()
