"""What a folder of weights holds, read from its headers: names, types, shapes and where each tensor's bytes lie.

Headers come from the outside and are not believed: every length is checked against the file before anything is
allocated by it, and every tensor must lie inside its file, touch its neighbours, and have the bytes its shape asks for.

Format: https://huggingface.co/docs/safetensors/index#format — 8 bytes little-endian length, JSON, data.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard

from llavanext_cli.config.hf_config import JSON_LIMIT, REFETCH
from llavanext_cli.errors import CheckpointError

DTYPE_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Sizes of the element types that are read, under their safetensors names."""
WEIGHT_DTYPES = ("F32", "F16", "BF16")
"""Types a parameter may have."""

HEADER_LIMIT = 1 << 20
"""Bytes. A LLaVA-NeXT of any size needs less than 200 kB; a longer header is a lie or something else."""
AXES_LIMIT = 8
LISTED = 20
"""Most lines of one kind in an error."""

MAY_READ = "It must be a file, and yours to read: ls -lL shows both."
OPEN_MORE = "Allow more open files: ulimit -n 65536."


@dataclass(frozen=True)
class TensorSpec:
    """One tensor in a file. `offset` and `nbytes` are in bytes from the file's start; `strides` (in elements) are given
    when the bytes do not simply follow each other, as pickles allow."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int
    nbytes: int
    strides: tuple[int, ...] | None = None


def cannot_read(path: Path, error: OSError) -> CheckpointError:
    hint = OPEN_MORE if error.errno == errno.EMFILE else MAY_READ
    return CheckpointError(f"{path}: cannot be read ({error.strerror or error})", hint)


def open_regular(path: str | Path) -> BinaryIO:
    """Open for reading. A pipe or a device, which has no end, is an OSError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise OSError(errno.EINVAL, "not a regular file")
    return open(path, "rb")


def read_safetensors_header(path: str | Path) -> dict[str, TensorSpec]:
    """Read and check the header of one safetensors file.

    Returns:
        Name → where its bytes lie, ordered by offset.

    Raises:
        CheckpointError: the file is truncated, or its header is not what the format allows.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            length = int.from_bytes(file.read(8), "little") if size >= 8 else -1
            if length < 0 or 8 + length > size:
                raise _damaged(
                    path, f"{size} bytes cannot hold the header that is announced" if size else "it is empty"
                )
            if length > HEADER_LIMIT:
                raise _damaged(path, f"a header of {length} bytes; at most {HEADER_LIMIT} are read")
            header = file.read(length)
    except OSError as error:
        raise cannot_read(path, error) from error
    return _parse_header(path, header, 8 + length, size)


def _parse_header(path: Path, header: bytes, data_start: int, size: int) -> dict[str, TensorSpec]:
    try:
        entries = json.loads(header.decode("utf-8"), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not JSON ({error})") from error
    if not isinstance(entries, dict):
        raise _damaged(path, "the header is no JSON object")
    entries.pop("__metadata__", None)
    specs = [_parse_entry(path, name, entry, data_start, size) for name, entry in entries.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    end = data_start
    for spec in specs:
        if spec.offset != end:
            what = "overlaps" if spec.offset < end else "leaves a hole behind"
            raise _damaged(path, f"{short(spec.name)} {what} the tensor before it")
        end = spec.offset + spec.nbytes
    if end != size:
        raise _damaged(path, f"{size} bytes, but the header describes {end}")
    return {spec.name: spec for spec in specs}


def _parse_entry(path: Path, name: str, entry: Any, data_start: int, size: int) -> TensorSpec:
    shown = short(name)
    if not isinstance(entry, dict):
        raise _damaged(path, f"{shown}: no object in the header")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BYTES:
        raise CheckpointError(
            f"{path}: {shown}: type {short(dtype)} is not supported; supported: {', '.join(DTYPE_BYTES)}",
            "Take a model in float32, float16 or bfloat16: quantised weights are not turned back.",
        )
    if not are_counts(shape) or len(shape) > AXES_LIMIT:
        raise _damaged(path, f"{shown}: {short(shape)} is no shape")
    if not are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"{shown}: {short(offsets)} are no offsets")
    begin, end = offsets
    if data_start + end > size:
        raise _damaged(path, f"{shown} ends at byte {data_start + end} of a file of {size}: the file is cut short")
    nbytes = count_elements(shape) * DTYPE_BYTES[dtype]
    if nbytes != end - begin:
        raise _damaged(path, f"{shown}: {dtype}{shape} needs {nbytes} bytes, {end - begin} are there")
    return TensorSpec(name, dtype, tuple(shape), path, data_start + begin, nbytes)


def count_elements(shape: Any) -> int:
    count = 1
    for axis in shape:
        count *= axis
    return count


def read_folder(folder: str | Path, left_out: list[tuple[str, str]] | None = None) -> dict[str, TensorSpec]:
    """Read the headers of all weights of a folder: safetensors if there are any, else pickles of torch; one file, or
    the shards that an index names.

    Args:
        left_out: gets (name, reason) of what the files hold beside the weights.

    Raises:
        CheckpointError: there are none, a shard is missing or outside the folder, or index and shards disagree.
    """
    folder = Path(folder)
    for index_name, pattern, read in (
        ("model.safetensors.index.json", "*.safetensors", read_safetensors_header),
        ("pytorch_model.bin.index.json", "pytorch_model*.bin", partial(_read_torch, left_out=left_out)),
    ):
        if (folder / index_name).is_file():
            return _read_indexed(folder, folder / index_name, read)
        if files := sorted(folder.glob(pattern)):
            return join_headers(read(path) for path in files)
    raise CheckpointError(
        f"{folder}: no weights (*.safetensors or pytorch_model*.bin)",
        "Name a Hugging Face folder, such as one that `llavanext fetch` made.",
    )


def _read_torch(path: Path, left_out: list[tuple[str, str]] | None) -> dict[str, TensorSpec]:
    from llavanext_cli.weights.torch_reader import read_torch_header  # it imports this module

    return read_torch_header(path, left_out)


def join_headers(headers: Any) -> dict[str, TensorSpec]:
    """One mapping out of several files'; a name may be in one of them only."""
    specs: dict[str, TensorSpec] = {}
    for header in headers:
        for name, spec in header.items():
            if name in specs:
                raise CheckpointError(
                    f"{short(name)} is in {specs[name].path.name} and in {spec.path.name}",
                    "A folder must hold one model; move the other files away.",
                )
            specs[name] = spec
    return specs


