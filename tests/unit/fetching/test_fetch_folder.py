"""What happens in the user's folder: placing, unpacking, checking, repairing, a full disk, two commands."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest

from llavanext_cli.errors import ConfigError, DataError, FetchError, LlavaNextError
from llavanext_cli.fetching.next_steps import next_commands
from llavanext_cli.fetching.registry import ARTIFACTS, MODEL
from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.run import run_check, run_fetch
from llavanext_cli.files import claim
from tests.unit.fetching.folders import ANSWERS, FETCHED_IMAGES, FETCHED_VIDEOS, VIDEOS, check, fetch, make_zip
from tests.unit.fetching.loopback import FileSite, HubSite, Manners, content, files, flip

ZIP = "/zips/train2017.zip"
ANSWER_FILE = "0_30_s_academic_oe_v0_1_qa_processed.json"


# ------------------------------------------------------------------------------------------------------------- archives


def test_images_arrive_where_mix_looks_for_them(images, tmp_path):
    report = fetch(images, tmp_path)
    assert files(tmp_path) == FETCHED_IMAGES and report.fetched == 1
    sent = images.sent.total()
    assert fetch(images, tmp_path).ready == 1 and images.sent.total() == sent
    assert sorted(path.name for path in (tmp_path / ".llavanext").iterdir()) == ["manifest.json"]


def test_an_archive_can_be_kept_and_one_that_is_there_is_used(images, tmp_path):
    data = images.files[ZIP]
    fetch(images, tmp_path / "a", keep_archives=True)
    assert files(tmp_path / "a") == {**FETCHED_IMAGES, "coco/train2017.zip": data}
    sent = images.sent.total()
    (tmp_path / "b/coco").mkdir(parents=True)
    (tmp_path / "b/coco/train2017.zip").write_bytes(data)
    assert fetch(images, tmp_path / "b").adopted == 1 and images.sent.total() == sent
    assert files(tmp_path / "b") == {**FETCHED_IMAGES, "coco/train2017.zip": data}


def test_videos_of_several_archives_share_their_folder(videos, tmp_path):
    fetch(videos, tmp_path, jobs=2)
    assert files(tmp_path) == FETCHED_VIDEOS


def test_shards_are_chosen_and_added(videos, images, tmp_path):
    fetch(videos, tmp_path, shards="2")
    assert files(tmp_path) == {ANSWER_FILE: ANSWERS, **VIDEOS[1]}
    with pytest.raises(ConfigError, match=r"videos has no shard 3, 4") as caught:
        fetch(videos, tmp_path, shards="1,3-4")
    assert caught.value.hint == "choose from 1 to 2"
    with pytest.raises(ConfigError, match=r"--shards 2-1: '2-1' is not a number or a range"):
        fetch(videos, tmp_path, shards="2-1")
    with pytest.raises(ConfigError, match=r"images has no shards"):
        fetch(images, tmp_path, shards="1")
    fetch(videos, tmp_path, shards="1")
    assert files(tmp_path) == FETCHED_VIDEOS and check(videos, tmp_path).incomplete == ()


def test_files_of_the_user_s_own_are_not_replaced(images, tmp_path):
    name, data = next(iter(FETCHED_IMAGES.items()))
    for folder, own in (("same", data), ("other", b"my own")):
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(own)
    fetch(images, tmp_path / "same")
    with pytest.raises(DataError, match=r"train2017.zip would replace 1 of your files, such as coco/train2017/0000"):
        fetch(images, tmp_path / "other")
    assert files(tmp_path / "other") == {name: b"my own"}
    sent = images.sent.total()
    fetch(images, tmp_path / "other", force=True)
    assert images.sent.total() == sent  # the archive was kept
    assert files(tmp_path / "same") == files(tmp_path / "other") == FETCHED_IMAGES


def test_a_hostile_archive_leaves_nothing(images, tmp_path, monkeypatch):
    images.files[ZIP] = make_zip({"train2017/a": b"1", "../../evil": b"evil"})
    web = replace(ARTIFACTS["images"].web, size=0, sha256="")
    monkeypatch.setitem(ARTIFACTS, "images", replace(ARTIFACTS["images"], web=web))
    with pytest.raises(DataError, match=r"train2017.zip: the file name '../../evil' is not safe: it leaves the folder"):
        fetch(images, tmp_path / "in")
    assert files(tmp_path) == {} and not list(tmp_path.rglob("*evil*"))


# ---------------------------------------------------------------------------------------------------------------- check


def test_a_flipped_byte_in_an_image_is_found_and_repaired(images, tmp_path):
    fetch(images, tmp_path)
    name = sorted(FETCHED_IMAGES)[5]
    assert check(images, tmp_path).broken == ()
    flip(tmp_path / name)
    with pytest.raises(DataError, match=r": broken or missing files: 1") as caught:
        check(images, tmp_path, dry_run=True)
    assert caught.value.details[0].startswith(f"{name}: sha256")
    report = check(images, tmp_path)
    assert report.repaired and files(tmp_path) == FETCHED_IMAGES and check(images, tmp_path).broken == ()


def test_a_missing_image_is_noticed_without_reading(images, tmp_path):
    fetch(images, tmp_path)
    (tmp_path / sorted(FETCHED_IMAGES)[3]).unlink()
    assert fetch(images, tmp_path).fetched == 1 and files(tmp_path) == FETCHED_IMAGES


def test_a_kept_archive_repairs_without_a_network(images, tmp_path):
    fetch(images, tmp_path, keep_archives=True)
    flip(tmp_path / sorted(FETCHED_IMAGES)[5])
    asked = len(images.log)
    assert len(check(images, tmp_path).broken) == 1 and len(images.log) == asked
    flip(tmp_path / "coco/train2017.zip")
    assert check(images, tmp_path).broken[0].startswith("coco/train2017.zip: sha256")
    assert files(tmp_path) == {**FETCHED_IMAGES, "coco/train2017.zip": images.files[ZIP]}
    (tmp_path / "coco/train2017.zip").unlink()  # to make room: its images are whole
    assert check(images, tmp_path).broken == ()


def test_a_broken_video_costs_its_archive_only(videos, tmp_path):
    fetch(videos, tmp_path)
    flip(tmp_path / next(iter(VIDEOS[1])))
    (tmp_path / ANSWER_FILE).write_bytes(b"short")
    sent = videos.content_sent()
    assert len(check(videos, tmp_path).broken) == 2
    assert files(tmp_path) == FETCHED_VIDEOS and videos.content_sent() - sent < 150_000


def test_a_file_that_was_only_touched_is_whole(videos, tmp_path):
    fetch(videos, tmp_path)
    os.utime(tmp_path / ANSWER_FILE, (1, 1))
    sent = videos.content_sent()
    assert check(videos, tmp_path).broken == () and fetch(videos, tmp_path).ready == 3
    assert videos.content_sent() == sent


def test_check_of_a_folder_that_was_never_fetched(tmp_path):
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(DataError, match=r"has no files that llavanext fetch downloaded"):
            run_check(FetchRequest(to=folder))
    assert list(tmp_path.iterdir()) == []


def test_an_incomplete_fetch_is_reported_by_check(videos, tmp_path):
    videos.manners["set/x_videos_2.tar.gz"] = Manners(statuses=[404] * 9)
    with pytest.raises(FetchError, match="org/videos"):
        fetch(videos, tmp_path, jobs=1)
    assert check(videos, tmp_path).incomplete == ("videos",)
    videos.manners.clear()
    fetch(videos, tmp_path)
    assert files(tmp_path) == FETCHED_VIDEOS and check(videos, tmp_path).incomplete == ()


RECORD = {"origin": {"source": "hf"}, "size": 1, "sha256": "0"}


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "was not written by this version of fetch"),
        ("[]", "was not written by this version of fetch"),
        ('{"llavanext_fetch": 1}', "was not written by this version of fetch"),
        (json.dumps({"llavanext_fetch": 2, "files": {"a": 1}}), "was not written by this version of fetch"),
        (json.dumps({"llavanext_fetch": 2, "files": {"../../a": RECORD}}), "it leaves the folder"),
        (
            json.dumps({"llavanext_fetch": 2, "files": {"a": RECORD | {"members": [["/etc/x", 1, "0"]]}}}),
            "it is absolute",
        ),
    ],
)
def test_a_manifest_that_is_broken_or_hostile(videos, tmp_path, text, what):
    fetch(videos, tmp_path)
    (tmp_path / ".llavanext/manifest.json").write_text(text)
    for run in (fetch, check):
        with pytest.raises(DataError, match=what) as caught:
            run(videos, tmp_path)
        assert "manifest.json" in caught.value.what
    (tmp_path / ".llavanext/manifest.json").unlink()
    sent = videos.content_sent()
    fetch(videos, tmp_path)
    assert files(tmp_path) == FETCHED_VIDEOS and videos.content_sent() > sent


# ---------------------------------------------------------------------------------------------------- disks and folders


def test_a_disk_that_is_too_small_is_noticed_before(images, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 5000, 5000))
    with pytest.raises(FetchError, match=r"new: 1\.21 MB are needed, but only 5 kB are free"):
        fetch(images, tmp_path / "new")
    assert not (tmp_path / "new").exists()


SMALL_DISK = """
import shutil, sys
from pathlib import Path
from llavanext_cli.errors import LlavaNextError
from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.run import run_fetch
shutil.disk_usage = lambda path: shutil._ntuple_diskusage(10**9, 0, 10**9)
try:
    run_fetch(FetchRequest(to=Path(sys.argv[1]), names=(sys.argv[2],), endpoint=sys.argv[3]))
