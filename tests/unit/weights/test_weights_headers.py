"""Headers from the outside: what is damaged is refused by name, and nothing is allocated by a number in a file."""

from __future__ import annotations

import errno
import json
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.headers import (
    HEADER_LIMIT,
    build_header,
    cannot_read,
    read_folder,
    read_safetensors_header,
    read_weight_map,
)


def write_raw(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def entry(begin: int, end: int, dtype: str = "F32", shape: list | None = None) -> dict:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


def test_a_header_of_safetensors_own_is_read(tmp_path: Path) -> None:
    tensors = {
        "b": np.arange(6, dtype=np.float32).reshape(2, 3),
        "a": np.zeros((3,), np.float16),
        "z": np.zeros((0, 4)),
    }
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    specs = read_safetensors_header(tmp_path / "x.safetensors")
    assert {n: (s.dtype, s.shape) for n, s in specs.items()} == {
        "b": ("F32", (2, 3)),
        "a": ("F16", (3,)),
        "z": ("F64", (0, 4)),
    }
    raw = (tmp_path / "x.safetensors").read_bytes()
    assert raw[specs["b"].offset :][: specs["b"].nbytes] == tensors["b"].tobytes()


def test_our_header_is_read_by_safetensors(tmp_path: Path) -> None:
    header = build_header({"w": ("F32", (2, 2)), "h": ("F16", (3,))}, {"format": "ms"})
    assert len(header) % 8 == 0
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + np.arange(4, dtype=np.float32).tobytes() + np.ones(3, np.float16).tobytes())
    loaded = load_file(path)
    assert loaded["w"].tolist() == [[0, 1], [2, 3]] and loaded["h"].tolist() == [1, 1, 1]


BAD = {
    "empty": (b"", b"", 0, "header is not JSON"),
    "not json": (b"{not json", b"", None, "header is not JSON"),
    "not utf-8": (b'{"\xff": 1}', b"", None, "header is not JSON"),
    "a list": ([], b"", None, "no JSON object"),
    "deep": (b"[" * 50_000, b"", None, "header is not JSON"),
    "a huge number": (b'{"a": ' + b"9" * 9000 + b"}", b"", None, "header is not JSON"),
    "a name twice": (b'{"a": {}, "a": {}}', b"", None, "there twice"),
    "no object": ({"a": 3}, b"", None, "a: no object"),
    "wrong type for its bytes": ({"a": entry(0, 4, "F16", [1])}, b"0000", None, "F16[1] needs 2 bytes, 4 are there"),
    "negative axis": ({"a": entry(0, 4, shape=[-1])}, b"0000", None, "no shape"),
    "a float axis": ({"a": entry(0, 4, shape=[1.0])}, b"0000", None, "no shape"),
    "a true axis": ({"a": entry(0, 4, shape=[True])}, b"0000", None, "no shape"),
    "many axes": ({"a": entry(0, 4, shape=[1] * 9)}, b"0000", None, "no shape"),
    "a shape that overflows": ({"a": entry(0, 4, shape=[2**62, 2**62])}, b"0000", None, "4 are there"),
    "backwards": ({"a": entry(4, 0, shape=[1])}, b"0000", None, "no offsets"),
    "three offsets": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, b"0000", None, "no offsets"),
    "past the end": ({"a": entry(0, 400)}, b"0000", None, "the file is cut short"),
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12, None, "b overlaps the tensor before it"),
    "a hole": ({"a": entry(0, 4), "b": entry(8, 12)}, b"0" * 12, None, "b leaves a hole"),
    "bytes left over": ({"a": entry(0, 4)}, b"0" * 9, None, "but the header describes"),
    "a header longer than the file": ({}, b"", 1 << 40, "cannot hold the header"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    header, data, length, message = BAD[case]
    path = write_raw(tmp_path / "x.safetensors", header, data, length)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path)
    assert message in str(caught.value) and "x.safetensors: damaged" in str(caught.value) and caught.value.hint


def test_too_many_open_files_have_their_own_hint() -> None:
    assert "ulimit -n" in cannot_read(Path("x"), OSError(errno.EMFILE, "Too many open files")).hint
    assert "yours to read" in cannot_read(Path("x"), OSError(errno.EACCES, "Permission denied")).hint


@pytest.mark.parametrize("dtype", ["F4", "F8_E4M3"])
def test_a_quantised_file_is_not_called_damaged(dtype: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 4, dtype)}, b"0000", None)
    with pytest.raises(CheckpointError, match=f"a: type {dtype} is not supported; supported: F64") as caught:
        read_safetensors_header(path)
    assert "damaged" not in str(caught.value) and "float16" in caught.value.hint


