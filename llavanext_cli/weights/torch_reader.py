"""Where the tensors of a torch `.bin` file are, without torch and without running what is in the file.

Since torch 1.6 such a file is a zip archive whose members are stored, not compressed, so each storage is a plain run of
bytes:

    NAME/data.pkl        the dictionary, naming storages by key        NAME/data/0, /1, …   the storages

Before, it was a chain of pickles followed by the storages: magic number, version, facts about the writer's machine, the
dictionary, the list of keys, and for each key an int64 with its number of elements and its bytes.

A pickle names functions to import and call. Here each name gets its entry in `_ADMITTED`, which builds a plain value;
any other name ends the reading.
"""

from __future__ import annotations

import io
import math
import os
import pickle
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, NamedTuple

from llavanext_cli.config.model_folder import REFETCH
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.tensors import DTYPE_BYTES, TensorSpec
from llavanext_cli.weights.untrusted import cannot_read, open_regular, short

PICKLE_LIMIT = 1 << 20
"""Bytes of one pickle. That of a 7B model has about 100 kB."""
AXES_LIMIT = 8
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
LEGACY_VERSION = 1001
NO_WEIGHTS = "name a folder with *.safetensors or *.bin weights"
SAVE_AGAIN = "save the model as safetensors with the program that wrote it"

Places = Mapping[str, tuple[int, int]]
"""Key of a storage → offset and length of its bytes in the file."""


# -------------------------------------------------------------------------------------------------------------- pickles
#
# A pickle can set attributes on every object that it gets. Named tuples have none that can be set.


