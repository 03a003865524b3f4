"""What happens in the user's folder: placing, unpacking, checking, repairing, locking."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from llavanext_cli.errors import ConfigError, DataError, FetchError, LlavaNextError
from llavanext_cli.fetching.check import check_folder
from llavanext_cli.fetching.folder import locked_folder
from llavanext_cli.fetching.registry import Artifact, Unpacking, WebFile
from llavanext_cli.fetching.run import run_fetch
from tests.unit.fetching.folders import ANSWERS, CLIPS, COCO, LIMITS, fetch, files
from tests.unit.fetching.loopback import FileSite, HubSite, Manners, content
from tests.unit.fetching.test_fetch_unpack import make_zip


def test_pictures_lie_where_mix_looks_for_them(pictures, tmp_path):
    report = fetch(pictures, tmp_path)
    assert files(tmp_path) == COCO and report.fetched == 1
    before = pictures.sent.total()
    assert fetch(pictures, tmp_path).ready == 1 and pictures.sent.total() == before
    manifest = json.loads((tmp_path / ".llavanext/manifest.json").read_text())
    record = manifest["archives"]["coco/train2017.zip"]
    assert record["members"] == 60 and record["sha256"] == pictures.artifact.web.sha256
    assert not (tmp_path / ".llavanext/partial").exists()


def test_an_archive_can_be_kept_and_one_that_is_there_is_used(pictures, tmp_path):
    fetch(pictures, tmp_path / "a", keep_archives=True)
    data = pictures.files["/zips/train2017.zip"]
    assert files(tmp_path / "a") == {**COCO, "coco/train2017.zip": data}
    assert fetch(pictures, tmp_path / "a").ready == 1
    (tmp_path / "b/coco").mkdir(parents=True)
    (tmp_path / "b/coco/train2017.zip").write_bytes(data)
    before = pictures.sent.total()
    fetch(pictures, tmp_path / "b")
    assert pictures.sent.total() == before
    assert files(tmp_path / "b") == {**COCO, "coco/train2017.zip": data}  # it was the user's, so it stays


def test_clips_of_several_archives_share_their_folder(clips, tmp_path):
    fetch(clips, tmp_path, jobs=2)
    expected = {"0_30_s_academic_oe_v0_1_qa_processed.json": ANSWERS, **CLIPS[0], **CLIPS[1]}
    assert files(tmp_path) == expected
    before = clips.content_sent()
    assert fetch(clips, tmp_path).ready == 3 and clips.content_sent() == before


def test_shards_are_chosen_and_added(clips, tmp_path):
    fetch(clips, tmp_path, shards="2")
    assert files(tmp_path) == {"0_30_s_academic_oe_v0_1_qa_processed.json": ANSWERS, **CLIPS[1]}
    with pytest.raises(ConfigError, match=r"clips has no shard 3, 4") as caught:
        fetch(clips, tmp_path, shards="1,3-4")
    assert caught.value.hint == "It has 1 to 2."
    report = fetch(clips, tmp_path, shards="1-2")
    assert (report.ready, report.fetched) == (2, 1) and CLIPS[0].keys() < files(tmp_path).keys()
    for text in ("x", "3-1", "-1", "1-"):
        with pytest.raises(ConfigError, match=r"is no number or range"):
            fetch(clips, tmp_path, shards=text)


def test_shards_of_something_without(pictures, tmp_path):
    with pytest.raises(ConfigError, match=r"pictures has no shards"):
        fetch(pictures, tmp_path, shards="1")


def test_files_of_the_users_own_are_not_written_over(pictures, tmp_path):
    name = next(iter(COCO))
    same, other = tmp_path / "same", tmp_path / "other"
    for folder, data in ((same, COCO[name]), (other, b"my own")):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_bytes(data)
    fetch(pictures, same)
    assert files(same) == COCO
    with pytest.raises(DataError, match=r"would replace 1 file of yours, such as coco/train2017/"):
        fetch(pictures, other)
    assert files(other) == {name: b"my own"}
    before = pictures.sent.total()
    fetch(pictures, other, force=True)
    assert files(other) == COCO and pictures.sent.total() == before  # the archive had been kept


def test_a_hostile_archive_leaves_nothing(tmp_path):
    data = make_zip(tmp_path / "x", {"train2017/a": b"1", "../../evil": b"evil"}).read_bytes()
    with FileSite({"/x.zip": data}) as site:
        rule = Unpacking("x.zip", "", ("train2017",))
        site.artifact = Artifact("evil", "", "", web=WebFile(site.url("/x.zip")), include=("x.zip",), unpacking=rule)
        with pytest.raises(DataError, match=r"x\.zip is not safe to unpack: .*climbs out"):
            fetch(site, tmp_path / "in")
    assert files(tmp_path / "in") == {} and not list(tmp_path.rglob("evil"))
    assert not (tmp_path / "in/.llavanext/partial").exists()


# ------------------------------------------------------------------------------------------------- checking, repairing


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    path.write_bytes(data)
    os.utime(path, ns=times)  # a disk that rots does not tell


def test_one_flipped_byte_in_a_picture_costs_a_few_bytes(pictures, tmp_path):
    fetch(pictures, tmp_path)
    name = sorted(COCO)[5]
    flip(tmp_path / name)
    before = pictures.sent.total()
    report = check_folder(tmp_path, limits=LIMITS)
    assert [line.partition(":")[0] for line in report.broken] == [name] and report.repaired
    assert files(tmp_path) == COCO
    assert pictures.sent.total() - before < 300_000 < len(pictures.files["/zips/train2017.zip"]) / 3
    asked = len(pictures.log)
    assert check_folder(tmp_path).broken == () and len(pictures.log) == asked  # nothing broken: no network


def test_a_lost_picture_is_noticed_without_reading(pictures, tmp_path):
    fetch(pictures, tmp_path)
    (tmp_path / sorted(COCO)[3]).unlink()
    report = fetch(pictures, tmp_path)
    assert files(tmp_path) == COCO and report.transferred < 300_000


def test_a_server_without_ranges_gives_the_whole_archive_again(pictures, tmp_path):
    fetch(pictures, tmp_path)
    flip(tmp_path / sorted(COCO)[5])
    pictures.manners["/zips/train2017.zip"] = Manners(ranges=False)
    notes = []
    check_folder(tmp_path, limits=LIMITS, note=notes.append)
    assert files(tmp_path) == COCO and any("cannot be read in parts" in note for note in notes)


def test_a_kept_archive_repairs_without_a_network(pictures, tmp_path):
    fetch(pictures, tmp_path, keep_archives=True)
    flip(tmp_path / sorted(COCO)[5])
    asked = len(pictures.log)
    check_folder(tmp_path)
    assert len(pictures.log) == asked and COCO.items() < files(tmp_path).items()


def test_a_broken_clip_costs_its_archive_only(clips, tmp_path):
    fetch(clips, tmp_path)
    whole = files(tmp_path)
    name = next(iter(CLIPS[1]))
    flip(tmp_path / name)
    before = clips.content_sent()
    report = check_folder(tmp_path, endpoint=clips.endpoint, limits=LIMITS)
    assert files(tmp_path) == whole and len(report.broken) == 1
    sizes = {path: len(data) for path, data in next(iter(clips.repositories.values())).commits.popitem()[1].items()}
    assert clips.content_sent() - before == sizes["set/x_videos_2.tar.gz"]


def test_check_only_reports(clips, tmp_path):
    fetch(clips, tmp_path)
    whole = files(tmp_path)
    assert check_folder(tmp_path, repair=False).files == 7
    name = "0_30_s_academic_oe_v0_1_qa_processed.json"
    flip(tmp_path / name)
    (tmp_path / next(iter(CLIPS[0]))).unlink()
    asked = len(clips.log)
    with pytest.raises(DataError, match=r"2 of 7 files in .* are broken") as caught:
        check_folder(tmp_path, repair=False)
    assert [line.partition(":")[0] for line in caught.value.details] == [name, next(iter(CLIPS[0]))]
    assert len(clips.log) == asked
    check_folder(tmp_path, endpoint=clips.endpoint, limits=LIMITS)
    assert files(tmp_path) == whole


def test_a_file_that_was_only_touched_is_whole(clips, tmp_path):
    fetch(clips, tmp_path)
    os.utime(tmp_path / "0_30_s_academic_oe_v0_1_qa_processed.json")
    before = clips.content_sent()
    assert check_folder(tmp_path, endpoint=clips.endpoint).broken == ()
    assert fetch(clips, tmp_path).ready == 3 and clips.content_sent() == before


def test_the_list_of_members_is_lost(clips, tmp_path):
    fetch(clips, tmp_path)
    whole = files(tmp_path)
    listing = sorted((tmp_path / ".llavanext/unpacked").iterdir())[0]
    listing.write_text("{}\n")
    report = check_folder(tmp_path, endpoint=clips.endpoint, limits=LIMITS)
    assert report.broken[0].endswith("the list of its files is lost") and files(tmp_path) == whole
    assert check_folder(tmp_path).broken == ()


def test_check_of_a_folder_that_was_never_fetched(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"holds nothing that was fetched"):
            check_folder(folder)
    assert list(tmp_path.iterdir()) == []


MANIFESTS = {
    "no JSON": "{",
    "a list": "[]",
    "deep": "[" * 100_000,
    "another version": '{"llavanext_fetch": 99}',
    "climbing out": '{"llavanext_fetch": 1, "artifacts": {}, "archives": {}, "files": {"../../etc/x": {}}}',
    "a wrong origin": '{"llavanext_fetch": 1, "artifacts": {}, "archives": {}, "files": {"a": {"size": 1, '
    '"sha256": "", "mtime_ns": 0, "origin": {"source": "file", "url": "/etc/passwd"}}}}',
    "a listing elsewhere": '{"llavanext_fetch": 1, "artifacts": {}, "files": {}, "archives": {"a": {"size": 1, '
    '"sha256": "", "origin": {"source": "url", "url": "http://x/y"}, "into": "", "tops": [], '
    '"listing": "../../x", "members": 1, "bytes": 1}}}',
}


@pytest.mark.parametrize("text", MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_broken_or_hostile(clips, tmp_path, text):
    fetch(clips, tmp_path)
    whole = files(tmp_path)
    (tmp_path / ".llavanext/manifest.json").write_text(text)
    for action in (lambda: check_folder(tmp_path), lambda: fetch(clips, tmp_path)):
        with pytest.raises(DataError, match=r"manifest\.json (cannot be used|was written by another)") as caught:
            action()
        assert caught.value.hint
    (tmp_path / ".llavanext/manifest.json").unlink()
    before = clips.content_sent()
    fetch(clips, tmp_path)
    assert files(tmp_path) == whole
    assert clips.content_sent() > before  # the archives are gone, so their members can only be compared with new ones


def test_a_manifest_from_somebody_else_does_not_get_the_token(clips, tmp_path, monkeypatch):
    fetch(clips, tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_rightrightright")
    flip(tmp_path / "0_30_s_academic_oe_v0_1_qa_processed.json")
    before = len(clips.headers_seen)
    check_folder(tmp_path, limits=LIMITS)  # the manifest names clips.endpoint; the user did not
    asked = clips.headers_seen[before:]
    assert asked and not any("authorization" in headers for _, headers in asked)


# ---------------------------------------------------------------------------------------------------------- the disk


def test_a_disk_that_is_too_small_is_noticed_before(pictures, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(FetchError, match=r"3\.6\d MB are needed in .*, and 5 kB are free"):
        fetch(pictures, tmp_path / "new")
    assert pictures.sent.total() == 0 and fetch(pictures, tmp_path / "new", dry_run=True).free == 5000


SMALL_DISK = """
import sys
from pathlib import Path
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.fetching.net import Limits
from llavanext_cli.fetching.run import run_fetch
import shutil
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**12, 0, 10**12)  # what df says may be out of date
try:
    run_fetch(sys.argv[2:], Path(sys.argv[1]), limits=Limits(retries=1, pause=0.05))