@pytest.mark.parametrize("cut", [0, 3, 7, 8, 20, -1])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(100, dtype=np.float32)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="damaged safetensors file"):
        read_safetensors_header(path)


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:  # sparse: takes no space
        file.write((HEADER_LIMIT + 1).to_bytes(8, "little"))
        file.truncate(4 << 30)
    tracemalloc.start()
    with pytest.raises(CheckpointError, match="at most 1048576 are read"):
        read_safetensors_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=400), st.integers(0, 500) | st.none())
def test_any_bytes_are_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, raw: bytes, length: int | None
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(raw if length is None else length.to_bytes(8, "little") + raw)
    check_read_or_refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**70) | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["F32", "BF16", "F16", "BOOL", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 4) | JSON, max_size=3) | JSON,
        "data_offsets": st.lists(st.integers(-4, 64) | JSON, max_size=3) | JSON,
    },
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.text(max_size=3) | st.just("__metadata__"), ENTRY | JSON, max_size=4), st.integers(0, 70))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: dict, data: int) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    check_read_or_refused(write_raw(path, header, b"\0" * data))


def check_read_or_refused(path: Path) -> None:
    try:
        specs = read_safetensors_header(path)
    except CheckpointError:
        return
    size = path.stat().st_size
    end = size - sum(s.nbytes for s in specs.values())
    for spec in specs.values():  # what is accepted tiles the data exactly
        assert spec.offset == end and spec.offset + spec.nbytes <= size
        end += spec.nbytes
    assert end == size


# -------------------------------------------------------------------------------------------------------------- folders


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict | None = None) -> Path:
    folder.mkdir()
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    names = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


ONE = {"a": np.zeros(2, np.float32)}
TWO = {"b": np.zeros(3, np.float32)}


def test_shards_are_joined(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {"1.safetensors": ONE, "2.safetensors": TWO})
    assert {n: s.path.name for n, s in read_folder(folder).items()} == {"a": "1.safetensors", "b": "2.safetensors"}


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {"1.safetensors": ONE, "2.safetensors": TWO})
    (folder / "2.safetensors").unlink()
    with pytest.raises(CheckpointError, match="1 of 2 shards") as caught:
        read_folder(folder)
    assert caught.value.details == ("2.safetensors",)


def test_a_single_file_beside_shards_is_refused(tmp_path: Path) -> None:
    """transformers reads the single file then, and not the shards."""
    folder = write_shards(tmp_path / "m", {"1.safetensors": ONE, "2.safetensors": TWO})
    save_file(ONE | TWO, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"holds model\.safetensors and model\.safetensors\.index\.json"):
        read_folder(folder)


def test_a_list_of_missing_shards_is_cut(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", {"1.safetensors": ONE}, {f"w{i}": f"{i}{'x' * 300}" for i in range(500)})
    with pytest.raises(CheckpointError, match="500 of 500 shards") as caught:
        read_folder(folder)
    assert len(caught.value.details) == 20 and max(map(len, caught.value.details)) == 120


@pytest.mark.parametrize("file", ["../1.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", "c:\\x", 7, None])
def test_an_index_stays_in_its_folder(file: object, tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "1.safetensors")
    folder = write_shards(tmp_path / "m", {"1.safetensors": ONE}, {"a": file})
    with pytest.raises(CheckpointError, match="outside the folder"):
        read_folder(folder)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    shards = {"1.safetensors": ONE, "2.safetensors": TWO}
    swapped = write_shards(tmp_path / "m", shards, {"a": "2.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    with pytest.raises(CheckpointError, match="disagree on 2 tensors") as caught:
        read_folder(swapped)
    assert caught.value.details == ("a: not in 2.safetensors", "c: not in 1.safetensors")
    unlisted = write_shards(tmp_path / "n", {"1.safetensors": ONE | TWO}, {"a": "1.safetensors"})
    with pytest.raises(CheckpointError, match="disagree") as caught:
        read_folder(unlisted)
    assert caught.value.details == ("b: in 1.safetensors, but not in the index",)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    save_file(ONE, tmp_path / "m" / "1.safetensors")
    save_file(ONE, tmp_path / "m" / "2.safetensors")
    with pytest.raises(CheckpointError, match=r"a is in 1\.safetensors and in 2\.safetensors"):
        read_folder(tmp_path / "m")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 9000])
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "i.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"i\.json"):
        read_weight_map(tmp_path / "i.json")


def test_a_folder_without_weights_says_what_is_looked_for(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no weights \(\*\.safetensors or pytorch_model\*\.bin\)"):
        read_folder(tmp_path)
