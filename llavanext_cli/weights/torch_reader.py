"""Where the tensors of a torch `.bin` file lie, without torch and without running what is in it.

Two formats are read. Since torch 1.6 a file is a zip archive whose members are stored, not compressed, so each storage
is a plain run of bytes:

    NAME/data.pkl        the dictionary, naming storages by key        NAME/data/0, /1, …   the storages

Before, it was a chain of pickles followed by the storages: magic number, version, facts about the writer's machine, the
dictionary, the list of keys, and for each key an int64 with its length and its bytes.
"""

from __future__ import annotations

import io
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from llavanext_cli.config.hf_config import REFETCH
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.headers import DTYPE_BYTES, TensorSpec, cannot_read, count_elements, open_regular, short
from llavanext_cli.weights.pickles import PICKLE_LIMIT, PickleReader, StoredTensor

LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
DIRECTORY_LIMIT = 4 << 20
"""Bytes of a zip archive's list of members. A 7B model's shard has about 400 members of 80 bytes."""
NO_WEIGHTS = "Name a folder with *.safetensors or *.bin weights."
BESIDE = "saved beside state_dict, of which alone the model is made"
SAVE_AGAIN = "Save the model as safetensors with the program that made it."


@dataclass(frozen=True)
class Member:
    """A member of a zip archive: where its bytes lie in the file."""

    name: str
    offset: int
    nbytes: int


def read_torch_header(path: str | Path, left_out: list[tuple[str, str]] | None = None) -> dict[str, TensorSpec]:
    """Find the tensors of a file that torch.save made from a state dict.

    Args:
        left_out: gets (name, reason) of what a trainer saved beside the state dict.

    Returns:
        Name → where its bytes lie, in the dictionary's order.

    Raises:
        CheckpointError: the file is damaged, compressed, or holds anything but tensors.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) == b"PK\x03\x04":
                state, places = _read_zip(path, file, size)
            else:
                file.seek(0)
                state, places = _read_legacy(path, file, size)
    except OSError as error:
        raise cannot_read(path, error) from error
    others = [str(key) for key in state if key != "state_dict"] if _is_wrapped(state) else []
    if others and left_out is not None:
        left_out.append((f"{path.name}: {short(', '.join(others))}", BESIDE))
    return {name: _locate(path, name, tensor, places) for name, tensor in _tensors(path, state)}


def _is_wrapped(state: Any) -> bool:
    return isinstance(state, dict) and isinstance(state.get("state_dict"), dict)


def _tensors(path: Path, state: Any) -> Iterable[tuple[str, StoredTensor]]:
    """The entries of a state dict, also when a trainer wrapped it as {"state_dict": …}."""
    if _is_wrapped(state):
        state = state["state_dict"]
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: holds no dictionary of tensors", NO_WEIGHTS)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, StoredTensor):
            raise CheckpointError(f"{path}: {name!r:.80} is no tensor but {type(value).__name__}", NO_WEIGHTS)
    return state.items()


def _locate(path: Path, name: str, tensor: StoredTensor, places: Mapping[str, tuple[int, int]]) -> TensorSpec:
    storage, size = tensor.storage, DTYPE_BYTES[tensor.storage.dtype]
    if storage.key not in places:
        raise CheckpointError(f"{path}: {short(name)}: its storage {storage.key!r:.60} is missing", REFETCH)
    start, nbytes = places[storage.key]
    if storage.elements * size > nbytes:
        raise CheckpointError(
            f"{path}: {short(name)}: its storage has {nbytes} bytes, {storage.elements * size} are announced", REFETCH
        )
    elements = count_elements(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    if elements and last >= storage.elements:
        raise CheckpointError(f"{path}: {short(name)}: reaches beyond its storage", REFETCH)
    if elements > storage.elements:
        raise CheckpointError(
            f"{path}: {short(name)}: {elements} elements repeat the {storage.elements} that are stored", REFETCH
        )
    strides = None if _is_contiguous(tensor) else tensor.strides
    return TensorSpec(name, storage.dtype, tensor.shape, path, start + tensor.offset * size, elements * size, strides)


def _is_contiguous(tensor: StoredTensor) -> bool:
    step = 1
    for axis, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if axis != 1 and stride != step:
            return False
        step *= axis
    return True


# ---------------------------------------------------------------------------------------------------------- zip archive


def _read_zip(path: Path, file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    members = read_members(path, file, size)
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: an archive, but not one of torch's ({len(pickles)} members named data.pkl)", NO_WEIGHTS
        )
    prefix = pickles[0].removesuffix("data.pkl")
    pickle = members[pickles[0]]
    if pickle.nbytes > PICKLE_LIMIT:
        raise CheckpointError(
            f"{path}: data.pkl has {pickle.nbytes} bytes; at most {PICKLE_LIMIT} are read", NO_WEIGHTS
        )
    order = members.get(f"{prefix}byteorder")
    if order is not None and _member_bytes(file, order, 16) != b"little":
        raise CheckpointError(f"{path}: written on a big-endian machine, which is not supported", SAVE_AGAIN)
    state = PickleReader(io.BytesIO(_member_bytes(file, pickle, PICKLE_LIMIT)), f"{path}").load()
    data = f"{prefix}data/"
    return state, {n.removeprefix(data): (m.offset, m.nbytes) for n, m in members.items() if n.startswith(data)}


def _member_bytes(file: BinaryIO, member: Member, limit: int) -> bytes:
    file.seek(member.offset)
    return file.read(min(member.nbytes, limit))


def read_members(path: Path, file: BinaryIO, size: int) -> dict[str, Member]:
    """Read a zip archive's list of members (PKWARE APPNOTE 4.3, with zip64).

    Python's zipfile would believe the sizes in it. Here members must be stored as they are, lie inside the file and not
    overlap, which is how torch writes them and what a zip bomb cannot be.
    """
    count, start, length = _find_directory(path, file, size)
    if length > DIRECTORY_LIMIT or start + length > size or count * 46 > length:
        raise _broken(path, "its list of members lies outside the file or is too long")
    file.seek(start)
    directory = file.read(length)
    members: dict[str, Member] = {}
    at = 0
    for _ in range(count):
        if directory[at : at + 4] != b"PK\x01\x02" or at + 46 > length:
            raise _broken(path, "its list of members is damaged")
        flags, method = struct.unpack_from("<HH", directory, at + 8)
        packed, plain = struct.unpack_from("<II", directory, at + 20)
        names, extras, comments = struct.unpack_from("<HHH", directory, at + 28)
        (local,) = struct.unpack_from("<I", directory, at + 42)
        name = directory[at + 46 : at + 46 + names].decode("utf-8", "replace")
        extra = directory[at + 46 + names : at + 46 + names + extras]
        plain, packed, local = _widen(path, extra, plain, packed, local)
        at += 46 + names + extras + comments
        if method != 0 or flags & 1 or packed != plain:
            raise _broken(path, f"{name!r:.80} is compressed or encrypted, and torch stores members as they are")
        if name in members:
            raise _broken(path, f"{name!r:.80} is there twice")
        members[name] = Member(name, _data_start(path, file, size, local, name), plain)
    end = 0
    for member in sorted(members.values(), key=lambda m: (m.offset, m.nbytes)):
        if member.offset < end or member.offset + member.nbytes > size:
            raise _broken(path, f"{member.name!r:.80} overlaps another member or the end of the file")
        end = member.offset + member.nbytes
    return members


def _find_directory(path: Path, file: BinaryIO, size: int) -> tuple[int, int, int]:
    """Number of members, and offset and length of their list."""
    tail_start = max(0, size - 65557)
    file.seek(tail_start)
    tail = file.read(65557)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or at + 22 > len(tail):
        raise _broken(path, "its end is missing: the file is cut short")
    count, length, start = struct.unpack_from("<HII", tail, at + 10)
    locator = at - 20
    if locator >= 0 and tail[locator : locator + 4] == b"PK\x06\x07":
        (where,) = struct.unpack_from("<Q", tail, locator + 8)
        if where + 56 > size:
            raise _broken(path, "its list of members lies outside the file")
        file.seek(where)
        record = file.read(56)
        if len(record) < 56 or record[:4] != b"PK\x06\x06":
            raise _broken(path, "its list of members is damaged")
        count, length, start = struct.unpack_from("<QQQ", record, 32)
    return count, start, length


def _widen(path: Path, extra: bytes, plain: int, packed: int, local: int) -> tuple[int, int, int]:
    """Replace the 32-bit sizes that say "too large" by those of the zip64 field, in its fixed order."""
    values = [plain, packed, local]
    at = 0
    while at + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, at)
        if kind == 1:
            field, position = extra[at + 4 : at + 4 + length], 0
            for index, value in enumerate(values):
                if value == 0xFFFFFFFF:
                    if position + 8 > len(field):
                        raise _broken(path, "a member's size is damaged")
                    (values[index],) = struct.unpack_from("<Q", field, position)
                    position += 8
        at += 4 + length
    return values[0], values[1], values[2]


def _data_start(path: Path, file: BinaryIO, size: int, local: int, name: str) -> int:
    """A member's bytes begin behind its local header, whose own extra field pads them to an aligned offset."""
    if local + 30 > size:
        raise _broken(path, f"{name!r:.80} lies outside the file")
    file.seek(local)
    header = file.read(30)
    if header[:4] != b"PK\x03\x04":
        raise _broken(path, f"{name!r:.80} is not where the list says")
    names: int
    extras: int
    names, extras = struct.unpack_from("<HH", header, 26)
    return local + 30 + names + extras