except LlavaNextError as fault:
    print(fault.what, "|", fault.hint)
    raise SystemExit(fault.exit_code)
"""


def on_small_disk(
    tmp_path, script: str, *arguments: str, size: str = "2m", options: str = ""
) -> subprocess.CompletedProcess:
    """Run Python in a namespace of its own, where tmp_path/disk is a small file system."""
    disk = tmp_path / "disk"
    disk.mkdir(exist_ok=True)
    mount = f'mount -t tmpfs -o size={size} none {disk} && {options} exec {sys.executable} -c "$0" {disk}/in "$@"'
    return subprocess.run(
        ["unshare", "-rm", "sh", "-c", mount, script, *arguments], capture_output=True, text=True, timeout=60
    )


def can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="this machine does not let its user mount")
@pytest.mark.parametrize("kind", ["web", "hub"])
def test_a_full_disk(tmp_path, kind):
    data = content(5_000_000)
    with FileSite({"/a.bin": data}) as site, HubSite() as hub:
        hub.add("org/big", {"a.bin": data})
        name = site.url("/a.bin") if kind == "web" else "org/big"
        os.environ["HF_ENDPOINT"] = hub.endpoint
        try:
            done = on_small_disk(tmp_path, SMALL_DISK, name)
        finally:
            del os.environ["HF_ENDPOINT"]
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("the disk is full: ") and "what has arrived is kept" in done.stdout
    assert done.stderr == ""


@pytest.mark.skipif(not can_mount(), reason="this machine does not let its user mount")
def test_a_read_only_folder(tmp_path):
    with FileSite({"/a.bin": b"1"}) as site:
        done = on_small_disk(
            tmp_path, SMALL_DISK, site.url("/a.bin"), options=f"mount -o remount,ro {tmp_path}/disk &&"
        )
    assert done.returncode == 1, done.stderr
    assert "cannot write to" in done.stdout and "Read-only file system" in done.stdout and done.stderr == ""


WARM_AND_READ_ONLY = (
    SMALL_DISK
    + """