def _read_indexed(folder: Path, index: Path, read: Callable[[Path], dict[str, TensorSpec]]) -> dict[str, TensorSpec]:
    weight_map = read_weight_map(index)
    files = sorted(set(weight_map.values()))
    single = index.name.removesuffix(".index.json")
    if single not in files and (folder / single).is_file():
        raise CheckpointError(
            f"{folder}: holds {single} and {index.name}; transformers would read the first, and the shards may differ",
            "Move away the one that is not meant.",
        )
    missing = [short(file) for file in files if not os.path.isfile(folder / file)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(files)} shards named in {index.name} are missing",
            "Fetch the folder again: what is already there is not downloaded twice.",
            missing[:LISTED],
        )
    specs = join_headers(read(folder / file) for file in files)
    faults = [
        f"{short(name)}: not in {short(file)}"
        for name, file in weight_map.items()
        if name not in specs or specs[name].path.name != file
    ]
    faults += [f"{short(name)}: in {spec.path.name}, but not in the index" for name, spec in specs.items()
               if name not in weight_map]  # fmt: skip
    if faults:
        raise CheckpointError(f"{index}: index and shards disagree on {len(faults)} tensors", REFETCH, faults[:LISTED])
    return specs


def read_weight_map(index: Path) -> dict[str, str]:
    """Read name → file from an index, with files that are plain names inside the index's own folder."""
    data = read_json(index)
    weight_map = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: no weight_map", REFETCH)
    for name, file in weight_map.items():
        if not isinstance(file, str) or file in ("", ".", "..") or Path(file).name != file or "\\" in file:
            raise CheckpointError(f"{index}: {short(name)} lies in {short(file)}, which is outside the folder", REFETCH)
    return weight_map


def read_json(path: Path) -> Any:
    """Read a small JSON file. Raises CheckpointError when it cannot be."""
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{path}: more than {JSON_LIMIT} bytes", REFETCH)
        with open_regular(path) as file:
            return json.loads(file.read().decode())
    except OSError as error:
        raise cannot_read(path, error) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not a JSON file ({error})", REFETCH) from error


def read_object(path: Path) -> dict[str, Any]:
    """The object in a small JSON file; empty when there is no file.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    value = read_json(path) if path.is_file() else {}
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is expected, not {short(value)}", REFETCH)
    return value


def build_header(tensors: Mapping[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str]) -> bytes:
    """The first bytes of a safetensors file whose data follow in the order of `tensors` (name → dtype and shape)."""
    entries: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + count_elements(shape) * DTYPE_BYTES[dtype]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)  # so that the data are aligned
    return len(header).to_bytes(8, "little") + header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name is there twice")
    return result


def are_counts(value: Any) -> TypeGuard[list[int]]:
    # 2**63 bounds each factor, so that a lying shape cannot become a number with a million digits.
    return isinstance(value, list) and all(type(n) is int and 0 <= n < 2**63 for n in value)


def short(value: Any) -> str:
    """A name or value out of a file, in one printable line of at most 120 characters."""
    text = value if isinstance(value, str) else repr(value)
    text = text.encode("unicode_escape").decode() if not text.isprintable() else text
    return text if len(text) <= 120 else text[:117] + "..."


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged safetensors file: {what}", REFETCH)
