"""Pickles of torch, read without torch: what torch.save writes is read, and nothing in a file is ever run."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.dtypes import source_piece
from llavanext_cli.weights.stream import Stream
from llavanext_cli.weights.torch_reader import load_pickle, read_torch_header

torch = pytest.importorskip("torch")
both_formats = pytest.mark.parametrize("zipped", [True, False], ids=["archive", "legacy"])


def save(state: object, path: Path, zipped: bool = True, protocol: int = 2) -> Path:
    torch.save(state, path, pickle_protocol=protocol, _use_new_zipfile_serialization=zipped)
    return path


def read_bytes(path: Path) -> dict[str, bytes]:
    """Every tensor's bytes, through the header and the stream as `convert` reads them."""
    found = {}
    with Stream(0) as stream:
        for name, spec in read_torch_header(path).items():
            out = bytearray()
            stream.copy(source_piece(spec), out.extend, hashlib.sha256())
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


@both_formats
@pytest.mark.parametrize("wrap", [dict, OrderedDict])
def test_what_torch_saves_is_read(zipped: bool, wrap: type, tmp_path: Path) -> None:
    tensors = sample_tensors()
    path = save(wrap(tensors), tmp_path / "x.bin", zipped)
    assert {n: s.shape for n, s in read_torch_header(path).items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    assert read_bytes(path) == {n: bytes_of(t) for n, t in tensors.items()}


@both_formats
@pytest.mark.parametrize("protocol", [2, 4])
def test_the_state_of_a_module_has_metadata(zipped: bool, protocol: int, tmp_path: Path) -> None:
    state = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.LayerNorm(4)).state_dict()
    assert hasattr(state, "_metadata")
    assert read_bytes(save(state, tmp_path / "x.bin", zipped, protocol)) == {n: bytes_of(t) for n, t in state.items()}


# ----------------------------------------------------------------------------------------------------- hostile pickles


