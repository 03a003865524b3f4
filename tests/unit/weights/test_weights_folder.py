"""Folders appear whole or not at all, and nothing is replaced by accident."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights import stream as stream_module
from llavanext_cli.weights.ckpt_format import read_ckpt_header, write_ckpt
from llavanext_cli.weights.folder import (
    check_destination,
    check_space,
    find_leftovers,
    new_folder,
    parse_size,
)
from llavanext_cli.weights.protobuf import write_varint
from llavanext_cli.weights.stream import (
    Extent,
    Made,
    PlannedTensor,
    Stream,
    digest_pieces,
    plan_shards,
    write_safetensors,
)


def listing(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def test_a_new_folder_takes_its_name_at_the_end(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "out") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "a" / "out").exists() and temporary.parent == tmp_path / "a"
    assert listing(tmp_path) == ["a", "a/out", "a/out/x"]


@pytest.mark.parametrize("stop", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_failure_leaves_nothing_and_keeps_the_old(stop: type[BaseException], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    with pytest.raises(stop), new_folder(tmp_path / "out") as temporary:
        (temporary / "new").write_text("2")
        raise stop
    with pytest.raises(stop), new_folder(tmp_path / "deep" / "er" / "out"):
        raise stop
    assert listing(tmp_path) == ["out", "out/old"]


def test_the_old_folder_is_replaced_whole(tmp_path: Path) -> None:
    (tmp_path / "out" / "sub").mkdir(parents=True)
    with new_folder(tmp_path / "out", replace=True) as temporary:
        (temporary / "new").write_text("2")
    assert listing(tmp_path) == ["out", "out/new"]


@pytest.mark.parametrize(("number", "hint"), [(errno.EMFILE, "ulimit -n"), (errno.ENAMETOOLONG, "a shorter name")])
def test_other_limits_have_their_own_hint(number: int, hint: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught, new_folder(tmp_path / "out"):
        raise OSError(number, os.strerror(number))
    assert hint in caught.value.hint and listing(tmp_path) == []


def test_a_full_disk_is_an_error_of_ours(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="the disk is full"), new_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert listing(tmp_path) == []


def test_a_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    with new_folder(tmp_path / "out") as temporary:
        (temporary / "new").write_text("2")
    assert (tmp_path / "out").is_symlink() and listing(tmp_path / "real") == ["new"]


def test_leftovers_of_killed_runs_are_found(tmp_path: Path) -> None:
    dead = 999_999_999  # no machine has so many processes
    for name in (f".outer.tmp-{dead}", f".out.tmp-{os.getppid()}", ".out.tmp-x", f".out.new-{dead}"):
        (tmp_path / name).mkdir()
    expected = [tmp_path / f".out.{name}" for name in (f"old-{os.getpid()}", f"old-{dead}", f"tmp-{dead}")]
    for path in expected:
        path.mkdir()
    assert find_leftovers(tmp_path / "out") == sorted(expected)


class TestDestination:
    @pytest.fixture(autouse=True)
    def source(self, tmp_path: Path) -> None:
        (tmp_path / "src" / "inner").mkdir(parents=True)

    @pytest.mark.parametrize("name", ["src", "src/inner", "src/new", "src/new/deeper", "src/../src/x", "link/x"])
    def test_inside_the_source(self, name: str, tmp_path: Path) -> None:
        (tmp_path / "link").symlink_to(tmp_path / "src")
        with pytest.raises(CheckpointError, match="inside the source"):
            check_destination(tmp_path / name, (tmp_path / "src",), force=True)

    def test_around_the_source(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="holds the source"):
            check_destination(tmp_path, (tmp_path / "src",), force=True)

    def test_a_file_or_a_dead_link(self, tmp_path: Path) -> None:
        (tmp_path / "f").write_text("")
        (tmp_path / "l").symlink_to(tmp_path / "nowhere")
        for name, message in (("f", "is a file"), ("l", "link to nowhere")):
            with pytest.raises(CheckpointError, match=message):
                check_destination(tmp_path / name, (tmp_path / "src",), force=True)

    def test_what_is_there_needs_force_and_a_checkpoint(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        check_destination(tmp_path / "out", (tmp_path / "src",), force=False)  # empty
        (tmp_path / "out" / "thesis.tex").write_text("")
        with pytest.raises(CheckpointError, match="is there already") as caught:
            check_destination(tmp_path / "out", (tmp_path / "src",), force=False)
        assert "--force" in caught.value.hint
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            check_destination(tmp_path / "out", (tmp_path / "src",), force=True)

    @pytest.mark.parametrize("weights", ["llavanext_manifest.json", "model-00001-of-00002.safetensors", "model.ckpt"])
    def test_only_what_is_ours_is_replaced(self, weights: str, tmp_path: Path) -> None:
        out = tmp_path / "out"
        (out / "training").mkdir(parents=True)
        (out / "config.json").write_text("{}")
        with pytest.raises(CheckpointError, match="holds no checkpoint"):
            check_destination(out, (), force=True)
        for name in (weights, "training/state.json", "LICENSE", "model.safetensors.index.json"):
            (out / name).write_text("")
        check_destination(out, (), force=True)
        for name in ("training/thesis.tex", ".git/config", "model.safetensors/x", "notes.md"):
            (out / name).parent.mkdir(exist_ok=True)
            (out / name).write_text("")
            with pytest.raises(CheckpointError, match="holds more than a checkpoint") as caught:
                check_destination(out, (), force=True)
            assert caught.value.details == (name.partition("/")[0],)
            (out / name).unlink()
            if name.startswith((".git", "model")):
                (out / name).parent.rmdir()

    def test_where_a_disk_is_mounted(self) -> None:
        with pytest.raises(CheckpointError, match="a disk is mounted here"):
            check_destination(Path("/proc"), (), force=True)


@pytest.mark.parametrize("empty", [True, False])
def test_of_two_that_make_one_folder_the_first_wins(tmp_path: Path, empty: bool) -> None:
    out = tmp_path / "out"
    if empty:
        out.mkdir()
    with pytest.raises(CheckpointError, match="another command has made it"), new_folder(out) as slow:
        (slow / "whose").write_text("slow")
        with new_folder(tmp_path / "other") as quick:
            (quick / "whose").write_text("quick")
        (tmp_path / "other").rename(out)
    assert (out / "whose").read_text() == "quick" and list(tmp_path.iterdir()) == [out]


def test_what_was_made_before_the_block_began_is_not_replaced(tmp_path: Path) -> None:
    """Between the first look at the destination and the writing lies all of the planning."""
    out = tmp_path / "out"
    with new_folder(out) as quick:
        (quick / "whose").write_text("quick")
    with pytest.raises(CheckpointError, match="another command has made it"), new_folder(out) as slow:
        (slow / "whose").write_text("slow")
    assert (out / "whose").read_text() == "quick" and list(tmp_path.iterdir()) == [out]


def test_a_disk_too_small_is_said_with_both_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 3_000_000_000})
    monkeypatch.setattr("llavanext_cli.weights.folder.shutil.disk_usage", lambda _: usage)
    check_space(tmp_path / "not" / "there" / "yet", 2_000_000_000)
    with pytest.raises(CheckpointError, match=r"14\.2 GB are needed, .* and 3 GB are free"):
        check_space(tmp_path / "out", 14_126_862_336)
    monkeypatch.setattr("llavanext_cli.weights.folder.os.access", lambda *_: False)
    with pytest.raises(CheckpointError, match="cannot be written to"):
        check_space(tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5 * 10**9), ("500 mb", 5 * 10**8), ("1.5GiB", 3 << 29), ("2g", 2 * 10**9)]
)
def test_sizes_are_read(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-5GB", "5 apples", "0GB", "0.1", "5GBB", "9" * 400])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError, match="is no size"):
        parse_size(text)


# --------------------------------------------------------------------------------------------------------------- stream


@pytest.fixture
def small_buffers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream_module, "BUFFER_BYTES", 64)


def tensors_of(tmp_path: Path, arrays: dict[str, np.ndarray]) -> list[PlannedTensor]:
    planned = []
    for name, array in arrays.items():
        path = tmp_path / f"{name}.raw"
        path.write_bytes(b"skip" + array.tobytes())
        dtype = {"float32": "F32", "float16": "F16"}[str(array.dtype)]
        planned.append(PlannedTensor(name, dtype, array.shape, (Extent(path, 4, array.nbytes),)))
    return planned


ARRAYS = {
    "odd": np.arange(3, dtype=np.float16),
    "wide": np.arange(500, dtype=np.float32).reshape(50, 10),
    "none": np.zeros((0, 4), np.float32),
    "last": np.arange(33, dtype=np.float16),
}


def test_tensors_are_written_and_digested(tmp_path: Path, small_buffers: None) -> None:
    seen: list[tuple[int, int]] = []
    total = sum(a.nbytes for a in ARRAYS.values())
    with Stream(total, lambda done, of: seen.append((done, of))) as stream:
        digests = write_safetensors(tmp_path / "x.safetensors", tensors_of(tmp_path, ARRAYS), stream)
    loaded = load_file(tmp_path / "x.safetensors")
    assert loaded.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(loaded[name], array)
        assert digests[name] == hashlib.sha256(array.tobytes()).hexdigest()
    assert seen[-1] == (total, total) and seen == sorted(seen) and len(seen) > 30


def test_a_source_that_shrinks_is_an_error(tmp_path: Path) -> None:
    (planned,) = tensors_of(tmp_path, {"w": ARRAYS["wide"]})
    (tmp_path / "w.raw").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"w\.raw: ended 1999 bytes early"), Stream(0) as stream:
        write_safetensors(tmp_path / "x", [planned], stream)


def test_a_plan_whose_bytes_do_not_add_up_is_a_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="4 bytes planned"):
        PlannedTensor("w", "F32", (2,), (Extent(tmp_path, 0, 4),))


def test_shards_keep_the_order_and_the_limit() -> None:
    tensors = [
        PlannedTensor(
            str(i),
            "F32",
            (n,),
            (
                Made(
                    4 * n,
                    lambda: iter(()),
                ),
            ),
        )
        for i, n in enumerate([3, 3, 9, 1])
    ]
    assert [[t.name for t in shard] for shard in plan_shards(tensors, 24)] == [["0", "1"], ["2"], ["3"]]


def test_ckpt_files_are_cut_into_slices_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llavanext_cli.weights.ckpt_format.SLICE_BYTES", 300)
    arrays = {name: array for name, array in ARRAYS.items() if array.size}
    with Stream(0) as stream:
        digests = write_ckpt(tmp_path / "x.ckpt", tensors_of(tmp_path, arrays), stream)
        pieces = read_ckpt_header(tmp_path / "x.ckpt")
        assert [len(pieces[name]) for name in arrays] == [1, 7, 1]
        assert {name: digest_pieces(piece, stream) for name, piece in pieces.items()} == digests


@pytest.mark.parametrize("cut", [1, 10, 40, 2000])
def test_a_truncated_ckpt_file_is_refused(cut: int, tmp_path: Path) -> None:
    with Stream(0) as stream:
        write_ckpt(tmp_path / "x.ckpt", tensors_of(tmp_path, {"w": ARRAYS["wide"]}), stream)
    raw = (tmp_path / "x.ckpt").read_bytes()
    (tmp_path / "x.ckpt").write_bytes(raw[:-cut])
    with pytest.raises(CheckpointError, match="damaged"):
        read_ckpt_header(tmp_path / "x.ckpt")


def test_varints() -> None:
    assert [write_varint(n) for n in (0, 127, 128, 300)] == [b"\0", b"\x7f", b"\x80\x01", b"\xac\x02"]
