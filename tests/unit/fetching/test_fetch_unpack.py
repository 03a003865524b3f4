"""Archives, hostile and plain."""

from __future__ import annotations

import gzip
import hashlib
import io
import os
import re
import resource
import stat
import struct
import tarfile
import threading
import zipfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavanext_cli.errors import DataError, FetchError
from llavanext_cli.fetching.net import StoppedError
from llavanext_cli.fetching.unpack import UnpackLimits, merge_tree, unpack_archive
from tests.unit.fetching.loopback import content

FILES = {"train/a.jpg": content(70_000), "train/sub/b.jpg": content(10), "train/empty.txt": b""}


def make_zip(path, files=FILES, compression=zipfile.ZIP_STORED, **special):
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
        for name, (mode, data) in special.get("modes", {}).items():
            entry = zipfile.ZipInfo(name)
            entry.create_system, entry.external_attr = 3, mode << 16
            archive.writestr(entry, data)
    return path


def make_tar(path, files=FILES, members=(), mode="w:gz", **options):
    with tarfile.open(path, mode, **options) as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        for entry in members:
            archive.addfile(entry)
    return path


def special(name, kind, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


def tree(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


MAKERS = {"zip": make_zip, "tar.gz": make_tar, "tar": lambda path, **more: make_tar(path, mode="w", **more)}


@pytest.mark.parametrize("kind", MAKERS)
def test_files_come_out_with_their_digests(tmp_path, kind):
    archive = MAKERS[kind](tmp_path / "x")
    told = []
    members = unpack_archive(archive, tmp_path / "stage", into="coco", tops=("train",), report=told.append)
    assert tree(tmp_path / "stage") == FILES
    assert {m.path: (m.size, m.sha256) for m in members} == {
        f"coco/{name}": (len(data), hashlib.sha256(data).hexdigest()) for name, data in FILES.items()
    }
    assert told and max(told) <= archive.stat().st_size


def test_only_some_files(tmp_path):
    members = unpack_archive(make_zip(tmp_path / "x"), tmp_path / "stage", into="c", only=["c/train/sub/b.jpg"])
    assert [m.path for m in members] == ["c/train/sub/b.jpg"] and list(tree(tmp_path / "stage")) == ["train/sub/b.jpg"]


def test_a_leading_dot_is_common(tmp_path):
    unpack_archive(make_tar(tmp_path / "x", {"./train/a": b"1"}), tmp_path / "stage", tops=("train",))
    assert tree(tmp_path / "stage") == {"train/a": b"1"}


BAD_NAMES = ["/etc/evil", "../evil", "train/../../evil", "a/../../../evil", "..", "train\\..\\evil", "C:/evil", "a\nb"]
BAD_NAMES += [".llavanext/manifest.json", "x" * 300, "/".join(["d"] * 600)]


@pytest.mark.parametrize("name", BAD_NAMES)
@pytest.mark.parametrize("kind", MAKERS)
def test_names_that_leave_the_folder(tmp_path, kind, name):
    archive = MAKERS[kind](tmp_path / "x", files={"train/good": b"1", name: b"evil"})
    with pytest.raises(DataError, match=r"x is not safe to unpack: ") as caught:
        unpack_archive(archive, tmp_path / "in" / "stage")
    assert caught.value.hint
    assert not list(tmp_path.rglob("*evil*")) and not os.path.exists("/etc/evil")


def test_a_name_that_is_cut_off_by_a_zero_byte(tmp_path):
    archive = make_zip(tmp_path / "x", {"train/good.jpgX.exe": b"evil"})
    raw = archive.read_bytes().replace(b"good.jpgX.exe", b"good.jpg\0.exe")
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"control characters"):
        unpack_archive(archive, tmp_path / "stage")


LINKS = [
    ("train/out", tarfile.SYMTYPE, "/etc"),
    ("train/out", tarfile.SYMTYPE, "../../etc"),
    ("out", tarfile.SYMTYPE, ".."),
    ("train/out", tarfile.LNKTYPE, "/etc/passwd"),
    ("train/out", tarfile.LNKTYPE, "../secret"),
    ("train/out", tarfile.SYMTYPE, ""),
]


@pytest.mark.parametrize(("name", "kind", "target"), LINKS)
def test_links_that_leave_the_folder(tmp_path, name, kind, target):
    (tmp_path / "secret").write_text("secret")
    archive = make_tar(tmp_path / "x", members=[special(name, kind, target)])
    with pytest.raises(DataError, match=r"link out of the folder"):
        unpack_archive(archive, tmp_path / "stage")
    assert not os.path.lexists(tmp_path / "stage" / name)


def test_a_chain_of_links_that_leaves_the_folder_together(tmp_path):
    members = [
        special("train/deep/er/up", tarfile.SYMTYPE, "../.."),
        special("train/out", tarfile.SYMTYPE, "deep/er/up/../../../../.."),
    ]
    with pytest.raises(DataError, match=r"link out of the folder"):
        unpack_archive(make_tar(tmp_path / "x", members=members), tmp_path / "a" / "b" / "stage")
    chain = [
        special("train/one", tarfile.SYMTYPE, "sub"),
        special("train/sub/up", tarfile.SYMTYPE, ".."),
        special("train/two", tarfile.SYMTYPE, "one/up/../../.."),
    ]
    with pytest.raises(DataError, match=r"link out of the folder"):
        unpack_archive(make_tar(tmp_path / "y", members=chain), tmp_path / "a" / "c" / "stage")


def test_nothing_is_written_through_a_link(tmp_path):
    (tmp_path / "stage").mkdir()
    files = {"train/sub/b.jpg": b"x"}
    with tarfile.open(tmp_path / "x", "w:gz") as archive:
        archive.addfile(special("train/sub", tarfile.SYMTYPE, "elsewhere"))
        entry = tarfile.TarInfo("train/sub/b.jpg")
        entry.size = 1
        archive.addfile(entry, io.BytesIO(files["train/sub/b.jpg"]))
    with pytest.raises(DataError, match=r"link here and a folder there"):
        unpack_archive(tmp_path / "x", tmp_path / "stage")
    assert not (tmp_path / "stage/train/elsewhere").exists()


def test_links_inside_are_kept(tmp_path):
    members = [
        special("train/same", tarfile.SYMTYPE, "a.jpg"),
        special("train/sub/hard", tarfile.LNKTYPE, "train/a.jpg"),
    ]
    unpack_archive(make_tar(tmp_path / "x", members=members), tmp_path / "stage")
    assert (tmp_path / "stage/train/same").read_bytes() == FILES["train/a.jpg"]
    assert (tmp_path / "stage/train/sub/hard").read_bytes() == FILES["train/a.jpg"]


def test_a_link_in_a_zip(tmp_path):
    mode = stat.S_IFLNK | 0o777
    with pytest.raises(DataError, match=r"link out of the folder"):
        unpack_archive(make_zip(tmp_path / "x", modes={"train/l": (mode, "/etc/passwd")}), tmp_path / "stage")
    with pytest.raises(DataError, match=r"endless target"):
        unpack_archive(make_zip(tmp_path / "y", modes={"train/l": (mode, "a" * 9999)}), tmp_path / "stage2")


@pytest.mark.parametrize("kind", [tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_devices(tmp_path, kind):
    with pytest.raises(DataError, match=r"a device or another special file"):
        unpack_archive(make_tar(tmp_path / "x", members=[special("train/dev", kind)]), tmp_path / "stage")


def test_a_fifo_in_a_zip(tmp_path):
    with pytest.raises(DataError, match=r"special file"):
        unpack_archive(make_zip(tmp_path / "x", modes={"train/f": (stat.S_IFIFO | 0o644, "")}), tmp_path / "stage")


def test_the_same_name_twice_and_a_file_that_is_a_folder(tmp_path):
    with tarfile.open(tmp_path / "x", "w:gz") as archive:
        for data in (b"1", b"2"):
            entry = tarfile.TarInfo("train/a")
            entry.size = 1
            archive.addfile(entry, io.BytesIO(data))
    with pytest.raises(DataError, match=r"in it twice"):
        unpack_archive(tmp_path / "x", tmp_path / "stage")
    for number, files in enumerate([{"train/a": b"1", "train/a/b": b"2"}, {"train/a/b": b"2", "train/a": b"1"}]):
        with pytest.raises(DataError, match=r"file here and a folder there"):
            unpack_archive(make_tar(tmp_path / f"y{number}", files), tmp_path / f"stage{number}")


def test_what_is_not_expected_at_the_top(tmp_path):
    for name in ("evil/a", "train"):
        with pytest.raises(DataError, match=r"at its top, where only train/ is expected"):
            unpack_archive(make_tar(tmp_path / "x", {name: b"1"}), tmp_path / "stage", tops=("train",))


# ------------------------------------------------------------------------------------------------ size


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_ten_thousand_fold_compression(tmp_path, kind):
    zeros = {"train/zeros": bytes(100 << 20)}
    archive = (
        make_zip(tmp_path / "x", zeros, zipfile.ZIP_DEFLATED) if kind == "zip" else make_tar(tmp_path / "x", zeros)
    )
    assert archive.stat().st_size < 150_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"it grows to more than 67108864 bytes"):
        unpack_archive(archive, tmp_path / "stage")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000
    assert sum(len(data) for data in tree(tmp_path / "stage").values()) == 0


def test_many_small_members_count_together(tmp_path):
    limits = UnpackLimits(ratio=1, floor=100_000)
    with pytest.raises(DataError, match=r"grows to more than"):
        unpack_archive(
            make_zip(tmp_path / "x", {f"d/{n}": bytes(20_000) for n in range(10)}, zipfile.ZIP_DEFLATED),
            tmp_path / "stage",
            limits=limits,
        )
    with pytest.raises(DataError, match=r"more than 5 members"):
        unpack_archive(
            make_tar(tmp_path / "y", {f"d/{n}": b"" for n in range(10)}),
            tmp_path / "stage2",
            limits=UnpackLimits(members=5),
        )


def test_a_zip_whose_header_lies_about_a_size(tmp_path):
    archive = make_zip(tmp_path / "x", {"train/a": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    raw = archive.read_bytes().replace(struct.pack("<I", 1 << 20), struct.pack("<I", 10))
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"broken archive|not safe"):
        unpack_archive(archive, tmp_path / "stage")


def test_a_tar_header_that_asks_for_gigabytes(tmp_path):
    """A pax header of 8 GB of zeros is 8 MB of gzip; tarfile would read it into memory at once."""
    header = tarfile.TarInfo("pax")
    header.type, header.size = tarfile.XHDTYPE, (8 << 30) - 1
    with gzip.open(tmp_path / "x", "wb", compresslevel=1) as file:
        file.write(header.tobuf(tarfile.USTAR_FORMAT))
        file.write(bytes(64 << 20))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match=r"asks for too much memory"):
        unpack_archive(tmp_path / "x", tmp_path / "stage")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 30_000


def test_a_zip_directory_larger_than_memory(tmp_path):
    archive = make_zip(tmp_path / "x")
    raw = bytearray(archive.read_bytes())
    at = raw.rfind(b"PK\x05\x06")
    raw[at + 12 : at + 16] = struct.pack("<I", 0xFFFFFF00)
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"claims a directory of 4294967040 bytes"):
        unpack_archive(archive, tmp_path / "stage")


def test_a_sparse_file_that_claims_a_terabyte(tmp_path):
    entry = tarfile.TarInfo("train/sparse")
    entry.size = 1 << 40
    with tarfile.open(tmp_path / "x", "w:gz") as archive:
        archive.fileobj.write(entry.tobuf(tarfile.GNU_FORMAT))
    with pytest.raises(DataError, match=r"grows to more than"):
        unpack_archive(tmp_path / "x", tmp_path / "stage")


def test_a_disk_without_room(tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(FetchError, match=r"no room to unpack x: train/a.jpg needs 70000 bytes, 1000 are free"):
        unpack_archive(make_tar(tmp_path / "x"), tmp_path / "stage")


# ---------------------------------------------------------------------------------------------- broken


@pytest.mark.parametrize(
    ("kind", "keep"),
    [(kind, keep) for kind in MAKERS for keep in (0.1, 0.5, 0.9) if (kind, keep) != ("tar", 0.9)],  # only its padding
)
def test_cut_off(tmp_path, kind, keep):
    archive = MAKERS[kind](tmp_path / "x")
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(DataError, match=r"x is a broken archive"):
        unpack_archive(archive, tmp_path / "stage")


def test_a_gzip_whose_sum_is_wrong(tmp_path):
    archive = make_tar(tmp_path / "x")
    raw = bytearray(archive.read_bytes())
    raw[-8] ^= 1
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"broken archive: CRC check failed"):
        unpack_archive(archive, tmp_path / "stage")


@pytest.mark.parametrize("data", [b"", b"hello", b"<html>", bytes(5000), b"PK\x03\x04", b"PK\x05\x06", b"\x1f\x8b\x08"])
def test_no_archive_at_all(tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    with pytest.raises(DataError, match=r"neither a zip nor a tar|broken archive"):
        unpack_archive(tmp_path / "x", tmp_path / "stage")


def test_an_encrypted_zip(tmp_path):
    archive = make_zip(tmp_path / "x", {"train/a": b"secret"})
    raw = bytearray(archive.read_bytes())
    raw[6] |= 1
    raw[raw.find(b"PK\x01\x02") + 8] |= 1
    archive.write_bytes(raw)
    with pytest.raises(DataError, match=r"encrypted"):
        unpack_archive(archive, tmp_path / "stage")


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=st.sampled_from(sorted(MAKERS)))
def test_changed_bytes_are_an_error_of_ours_or_harmless(tmp_path_factory, data, kind):
    folder = tmp_path_factory.mktemp("fuzz")
    small = {"train/a": content(900), "train/b/c": b"x" * 50}
    archive = MAKERS[kind](folder / "x", files=small)
    raw = bytearray(archive.read_bytes())
    for _ in range(data.draw(st.integers(1, 8))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    archive.write_bytes(raw)
    try:
        unpack_archive(archive, folder / "in" / "stage", limits=UnpackLimits(floor=1 << 20))
    except DataError as fault:
        assert fault.hint
    assert {path.name for path in folder.iterdir()} <= {"x", "in"}
    assert {path.name for path in (folder / "in").iterdir()} <= {"stage", "stage.members"}


# -------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("kind", MAKERS)
def test_what_was_unpacked_before_is_not_written_again(tmp_path, kind):
    files = {f"train/{number}": content(1_500_000, number) for number in range(4)}
    archive = MAKERS[kind](tmp_path / "x", files=files)
    stop = threading.Event()
    stage, journal = tmp_path / "stage", tmp_path / "stage.members"

    def stop_after_one(done):
        if journal.exists() and journal.read_text():
            stop.set()

    with pytest.raises(StoppedError):
        unpack_archive(archive, stage, report=stop_after_one, stop=stop)
    finished = {
        name: (stage / name).stat().st_mtime_ns for name in re.findall(r'"name": "([^"]+)"', journal.read_text())
    }
    assert 1 <= len(finished) < 4
    members = unpack_archive(archive, stage)
    assert tree(stage) == files
    assert {name: (stage / name).stat().st_mtime_ns for name in finished} == finished
    assert [m.sha256 for m in members] == [hashlib.sha256(data).hexdigest() for data in files.values()]


def test_a_file_that_was_half_written_is_written_again(tmp_path):
    archive = make_zip(tmp_path / "x")
    unpack_archive(archive, tmp_path / "stage")
    (tmp_path / "stage/train/a.jpg").write_bytes(b"half")
    with open(tmp_path / "stage.members", "a") as file:
        file.write('{"name": "train/a.j')
    unpack_archive(archive, tmp_path / "stage")
    assert tree(tmp_path / "stage") == FILES


def test_merging_moves_files_into_folders_that_are_there(tmp_path):
    for name, text in {"stage/d/new": "1", "stage/d/both": "2", "goal/d/old": "3", "goal/d/both": "4"}.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    merge_tree(tmp_path / "stage", tmp_path / "goal")
    assert tree(tmp_path / "goal") == {"d/new": b"1", "d/both": b"2", "d/old": b"3"}
    assert not (tmp_path / "stage").exists()


def test_merging_onto_another_disk(tmp_path):
    from pathlib import Path

    other = Path("/dev/shm")
    if not other.is_dir() or other.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("this machine has no second file system to write to")
    import tempfile

    with tempfile.TemporaryDirectory(dir=other) as far:
        (tmp_path / "stage/d/e").mkdir(parents=True)
        (tmp_path / "stage/d/e/f").write_text("1")
        (tmp_path / "goal").symlink_to(far)
        merge_tree(tmp_path / "stage", tmp_path / "goal")
        assert tree(Path(far)) == {"d/e/f": b"1"}