except LlavaNextError as fault:
    print(fault, fault.hint, sep="\\n")
print(*[path.name for path in Path(sys.argv[1]).glob("*.bin")])
"""


def can_mount() -> bool:
    try:
        return subprocess.run(["unshare", "-rm", "true"], capture_output=True, timeout=10).returncode == 0
    except OSError:
        return False


@pytest.mark.skipif(not can_mount(), reason="needs a namespace of its own to mount a small file system")
@pytest.mark.parametrize("kind", ["web", "hub"])
def test_a_full_disk(tmp_path, kind):
    """In a namespace of its own, where tmp_path/disk is a file system of 2 MB."""
    data, disk = content(5_000_000), tmp_path / "disk"
    disk.mkdir()
    with FileSite({"/a.bin": data}) as site, HubSite() as hub:
        hub.add("org/big", {"a.bin": data})
        name = site.url("/a.bin") if kind == "web" else "org/big"
        mount = (
            f'mount -t tmpfs -o size=2m none {disk} && exec {sys.executable} -c "$0" {disk}/in {name} {hub.endpoint}'
        )
        done = subprocess.run(
            ["unshare", "-rm", "sh", "-c", mount, SMALL_DISK],
            capture_output=True,
            text=True,
            timeout=60,
            env=os.environ | {"PYTHONPATH": os.getcwd()},
        )
    assert done.stderr == "" and done.stdout.splitlines() == [
        f"{disk}/in: the disk is full",
        "make room and run the same command again: it resumes",
        "",
    ]


def test_a_file_where_a_folder_is_needed_and_the_reverse(videos, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"file is a file, not a folder"):
        fetch(videos, tmp_path / "file")
    with pytest.raises(LlavaNextError, match=r"file"):
        fetch(videos, tmp_path / "file" / "below")
    (tmp_path / "to" / ANSWER_FILE).mkdir(parents=True)
    with pytest.raises(DataError, match=r"processed.json is a folder, but a file must be written there"):
        fetch(videos, tmp_path / "to", force=True)


def test_a_folder_in_which_nothing_arrived_is_removed(images, tmp_path):
    for to in (tmp_path / "a" / "b", tmp_path):
        with pytest.raises(FetchError, match=r"127.0.0.1 does not have nope.zip \(HTTP 404\)"):
            run_fetch(FetchRequest(to=to, names=(images.url("/nope.zip"),)))
        assert list(tmp_path.iterdir()) == []


def test_partial_files_of_another_version_are_removed(tmp_path):
    first, second = content(3_000_000, 1), content(2_000_000, 2)
    with HubSite() as hub:
        hub.manners["a.bin"] = Manners(cut_every=900_000, statuses=[])
        for data in (first, second):
            hub.add("org/model", {"a.bin": data})
            if data is first:
                hub.manners["a.bin"] = Manners(ranges=False, cut_every=900_000)
                with pytest.raises(FetchError, match="broke before the answer was complete"):
                    fetch(hub, tmp_path, "org/model", retries=0)
                assert list((tmp_path / ".llavanext/download").iterdir())
            else:
                hub.manners.clear()
                fetch(hub, tmp_path, "org/model")
    assert files(tmp_path) == {"a.bin": second} and not (tmp_path / ".llavanext/download").exists()


def test_a_second_command_is_refused_while_the_first_works(images, tmp_path):
    with claim(tmp_path / ".llavanext/download"):
        for run in (fetch, check):
            (tmp_path / ".llavanext").mkdir(exist_ok=True)
            (tmp_path / ".llavanext/manifest.json").write_text("{}")
            with pytest.raises(LlavaNextError, match="is in use by another llavanext command"):
                run(images, tmp_path)
        with pytest.raises(DataError, match="was not written by this version"):
            fetch(images, tmp_path, dry_run=True)  # which only reads


# ------------------------------------------------------------------------------------------------------------- registry


def test_the_registry_is_consistent():
    for name, artifact in ARTIFACTS.items():
        assert artifact.name == name and artifact.purpose and artifact.licence and artifact.size
        assert artifact.hub or (artifact.web.size and len(artifact.web.sha256) == 64)
        if artifact.hub and artifact.hub.kind == MODEL:
            assert "tokenizer.model" in artifact.include and "config.json" in artifact.include


@pytest.mark.parametrize(
    ("fetched", "expected"),
    [
        (["video-7b"], ["llavanext convert /d/to /d/to-mindspore"]),
        (["mix665k"], ["llavanext fetch coco-train2017 --to /d/to", "printf", "llavanext mix /d/to/mix665k.yaml"]),
        (
            ["mix665k", "coco-train2017"],
            ["printf", "llavanext mix /d/to/mix665k.yaml --out /d/to/mix665k.samples.jsonl"],
        ),
        (["video178k-academic"], ["printf", "llavanext mix /d/to/video178k-academic.yaml"]),
        (["vicuna-7b"], ["llavanext fetch clip-vit-l-336 --to /d/clip-vit-l-336", "llavanext convert --vision"]),
        (["video-7b-tokenizer"], ["llavanext fetch mix665k coco-train2017 --to /d/images", "printf", "llavanext mix"]),
        (["org/other"], []),
    ],
)
def test_what_to_run_next(fetched, expected, tmp_path):
    from pathlib import Path

    paths = ["model.safetensors", "llava_v1_5_mix665k.json", ANSWER_FILE]
    commands = next_commands({name: paths for name in fetched}, Path("/d/to"))
    assert len(commands) == len(expected)
    assert all(command.startswith(start) for command, start in zip(commands, expected, strict=True)), commands
    assert next_commands({"video-7b": paths}, Path("/d/to"), {"video-7b"}) == []  # half a model