class _Function(NamedTuple):
    """What a pickle gets in the place of a function or class."""

    build: Callable[..., Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.build(*arguments)


class _StorageType(NamedTuple):
    """A class of storages, such as torch.HalfStorage. It is named, never called."""

    dtype: str


class _Storage(NamedTuple):
    """A run of elements elsewhere in the file, named by its key."""

    key: str
    dtype: str
    elements: int


class _StoredTensor(NamedTuple):
    """A view of a storage: `offset` and `strides` count elements."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _StateDict(dict[Any, Any]):
    __slots__ = ()

    def __setitem__(self, key: Any, value: Any) -> None:
        if type(key) not in (str, int):  # hashing a tuple that holds itself many times would take for ever
            raise pickle.UnpicklingError(f"a dictionary with a {type(key).__name__} for a key")
        super().__setitem__(key, value)

    def __setstate__(self, state: Any) -> None:
        """torch sets `_metadata`, which conversion does not need."""


def _rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *flags: Any) -> _StoredTensor:
    """torch._utils._rebuild_tensor and _rebuild_tensor_v2; `flags` are requires_grad, hooks, and marks such as neg."""
    if any(flags[2:]):
        raise pickle.UnpicklingError(f"a tensor whose bytes are not its values ({flags[2:]!r:.80})")
    if len(shape) > AXES_LIMIT:
        raise pickle.UnpicklingError(f"a tensor of {len(shape)} axes")
    shape, strides = tuple(shape), tuple(strides)
    valid = isinstance(storage, _Storage) and len(shape) == len(strides)
    if not valid or not all(map(_is_count, (offset, *shape, *strides))):
        raise pickle.UnpicklingError("a tensor with an invalid storage, shape or strides")
    return _StoredTensor(storage, offset, shape, strides)


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63


_ADMITTED: dict[str, _Function | _StorageType] = {
    "collections.OrderedDict": _Function(lambda *_: _StateDict()),
    "torch._utils._rebuild_tensor": _Function(_rebuild_tensor),
    "torch._utils._rebuild_tensor_v2": _Function(_rebuild_tensor),
    "torch._utils._rebuild_parameter": _Function(lambda tensor, *_: tensor),
    "torch.Size": _Function(tuple),
    "torch.DoubleStorage": _StorageType("F64"),
    "torch.FloatStorage": _StorageType("F32"),
    "torch.HalfStorage": _StorageType("F16"),
    "torch.BFloat16Storage": _StorageType("BF16"),
    "torch.LongStorage": _StorageType("I64"),
    "torch.IntStorage": _StorageType("I32"),
    "torch.ShortStorage": _StorageType("I16"),
    "torch.CharStorage": _StorageType("I8"),
    "torch.ByteStorage": _StorageType("U8"),
    "torch.BoolStorage": _StorageType("BOOL"),
}


_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP, pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1, pickle.BINFLOAT),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE),
    *(pickle.EMPTY_LIST, pickle.LIST, pickle.APPEND, pickle.APPENDS, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3),
    *(pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID),
)
"""What torch.save needs. The others include some that reserve as much memory as the file asks for."""


def _load_empty_dict(unpickler: Any) -> None:
    unpickler.append(_StateDict())


class _Unpickler(pickle._Unpickler):
    """Python's own, not the faster one in C: here the instructions can be chosen."""

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = {
        **{code[0]: pickle._Unpickler.dispatch[code[0]] for code in _INSTRUCTIONS},
        pickle.EMPTY_DICT[0]: _load_empty_dict,
    }

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if full not in _ADMITTED:
            raise pickle.UnpicklingError(f"{full!r:.120}, which is not a tensor and would be run")
        return _ADMITTED[full]

    def persistent_load(self, reference: Any) -> _Storage:
        """("storage", its class, its key, a device, its elements); the legacy format adds a view, always None here."""
        kind, storage_type, key, _, elements, *view = reference
        valid = kind == "storage" and isinstance(storage_type, _StorageType) and isinstance(key, str)
        if not valid or not _is_count(elements) or view not in ([], [None]):
            raise pickle.UnpicklingError("an invalid storage")
        return _Storage(key, storage_type.dtype, elements)


def load_pickle(file: BinaryIO, path: Path) -> Any:
    """Read one pickle of dictionaries and tensors; afterwards `file` is at the pickle's end.

    Raises:
        CheckpointError: it is damaged or too large, or names anything but tensors.
    """
    start = file.tell()
    stream = io.BytesIO(file.read(PICKLE_LIMIT))
    try:
        value = _Unpickler(stream).load()
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: not read, because it holds {error}",
            "only dictionaries of tensors are read from pickles; if you trust "
            "the file, load it with torch and save it as safetensors",
        ) from None
    except Exception as error:  # a damaged pickle can raise nearly anything
        raise CheckpointError(
            f"{path}: damaged pickle, or larger than {PICKLE_LIMIT} bytes ({type(error).__name__})", REFETCH
        ) from error
    file.seek(start + stream.tell())
    return value


# ---------------------------------------------------------------------------------------------------------------- files


def read_torch_header(path: str | Path) -> dict[str, TensorSpec]:
    """Find the tensors of a file that torch.save wrote from a state dict.

    Returns:
        Name → where its bytes are, in the dictionary's order.

    Raises:
        CheckpointError: the file is damaged, compressed, or holds anything but tensors.
    """
    path = Path(path)
    try:
        with open_regular(path) as file:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            state, places = (_read_zip if zipped else _read_legacy)(file, path)
    except OSError as error:
        raise cannot_read(path, error) from error
    return {name: _locate(path, name, tensor, places) for name, tensor in state.items()}


def _load_state(file: BinaryIO, path: Path) -> dict[str, _StoredTensor]:
    """The pickle of a state dict."""
    state = load_pickle(file, path)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path}: not a dictionary of tensors", NO_WEIGHTS)
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, _StoredTensor):
            raise CheckpointError(f"{path}: {name!r:.80} is not a tensor but {type(value).__name__}", NO_WEIGHTS)
    return state


