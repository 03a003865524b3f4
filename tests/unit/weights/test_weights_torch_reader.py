"""Pickles of torch, read without torch: what torch.save writes comes out, and nothing in a file is ever run."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.headers import read_folder
from llavanext_cli.weights.pickles import PickleReader, Storage, Unreadable, _rebuild_tensor
from llavanext_cli.weights.plan import extent
from llavanext_cli.weights.stream import Stream
from llavanext_cli.weights.torch_reader import BESIDE, read_torch_header

torch = pytest.importorskip("torch")


def read_bytes(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, through the header and the stream as `convert` reads them."""
    found = {}
    with Stream(0) as stream:
        for name, spec in read_torch_header(path).items():
            out = bytearray()
            stream.copy(extent(spec), out.extend, hashlib.sha256())
            found[name] = bytes(out)
    return found


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def sample_tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    base = torch.randn(6, 8)
    return {
        "plain": base,
        "transposed": base.t(),
        "a part": base[1:3, 2:5],
        "a view behind": base.reshape(-1)[40:],
        "scalar": torch.tensor(3.5),
        "bfloat16": torch.randn(5).bfloat16(),
        "half": torch.randn(3, 3).half(),
        "double": torch.randn(2).double(),
        "numbers": torch.arange(4),
        "bytes": torch.arange(4, dtype=torch.uint8),
        "truths": torch.tensor([True, False]),
        "nothing": torch.zeros(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(4)),
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
@pytest.mark.parametrize("wrap", [dict, OrderedDict, lambda d: {"state_dict": d}], ids=["dict", "ordered", "wrapped"])
def test_what_torch_saves_comes_out(zipped: bool, wrap: type, tmp_path: Path) -> None:
    tensors = sample_tensors()
    torch.save(wrap(tensors), tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    specs = read_torch_header(tmp_path / "x.bin")
    assert {n: s.shape for n, s in specs.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert read_bytes(tmp_path / "x.bin") == {n: bytes_of(t) for n, t in tensors.items()}


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
@pytest.mark.parametrize("protocol", [2, 4])
def test_a_modules_state_with_its_metadata(zipped: bool, protocol: int, tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    assert hasattr(state, "_metadata")
    torch.save(state, tmp_path / "x.bin", pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    assert read_bytes(tmp_path / "x.bin") == {n: bytes_of(t) for n, t in state.items()}


class Evil:
    """Pickled as a call of os.mkdir."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
def test_code_in_a_file_is_not_run_and_named(zipped: bool, tmp_path: Path) -> None:
    state = {"weight": torch.zeros(2), "extra": Evil(tmp_path / "owned")}
    torch.save(state, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"'posix\.mkdir', which is not a tensor and would be run"):
        read_torch_header(tmp_path / "x.bin")
    assert not (tmp_path / "owned").exists()


def test_a_whole_model_is_refused_by_its_class(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2), tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match=r"torch\.nn\.modules\.linear\.Linear"):
        read_torch_header(tmp_path / "x.bin")


@pytest.mark.parametrize("value", [3, "text", [torch.zeros(1)], {"deeper": torch.zeros(1)}])
def test_values_that_are_no_tensors_are_named(value: object, tmp_path: Path) -> None:
    torch.save({"weight": torch.zeros(2), "step": value}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="'step' is no tensor but"):
        read_torch_header(tmp_path / "x.bin")


@pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])
def test_a_tensor_stored_negated_is_refused(zipped: bool, tmp_path: Path) -> None:
    negated = torch._neg_view(torch.ones(3))
    torch.save({"w": negated}, tmp_path / "x.bin", _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match=r"bytes mean something else \(\({'neg': True},\)\)"):
        read_torch_header(tmp_path / "x.bin")


@pytest.mark.timeout(30)
@pytest.mark.parametrize("axes", [9, 300, 180_000])
def test_a_shape_without_end_is_refused(axes: int) -> None:
    with pytest.raises(Unreadable, match=f"a tensor of {axes} axes"):
        _rebuild_tensor((Storage("0", "F32", 64), 0, (2**62,) * axes, (0,) * axes))


def test_what_a_trainer_saved_beside_is_named(tmp_path: Path) -> None:
    state = {"state_dict": {"w": torch.zeros(2)}, "ema_state_dict": {"w": torch.ones(2)}, "epoch": 3}
    torch.save(state, tmp_path / "pytorch_model.bin")
    left_out: list[tuple[str, str]] = []
    assert read_folder(tmp_path, left_out).keys() == {"w"}
    assert left_out == [("pytorch_model.bin: ema_state_dict, epoch", BESIDE)]


# ------------------------------------------------------------------------------------------------------------- archives


def repack(path: Path, change: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive again with some members replaced (by the end of their name)."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            archive.writestr(name, next((new for end, new in change.items() if name.endswith(end)), data))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    torch.save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x.bin")
    return tmp_path / "x.bin"


def test_zipfiles_own_archive_is_read_alike(archive: Path) -> None:
    before = read_bytes(archive)
    assert read_bytes(repack(archive, {})) == before == {"w": bytes_of(torch.arange(6.0))}


def test_a_compressed_archive_is_refused(archive: Path) -> None:
    with pytest.raises(CheckpointError, match="compressed or encrypted"):
        read_torch_header(repack(archive, {}, zipfile.ZIP_DEFLATED))


def test_a_zip_bomb_is_refused_without_being_opened(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/data.pkl", b"\0" * (200 << 20))
    assert (tmp_path / "x.bin").stat().st_size < 1 << 20
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="compressed"):
        read_torch_header(tmp_path / "x.bin")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


def test_members_may_not_overlap(archive: Path) -> None:
    raw = bytearray(archive.read_bytes())
    at = raw.find(b"PK\x01\x02")
    second = raw.find(b"PK\x01\x02", at + 4)
    raw[second + 42 : second + 46] = raw[at + 42 : at + 46]  # the second member's header is the first's
    archive.write_bytes(raw)
    with pytest.raises(CheckpointError, match="overlaps"):
        read_torch_header(archive)


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9, 0.99])
def test_a_truncated_archive_is_refused(keep: float, archive: Path) -> None:
    raw = archive.read_bytes()
    archive.write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(CheckpointError, match="cut short"):
        read_torch_header(archive)


def test_a_directory_that_lies_about_its_length(archive: Path) -> None:
    raw = bytearray(archive.read_bytes())
    struct.pack_into("<Q", raw, raw.rfind(b"PK\x06\x06") + 40, 1 << 40)
    archive.write_bytes(raw)
    with pytest.raises(CheckpointError, match="list of members"):
        read_torch_header(archive)


def test_a_storage_shorter_than_announced(archive: Path) -> None:
    with pytest.raises(CheckpointError, match="its storage has 4 bytes, 24 are announced"):
        read_torch_header(repack(archive, {"data/0": b"1234"}))


def test_a_missing_storage(archive: Path) -> None:
    with zipfile.ZipFile(archive) as old:
        members = {n: old.read(n) for n in old.namelist() if not n.endswith("data/0")}
    with zipfile.ZipFile(archive, "w") as new:
        for name, data in members.items():
            new.writestr(name, data)
    with pytest.raises(CheckpointError, match="storage '0' is missing"):
        read_torch_header(archive)


def test_a_big_endian_archive_is_refused(archive: Path) -> None:
    with pytest.raises(CheckpointError, match="big-endian"):
        read_torch_header(repack(archive, {"byteorder": b"big"}))


def test_other_files_are_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "x.bin", "w") as other:
        other.writestr("readme.txt", "hello")
    with pytest.raises(CheckpointError, match="not one of torch's"):
        read_torch_header(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(b"GGUF....")
    with pytest.raises(CheckpointError, match="neither a torch archive nor a pickle"):
        read_torch_header(tmp_path / "x.bin")
    (tmp_path / "x.bin").write_bytes(pickle.dumps({"w": 1}, 2))
    with pytest.raises(CheckpointError, match=r"not one that torch\.save made"):
        read_torch_header(tmp_path / "x.bin")


@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_truncated_legacy_file_is_refused(keep: float, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(50)}, tmp_path / "x.bin", _use_new_zipfile_serialization=False)
    raw = (tmp_path / "x.bin").read_bytes()
    (tmp_path / "x.bin").write_bytes(raw[: int(len(raw) * keep)])
    with pytest.raises(CheckpointError, match=r"cut short|beyond the end|damaged"):
        read_torch_header(tmp_path / "x.bin")


# -------------------------------------------------------------------------------------------------------------- pickles

BOMBS = {
    "a memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a text of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a bytearray of an exabyte": b"\x80\x05\x96" + b"\xff" * 8 + b".",
    "a number of four gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a tower of tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 5000 + b"}q\x01h\x00h\x00s.",
    "a hash without end": b"\x80\x02}(" + b")" + b"q\x00h\x00\x86" * 60 + b"K\x01u.",
    "values without end": b"\x80\x02" + b"}" * 500_000 + b".",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(30)
def test_a_pickle_cannot_take_time_or_memory(name: str) -> None:
    tracemalloc.start()
    with contextlib.suppress(CheckpointError):
        PickleReader(io.BytesIO(BOMBS[name]), "x.bin").load()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 48 << 20


def test_the_reader_stands_behind_the_pickle() -> None:
    file = io.BytesIO(pickle.dumps({"a": [1, (2, None)], "b": True}, 2) + b"rest")
    assert PickleReader(file, "x").load() == {"a": [1, (2, None)], "b": True}
    assert file.read() == b"rest"


@settings(max_examples=500, deadline=None)
@given(st.binary(max_size=200), st.booleans())
def test_any_pickle_is_read_or_refused(raw: bytes, dressed: bool) -> None:
    try:
        PickleReader(io.BytesIO(b"\x80\x02" + raw + b"." if dressed else raw), "x.bin").load()
    except CheckpointError as refused:
        assert str(refused).startswith("x.bin: ")


OPCODES = [bytes([code]) for code in b"(0cRQb})]dltusaeN\x85\x86\x87\x88\x89JKMG\x8aX\x8cqr\x94hj\x93\x80\x95."]
WORDS = [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n", b"K\x01"]
WORDS += [b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x00k", b"q\x01", b"h\x01", b"K\x00", b"(K\x02t", b")"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(OPCODES + WORDS * 3) | st.binary(min_size=1, max_size=2), max_size=60))
def test_any_program_is_read_or_refused(words: list[bytes]) -> None:
    try:
        PickleReader(io.BytesIO(b"".join(words) + b"."), "x.bin").load()
    except CheckpointError as refused:
        assert str(refused).startswith("x.bin: ")


@settings(max_examples=300, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), zipped=st.booleans())
def test_a_flipped_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: float, value: int, zipped: bool
) -> None:
    file = io.BytesIO()
    torch.save({"w": torch.zeros(3), "v": torch.ones(2, 2).half()}, file, _use_new_zipfile_serialization=zipped)
    raw = bytearray(file.getvalue())
    raw[int(position * len(raw))] = value
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    path.write_bytes(raw)
    try:
        specs = read_torch_header(path)
    except CheckpointError:
        return
    for spec in specs.values():
        assert spec.offset >= 0 and spec.offset + spec.nbytes <= len(raw)
