"""Headers of safetensors files and folders: what is damaged is refused by name."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.readers import read_folder, read_safetensors_header


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


BAD = {
    "empty header": (b"", b"", 0),
    "not JSON": (b"{not json", b"", None),
    "a list": ([], b"", None),
    "deep": (b"[" * 50_000, b"", None),
    "not an object": ({"a": 3}, b"", None),
    "wrong type for its bytes": ({"a": entry(0, 4, "F16", [1])}, b"0000", None),
    "negative axis": ({"a": entry(0, 4, shape=[-1])}, b"0000", None),
    "a shape that overflows": ({"a": entry(0, 4, shape=[2**62, 2**62])}, b"0000", None),
    "past the end": ({"a": entry(0, 400)}, b"0000", None),
    "overlapping": ({"a": entry(0, 8), "b": entry(4, 12)}, b"0" * 12, None),
    "bytes left over": ({"a": entry(0, 4)}, b"0" * 9, None),
    "a header longer than the file": ({}, b"", 1 << 40),
}


@pytest.mark.parametrize("case", BAD)
def test_a_damaged_file_is_refused_by_name(case: str, tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", *BAD[case])
    with pytest.raises(CheckpointError, match=r"x\.safetensors: damaged or truncated .*\(.+\)") as caught:
        read_safetensors_header(path)
    assert "llavanext fetch" in caught.value.hint


@pytest.mark.parametrize("cut", [0, 3, 8, 20, -1])
def test_a_truncated_file_is_refused(cut: int, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(100, dtype=np.float32)}, path)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError, match="damaged or truncated"):
        read_safetensors_header(path)


def test_a_quantised_file_is_not_called_damaged(tmp_path: Path) -> None:
    path = write_raw(tmp_path / "x.safetensors", {"a": entry(0, 4, "F8_E4M3", [4])}, b"0000")
    with pytest.raises(CheckpointError, match="a: type F8_E4M3 is not supported; supported: F64") as caught:
        read_safetensors_header(path)
    assert "quantised weights cannot be converted" in caught.value.hint


@pytest.mark.timeout(60)
def test_a_pipe_or_a_folder_is_not_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe"):
        with pytest.raises(CheckpointError, match=r"cannot be read \(not a regular file\)"):
            read_safetensors_header(path)


# -------------------------------------------------------------------------------------------------------------- folders

ONE = {"a": np.zeros(2, np.float32)}
TWO = {"b": np.zeros(3, np.float32)}
BOTH = {"1.safetensors": ONE, "2.safetensors": TWO}


def write_shards(folder: Path, shards: dict[str, dict[str, np.ndarray]], weight_map: dict | None = None) -> Path:
    folder.mkdir()
    for file, tensors in shards.items():
        save_file(tensors, folder / file)
    names = {name: file for file, tensors in shards.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": names if weight_map is None else weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def refused(folder: Path, match: str) -> tuple[str, ...]:
    with pytest.raises(CheckpointError, match=match) as caught:
        read_folder(folder)
    assert caught.value.hint
    return caught.value.details


def test_shards_are_joined(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", BOTH)
    assert {n: s.path.name for n, s in read_folder(folder).items()} == {"a": "1.safetensors", "b": "2.safetensors"}


def test_missing_shards_are_named(tmp_path: Path) -> None:
    folder = write_shards(tmp_path / "m", BOTH)
    (folder / "2.safetensors").unlink()
    assert refused(folder, "1 of 2 shards") == ("2.safetensors",)
    many = write_shards(tmp_path / "many", {}, {f"w{i}": f"{i}{'x' * 300}" for i in range(500)})
    details = refused(many, "500 of 500 shards")
    assert len(details) == 20 and max(map(len, details)) == 120


def test_a_single_file_beside_shards_is_refused(tmp_path: Path) -> None:
    """transformers reads the single file then, and not the shards."""
    folder = write_shards(tmp_path / "m", BOTH)
    save_file(ONE | TWO, folder / "model.safetensors")
    refused(folder, r"holds model\.safetensors and model\.safetensors\.index\.json")


@pytest.mark.parametrize("file", ["../1.safetensors", "/etc/passwd", "a/b.safetensors", "..", "", 7, None])
def test_an_index_stays_in_its_folder(file: object, tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "1.safetensors")
    refused(write_shards(tmp_path / "m", {"1.safetensors": ONE}, {"a": file}), "outside the folder")


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    swapped = write_shards(tmp_path / "m", BOTH, {"a": "2.safetensors", "b": "2.safetensors", "c": "1.safetensors"})
    details = refused(swapped, "disagree on 2 tensors")
    assert details == ("a: not in 2.safetensors", "c: not in 1.safetensors")
    unlisted = write_shards(tmp_path / "n", {"1.safetensors": ONE | TWO}, {"a": "1.safetensors"})
    assert refused(unlisted, "disagree") == ("b: in 1.safetensors, but not in the index",)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_file(ONE, tmp_path / "1.safetensors")
    save_file(ONE, tmp_path / "2.safetensors")
    refused(tmp_path, r"a is in 1\.safetensors and in 2\.safetensors")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 9000])
def test_a_broken_index_is_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused(tmp_path, r"index\.json: (not a JSON file|no weight_map|expected a JSON object)")


def test_a_folder_without_weights_says_what_is_missing(tmp_path: Path) -> None:
    refused(tmp_path, r"no weights \(\*\.safetensors or pytorch_model\*\.bin\)")