def refused(path: Path, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_torch_header(path)
    assert caught.value.hint and str(caught.value).startswith(f"{path}: ")


class Evil:
    """Pickled as a call of os.mkdir."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.folder),)


@both_formats
@pytest.mark.parametrize("protocol", [2, 4])
def test_code_in_a_file_is_named_and_not_run(zipped: bool, protocol: int, tmp_path: Path) -> None:
    state = {"weight": torch.zeros(2), "extra": Evil(tmp_path / "owned")}
    path = save(state, tmp_path / "x.bin", zipped, protocol)
    refused(path, r"'posix\.mkdir', which is not a tensor and would be run")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(Vopen('owned', 'w')\ntR.",
        b"(Vopen('owned', 'w')\nibuiltins\neval\n.",  # INST
        b"\x80\x02cos\nsystem\nX\x0b\0\0\0touch owned\x85R.",
        b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x0btouch owned\x85R.",  # STACK_GLOBAL
        b"\x80\x02ccollections\nOrderedDict\n)\x81.",  # NEWOBJ of an admitted name
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n}X\x08\0\0\0__code__K\x01sb.",  # BUILD changes a function
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x08\0\0\0__code__K\x01s\x86b.",
        b"\x80\x02ctorch\nHalfStorage\n)R.",
        b"\x82\x01.",  # EXT1
    ],
)
def test_no_instruction_runs_or_changes_anything(
    program: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=r"would be run|damaged pickle|not read"):
        load_pickle(io.BytesIO(program), Path("x.bin"))
    assert list(tmp_path.iterdir()) == []


def test_a_whole_model_is_refused_by_its_class(tmp_path: Path) -> None:
    refused(save(torch.nn.Linear(2, 2), tmp_path / "x.bin"), r"torch\.nn\.modules\.linear\.Linear")


@pytest.mark.parametrize("value", [3, "text", [torch.zeros(1)], {"deeper": torch.zeros(1)}])
def test_values_that_are_not_tensors_are_named(value: object, tmp_path: Path) -> None:
    refused(save({"weight": torch.zeros(2), "step": value}, tmp_path / "x.bin"), "'step' is not a tensor but")


@both_formats
def test_a_tensor_stored_negated_is_refused(zipped: bool, tmp_path: Path) -> None:
    path = save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "x.bin", zipped)
    refused(path, r"a tensor whose bytes are not its values \(\({'neg': True},\)\)")


BOMBS = {
    "a memo of four billion": b"\x80\x02Nr\xff\xff\xff\xff.",
    "a string of four gigabytes": b"\x80\x02X\xff\xff\xff\xff.",
    "a bytearray of an exabyte": b"\x80\x05\x96" + b"\xff" * 8 + b".",
    "a number of four gigabytes": b"\x80\x02\x8b\xff\xff\xff\x7f.",
    "a tower of tuples": b"\x80\x02)" + b"q\x00h\x00\x86" * 5000 + b"}q\x01h\x00h\x00s.",
    "a hash without end": b"\x80\x02ccollections\nOrderedDict\n])q\x01" + b"q\x00h\x00\x86" * 60 + b"N\x86a\x85R.",
    "a long file": b"\x80\x02" + b"}" * (2 << 20) + b".",
}


@pytest.mark.parametrize("name", BOMBS)
@pytest.mark.timeout(30)
def test_a_pickle_cannot_take_memory(name: str) -> None:
    file = io.BytesIO(BOMBS[name])
    tracemalloc.start()
    try:
        load_pickle(file, Path("x.bin"))
    except CheckpointError as error:
        assert error.hint
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 128 << 20


def test_the_file_is_at_the_end_of_the_pickle() -> None:
    file = io.BytesIO(pickle.dumps({"a": [1, (2, None)], "b": True}, 2) + b"rest")
    assert load_pickle(file, Path("x")) == {"a": [1, (2, None)], "b": True}
    assert file.read() == b"rest"


OPCODES = [bytes([code]) for code in b"(0cRQb})]dltusaeN\x85\x86\x87\x88\x89JKMG\x8aX\x8cqr\x94hj\x93\x80\x95."]
WORDS = [b"ccollections\nOrderedDict\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"ctorch\nHalfStorage\n", b"K\x01"]
WORDS += [b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x00k", b"q\x01", b"h\x01", b"K\x00", b"(K\x02t", b")"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(OPCODES + WORDS * 3) | st.binary(min_size=1, max_size=2), max_size=60))
def test_any_program_is_read_or_refused(words: list[bytes]) -> None:
    try:
        load_pickle(io.BytesIO(b"".join(words) + b"."), Path("x.bin"))
    except CheckpointError as error:
        assert str(error).startswith("x.bin: ")


# ------------------------------------------------------------------------------------------------------- damaged files


def repack(path: Path, change: dict[str, bytes | None], compression: int = zipfile.ZIP_STORED) -> Path:
    """Write an archive again with some members replaced or (None) removed, by the end of their name."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            new = next((new for end, new in change.items() if name.endswith(end)), data)
            if new is not None:
                archive.writestr(name, new)
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return save({"w": torch.arange(6.0).reshape(2, 3)}, tmp_path / "x.bin")


def test_an_archive_of_zipfile_is_read_alike(archive: Path) -> None:
    assert read_bytes(archive) == read_bytes(repack(archive, {})) == {"w": bytes_of(torch.arange(6.0))}


def test_a_zip_bomb_is_refused_without_being_opened(archive: Path, tmp_path: Path) -> None:
    refused(repack(archive, {}, zipfile.ZIP_DEFLATED), "compressed or encrypted")
    with zipfile.ZipFile(tmp_path / "bomb.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        bomb.writestr("x/data.pkl", b"\0" * (200 << 20))
    tracemalloc.start()
    refused(tmp_path / "bomb.bin", "compressed or encrypted")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 << 20


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"data/0": b"1234"}, "its storage has 4 bytes instead of 24"),
        ({"data/0": None}, "its storage '0' is missing"),
        ({"byteorder": b"big"}, "big-endian"),
        ({"data.pkl": None}, r"not one of torch's \(0 members named data\.pkl\)"),
        ({"data.pkl": b"\x80\x02}."}, "not a dictionary of tensors"),
    ],
)
def test_a_changed_archive_is_refused(change: dict, match: str, archive: Path) -> None:
    refused(repack(archive, change), match)


@both_formats
@pytest.mark.parametrize("keep", [0.2, 0.6, 0.95])
def test_a_truncated_file_is_refused(zipped: bool, keep: float, tmp_path: Path) -> None:
    path = save({"w": torch.zeros(50)}, tmp_path / "x.bin", zipped)
    raw = path.read_bytes()
    path.write_bytes(raw[: int(len(raw) * keep)])
    refused(path, "truncated archive|damaged pickle|beyond the end")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"GGUF....", "neither a torch archive nor a pickle"),
        (pickle.dumps({"w": 1}, 2), r"not of a model that torch\.save wrote"),
    ],
)
def test_other_files_are_refused(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "x.bin").write_bytes(content)
    refused(tmp_path / "x.bin", match)


@settings(max_examples=150, deadline=None)
@given(position=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), zipped=st.booleans())
def test_a_changed_byte_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, position: float, value: int, zipped: bool
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.bin"
    save({"w": torch.zeros(3), "v": torch.ones(2, 2).half()}, path, zipped)
    raw = bytearray(path.read_bytes())
    raw[int(position * len(raw))] = value
    path.write_bytes(raw)
    try:
        specs = read_torch_header(path)
    except CheckpointError:
        return
    for spec in specs.values():
        assert spec.offset >= 0 and spec.offset + spec.nbytes <= len(raw)
