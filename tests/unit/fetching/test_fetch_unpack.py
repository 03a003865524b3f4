"""Archives, plain and hostile: nothing of a hostile one is written outside the staging folder."""

from __future__ import annotations

import hashlib
import stat
import struct
import tarfile
import zipfile

import pytest

from llavanext_cli.errors import DataError
from llavanext_cli.fetching import unpack
from llavanext_cli.fetching.unpack import move_file, unpack_archive
from tests.unit.fetching.folders import make_tar, make_zip
from tests.unit.fetching.loopback import content, files

FILES = {"train/a.jpg": content(5000, 1), "train/sub/b.jpg": content(3000, 2), "train/empty": b""}
MAKERS = {"zip": make_zip, "tar.gz": make_tar, "tar": lambda files: make_tar(files, mode="w")}


@pytest.fixture
def run(tmp_path):
    """Write an archive and unpack it."""

    def run(data: bytes, **options):
        (tmp_path / "x").write_bytes(data)
        (tmp_path / "stage").mkdir()
        return unpack_archive(tmp_path / "x", tmp_path / "stage", name="x.zip", **options)

    return run


@pytest.fixture
def refused(run, tmp_path):
    """Unpack an archive that is refused; only the staging folder has changed."""

    def refused(data: bytes, **options) -> str:
        with pytest.raises(DataError) as caught:
            run(data, **options)
        assert caught.value.what.startswith("x.zip") and caught.value.hint
        assert sorted(path.name for path in tmp_path.iterdir()) == ["stage", "x"]
        return caught.value.what

    return refused


def special(name, kind, target=""):
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = kind, target
    return entry


@pytest.mark.parametrize("kind", MAKERS)
def test_files_are_unpacked_and_hashed(run, tmp_path, kind):
    counts = []
    members = run(MAKERS[kind](FILES), tops=("train",), report=counts.append)
    assert files(tmp_path / "stage") == FILES
    assert {m.path: m.sha256 for m in members} == {name: hashlib.sha256(d).hexdigest() for name, d in FILES.items()}
    assert counts[-1] == 8000


def test_a_leading_dot_is_common(run, tmp_path):
    folders = [special(".", tarfile.DIRTYPE), special("./train", tarfile.DIRTYPE)]
    run(make_tar({"./train/a": b"1"}, folders), tops=("train",))
    assert files(tmp_path / "stage") == {"train/a": b"1"}


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("/etc/evil", "absolute"),
        ("../evil", "leaves the folder"),
        ("train/../../evil", "leaves the folder"),
        ("train\\..\\evil", "backslashes"),
        ("train/a\nb", "control characters"),
        (".llavanext/manifest.json", "reserved"),
    ],
)
def test_names_that_leave_the_folder(refused, kind, name, reason):
    assert reason in refused(MAKERS[kind]({"train/good": b"1", name: b"evil"}))


@pytest.mark.parametrize(
    ("kind", "target"),
    [
        (tarfile.SYMTYPE, "/etc/passwd"),
        (tarfile.SYMTYPE, "../../secret"),
        (tarfile.LNKTYPE, "../secret"),
        (tarfile.SYMTYPE, "a.jpg"),
        (tarfile.FIFOTYPE, ""),
        (tarfile.CHRTYPE, ""),
    ],
)
def test_links_and_devices_in_a_tar(refused, kind, target):
    what = refused(make_tar(FILES, [special("train/odd", kind, target)]))
    assert "train/odd" in what and ("link" in what or "outside" in what or "special file" in what)


@pytest.mark.parametrize("mode", [stat.S_IFLNK | 0o777, stat.S_IFIFO | 0o644])
def test_links_and_pipes_in_a_zip(refused, tmp_path, mode):
    entry = zipfile.ZipInfo("train/odd")
    entry.external_attr, entry.create_system = mode << 16, 3
    with zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr(entry, "/etc/passwd")
    assert "'train/odd' is not a regular file" in refused((tmp_path / "x").read_bytes())


def test_nothing_is_written_through_a_link(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "stage").mkdir()
    (tmp_path / "stage/train").symlink_to(tmp_path / "out")
    (tmp_path / "x").write_bytes(make_zip(FILES))
    with pytest.raises(DataError, match=r"x.zip: 'train/a.jpg' is outside the folder"):
        unpack_archive(tmp_path / "x", tmp_path / "stage", name="x.zip")
    assert not any((tmp_path / "out").iterdir())


def test_the_same_name_twice_and_a_file_where_a_folder_is(refused, tmp_path):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(tmp_path / "x", "w") as archive:
        archive.writestr("train/a", b"1")
        archive.writestr("train/a", b"2")
    assert "'train/a' is in the archive twice" in refused((tmp_path / "x").read_bytes())
    (tmp_path / "stage/train/a").unlink()
    (tmp_path / "stage/train").rmdir()
    (tmp_path / "stage").rmdir()
    assert "'train/a/b' is in the archive twice" in refused(make_tar({"train/a": b"1", "train/a/b": b"2"}))


@pytest.mark.parametrize("name", ["evil/a", "train"])
def test_what_is_not_expected_at_the_top(refused, name):
    assert "is at the top, where only train/ is expected" in refused(make_tar({name: b"1"}), tops=("train",))


@pytest.mark.parametrize("kind", ["zip", "tar.gz"])
def test_a_bomb(refused, tmp_path, kind):
    zeros = {"train/1": bytes(40 << 20), "train/2": bytes(40 << 20)}
    data = make_zip(zeros, zipfile.ZIP_DEFLATED) if kind == "zip" else make_tar(zeros)
    assert len(data) < 200_000
    assert "grows to more than 67108864 bytes at 'train/2'" in refused(data)
    assert sum(map(len, files(tmp_path / "stage").values())) <= unpack.LEAST_CAP


def test_a_zip_whose_header_announces_another_size(refused):
    data = make_zip({"train/a": bytes(1 << 20)}, zipfile.ZIP_DEFLATED)
    assert "not a complete zip" in refused(data.replace(struct.pack("<I", 1 << 20), struct.pack("<I", 10)))


def test_an_encrypted_zip(refused):
    data = bytearray(make_zip({"train/a": b"secret"}))
    data[6] |= 1
    data[data.rfind(b"PK\x01\x02") + 8] |= 1
    assert "encrypted" in refused(bytes(data))


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("keep", [0.0, 0.2, 0.3])
def test_an_archive_that_was_cut_off_or_is_not_one(refused, kind, keep):
    data = MAKERS[kind](FILES)
    what = refused(data[: int(len(data) * keep)] or b"<html>not found</html>")
    assert "x.zip is not a complete zip or tar archive" in what


def test_moving_to_another_disk(tmp_path, monkeypatch):
    import errno
    import os

    real = os.replace

    def replace(source, target):
        if "stage" in str(source):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    (tmp_path / "stage").write_bytes(b"data")
    monkeypatch.setattr(os, "replace", replace)
    move_file(tmp_path / "stage", tmp_path / "new/target")
    assert files(tmp_path) == {"new/target": b"data"}