def _broken(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: damaged archive: {what}", REFETCH)


# --------------------------------------------------------------------------------------------------------------- legacy


def _read_legacy(path: Path, file: BinaryIO, size: int) -> tuple[Any, dict[str, tuple[int, int]]]:
    if file.read(1) != b"\x80":
        raise CheckpointError(
            f"{path}: neither a torch archive nor a pickle of torch",
            NO_WEIGHTS,
        )
    file.seek(0)
    reader = PickleReader(file, str(path))
    if reader.load() != LEGACY_MAGIC or reader.load() != LEGACY_VERSION:
        raise CheckpointError(f"{path}: a pickle, but not one that torch.save made of a model", NO_WEIGHTS)
    machine = reader.load()
    if isinstance(machine, dict) and machine.get("little_endian") is False:
        raise CheckpointError(f"{path}: written on a big-endian machine, which is not supported", SAVE_AGAIN)
    state, keys = reader.load(), reader.load()
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise CheckpointError(f"{path}: the list of storages is damaged", REFETCH)
    sizes = {t.storage.key: DTYPE_BYTES[t.storage.dtype] for _, t in _tensors(path, state)}
    places = {}
    for key in keys:
        length = int.from_bytes(file.read(8), "little", signed=True)
        nbytes = length * sizes.get(key, 0)
        if length < 0 or key not in sizes or file.tell() + nbytes > size:
            raise CheckpointError(f"{path}: storage {key!r:.60} reaches beyond the end of the file", REFETCH)
        places[key] = (file.tell(), nbytes)
        file.seek(nbytes, os.SEEK_CUR)
    return state, places