def _locate(path: Path, name: str, tensor: _StoredTensor, places: Places) -> TensorSpec:
    storage, size = tensor.storage, DTYPE_BYTES[tensor.storage.dtype]
    elements = math.prod(tensor.shape)
    last = tensor.offset + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.strides, strict=True))
    start, nbytes = places.get(storage.key, (0, 0))
    fault = ""
    if storage.key not in places:
        fault = f"its storage {storage.key!r:.60} is missing"
    elif storage.elements * size > nbytes:
        fault = f"its storage has {nbytes} bytes instead of {storage.elements * size}"
    elif elements and last >= storage.elements:
        fault = "it reaches beyond its storage"
    elif elements > storage.elements:
        fault = f"{elements} elements repeat the {storage.elements} that are stored"
    if fault:
        raise CheckpointError(f"{path}: {short(name)}: {fault}", REFETCH)
    strides = None if _is_contiguous(tensor) else tensor.strides
    return TensorSpec(name, storage.dtype, tensor.shape, path, start + tensor.offset * size, elements * size, strides)


def _is_contiguous(tensor: _StoredTensor) -> bool:
    step = 1
    for axis, stride in zip(reversed(tensor.shape), reversed(tensor.strides), strict=True):
        if axis != 1 and stride != step:
            return False
        step *= axis
    return True


def _read_zip(file: BinaryIO, path: Path) -> tuple[dict[str, _StoredTensor], Places]:
    try:
        with zipfile.ZipFile(file) as archive:
            members = {info.filename: _place_member(file, info) for info in archive.infolist()}
    except (zipfile.BadZipFile, ValueError, NotImplementedError, OverflowError, struct.error) as error:
        raise CheckpointError(f"{path}: damaged or truncated archive ({error})", REFETCH) from error
    pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise CheckpointError(
            f"{path}: an archive, but not one of torch's ({len(pickles)} members named data.pkl)", NO_WEIGHTS
        )
    prefix = pickles[0].removesuffix("data.pkl")
    if f"{prefix}byteorder" in members:
        file.seek(members[f"{prefix}byteorder"][0])
        _check_byte_order(path, file.read(6) == b"little")
    file.seek(members[pickles[0]][0])
    state = _load_state(file, path)
    data = f"{prefix}data/"
    return state, {name.removeprefix(data): place for name, place in members.items() if name.startswith(data)}


def _place_member(file: BinaryIO, info: zipfile.ZipInfo) -> tuple[int, int]:
    """Offset and length of a member's bytes, which follow its local header."""
    if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
        raise ValueError(f"{info.filename!r:.80} is compressed or encrypted, and torch stores members as they are")
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    start = info.header_offset + 30 + name + extra
    if start + info.file_size > os.fstat(file.fileno()).st_size:
        raise ValueError(f"{info.filename!r:.80} reaches beyond the end of the file")
    return start, info.file_size


def _check_byte_order(path: Path, little: bool) -> None:
    if not little:
        raise CheckpointError(f"{path}: written on a big-endian machine, which is not supported", SAVE_AGAIN)


def _read_legacy(file: BinaryIO, path: Path) -> tuple[dict[str, _StoredTensor], Places]:
    if file.read(1) != b"\x80":
        raise CheckpointError(f"{path}: neither a torch archive nor a pickle of torch", NO_WEIGHTS)
    file.seek(0)
    if load_pickle(file, path) != LEGACY_MAGIC or load_pickle(file, path) != LEGACY_VERSION:
        raise CheckpointError(f"{path}: a pickle, but not of a model that torch.save wrote", NO_WEIGHTS)
    system = load_pickle(file, path)
    _check_byte_order(path, not isinstance(system, dict) or system.get("little_endian") is not False)
    state, keys = _load_state(file, path), load_pickle(file, path)
    sizes = {t.storage.key: DTYPE_BYTES[t.storage.dtype] for t in state.values()}
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in sizes for key in keys):
        raise CheckpointError(f"{path}: the list of storages is damaged", REFETCH)
    size, places = os.fstat(file.fileno()).st_size, {}
    for key in keys:
        nbytes = int.from_bytes(file.read(8), "little", signed=True) * sizes[key]
        if nbytes < 0 or file.tell() + nbytes > size:
            raise CheckpointError(f"{path}: storage {key!r:.60} reaches beyond the end of the file", REFETCH)
        places[key] = (file.tell(), nbytes)
        file.seek(nbytes, os.SEEK_CUR)
    return state, places