print("whole")
from llavanext_cli.fetching.check import check_folder
import os
os.system(f"mount -o remount,ro {Path(sys.argv[1]).parent}")
print(run_fetch(sys.argv[2:], Path(sys.argv[1])).ready, len(check_folder(Path(sys.argv[1])).broken))
"""
)


@pytest.mark.skipif(not can_mount(), reason="this machine does not let its user mount")
def test_what_is_whole_may_be_read_only(tmp_path):
    with FileSite({"/a.bin": b"1"}) as site:
        done = on_small_disk(tmp_path, WARM_AND_READ_ONLY, site.url("/a.bin"))
    assert done.stdout == "whole\n1 0\n", done


def test_an_incomplete_fetch_is_told_by_check(clips, tmp_path):
    clips.status = []
    clips.manners = {"set/x_videos_2.tar.gz": Manners(statuses=[404] * 9)}
    with pytest.raises(FetchError):
        fetch(clips, tmp_path, jobs=1)
    assert check_folder(tmp_path).incomplete == ("clips",)
    clips.manners.clear()
    fetch(clips, tmp_path)
    assert check_folder(tmp_path).incomplete == ()


def test_partial_files_of_another_version_go_when_the_file_is_there(tmp_path):
    first, second = content(3_000_000, 1), content(2_000_000, 2)
    with FileSite({"/a.bin": first}, {"/a.bin": Manners(ranges=False, cut_every=100_000)}) as site:
        for data in (first, second):
            site.files["/a.bin"] = data
            import hashlib

            web = WebFile(site.url("/a.bin"), len(data), hashlib.sha256(data).hexdigest())
            site.artifact = Artifact("a", "", "", web=web, include=("a.bin",))
            if data is first:
                with pytest.raises(FetchError):
                    fetch(site, tmp_path)
                assert list((tmp_path / ".llavanext/partial").rglob("whole"))
                site.manners.clear()
        fetch(site, tmp_path)
    assert files(tmp_path) == {"a.bin": second} and not (tmp_path / ".llavanext/partial").exists()


def test_a_folder_that_is_a_file(pictures, tmp_path):
    (tmp_path / "file").write_text("")
    for to in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(LlavaNextError):
            fetch(pictures, to)
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("port", ["", ":1"], ids=["404", "refused"])
def test_a_folder_in_which_nothing_arrived_goes_again(tmp_path, port):
    with FileSite({}) as site:
        address = site.url("/nope.zip") if not port else f"http://127.0.0.1{port}/nope.zip"
        for to in (tmp_path / "a" / "b", tmp_path):
            with pytest.raises(FetchError) as error:
                run_fetch([address], to, limits=LIMITS)
            assert list(tmp_path.iterdir()) == []
            assert error.value.hint.startswith(("Is the address right?", "Check the address and the network. A repos"))
        (tmp_path / "a").mkdir()
        (tmp_path / "a" / "mine").write_text("mine")
        with pytest.raises(FetchError):
            run_fetch([address], tmp_path / "a", limits=LIMITS)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["mine"]


def test_a_folder_in_which_something_arrived_stays(tmp_path):
    manners = Manners(ranges=False, cut_every=100_000)
    with FileSite({"/a.bin": content(3_000_000, 1)}, {"/a.bin": manners}) as site, pytest.raises(FetchError):
        run_fetch([site.url("/a.bin")], tmp_path / "a", limits=LIMITS)
    assert {path.name for path in (tmp_path / "a/.llavanext").iterdir()} == {"lock", "manifest.json", "partial"}


def test_one_that_waits_survives_that_the_folder_goes(tmp_path):
    told = threading.Event()

    def wait() -> None:
        with locked_folder(tmp_path / "a", lambda line: told.set()) as folder:
            assert folder.state.is_dir()
            (folder.root / "b").write_text("")

    with locked_folder(tmp_path / "a"):
        second = threading.Thread(target=wait)
        second.start()
        assert told.wait(10)
    second.join(10)
    assert (tmp_path / "a" / "b").exists()


def test_a_folder_where_a_file_is_to_go(clips, tmp_path):
    (tmp_path / "0_30_s_academic_oe_v0_1_qa_processed.json").mkdir()
    with pytest.raises(DataError, match=r"holds 1 file already"):
        fetch(clips, tmp_path)
    with pytest.raises(DataError, match=r"is a folder, and a file is to go there"):
        fetch(clips, tmp_path, force=True)


# ------------------------------------------------------------------------------------------------------------- the lock


def test_the_second_waits_for_the_first_and_finds_everything_done(clips, tmp_path):
    clips.manners = {"set/x_videos_1.tar.gz": Manners(rate=40_000)}
    reports, faults = [], []

    def run(note):
        try:
            reports.append(fetch(clips, tmp_path, note=note))
        except BaseException as fault:
            faults.append(fault)

    first = threading.Thread(target=run, args=(lambda line: None,))
    first.start()
    time.sleep(0.3)
    code = (
        "import sys; from pathlib import Path; from llavanext_cli.fetching.folder import locked_folder\n"
        "with locked_folder(Path(sys.argv[1]), print) as folder: print(len(folder.manifest.archives))"
    )
    other = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=60)
    first.join()
    assert not faults and other.stdout.splitlines() == [
        f"another fetch is working in {tmp_path}; waiting for it",
        "2",
    ]


def test_a_lock_that_a_killed_process_left_does_not_matter(tmp_path):
    code = (
        "import os, sys, signal; from pathlib import Path; from llavanext_cli.fetching.folder import locked_folder\n"
        "with locked_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], timeout=60).returncode == -9
    with locked_folder(tmp_path, note=pytest.fail):
        pass


def test_the_size_of_a_plain_address_is_known_in_the_end(tmp_path):
    with FileSite({"/a.bin": b"12345"}) as site:
        for _ in range(2):
            assert run_fetch([site.url("/a.bin")], tmp_path, limits=LIMITS).artifacts[0].bytes == 5


def test_a_name_that_the_locale_cannot_write(tmp_path):
    with HubSite() as hub:
        hub.add("org/model", {"\u4e2d/a.bin": b"1"})
        environment = os.environ | {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
        words = [sys.executable, "-m", "llavanext_cli", "fetch", "org/model", "--to", tmp_path / "to"]
        done = subprocess.run([*words, "--endpoint", hub.endpoint], env=environment, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "cannot be the name of a file in this locale" in done.stderr and "Hint: Run the command with" in done.stderr
