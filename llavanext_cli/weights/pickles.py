"""A reader for the pickles that torch.save writes for a dictionary of tensors, and for nothing else.

A pickle is a program. Python's own `pickle` runs it: it imports what the file names and calls it. This reader runs the
instructions that such a dictionary needs, builds its own inert values, and stops at anything else by name. Nothing is
imported, and no length is believed before it is compared with the file.

Instructions: https://github.com/python/cpython/blob/main/Lib/pickletools.py
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

from llavanext_cli.config.hf_config import REFETCH
from llavanext_cli.errors import CheckpointError
from llavanext_cli.weights.headers import AXES_LIMIT

PICKLE_LIMIT = 4 << 20
"""Bytes of one pickle. That of a 7B model is about 100 kB ..."""
STEP_LIMIT = 400_000
"""... and takes 30 000 instructions, each of which can make one small value."""
TEXT_LIMIT = 1 << 16

STORAGE_DTYPES = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}


@dataclass(frozen=True)
class Storage:
    """A run of elements somewhere else in the file, named by its key."""

    key: str
    dtype: str
    elements: int


@dataclass(frozen=True)
class StoredTensor:
    """A view of a storage: `offset` and `strides` count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class _Name(str):
    """An admitted global: "module.name"."""


class _Mark:
    """Where the arguments of an instruction begin on the stack."""


_MARK = _Mark()


class Unreadable(Exception):
    """Why a pickle was refused; the caller adds the file's name."""


def _rebuild_tensor(arguments: tuple[Any, ...]) -> StoredTensor:
    """torch._utils._rebuild_tensor(storage, storage_offset, size, stride) and its later forms, which add flags."""
    if len(arguments) < 4 or not isinstance(arguments[0], Storage):
        raise Unreadable("a tensor without a storage")
    if any(arguments[6:]):  # marks such as neg and conj: the bytes are not the values
        raise Unreadable(f"a tensor whose bytes mean something else ({repr(arguments[6:])[:80]})")
    storage, offset, shape, strides = arguments[:4]
    if len(shape) > AXES_LIMIT:
        raise Unreadable(f"a tensor of {len(shape)} axes")
    shape, strides = tuple(shape), tuple(strides)
    numbers = (offset, *shape, *strides)
    if len(shape) != len(strides) or not all(type(n) is int and 0 <= n < 2**63 for n in numbers):
        raise Unreadable("a tensor whose shape or strides are no numbers")
    return StoredTensor(storage, offset, shape, strides)


def _rebuild_parameter(arguments: tuple[Any, ...]) -> StoredTensor:
    if not arguments or not isinstance(arguments[0], StoredTensor):
        raise Unreadable("a parameter that is no tensor")
    return arguments[0]


def _ordered_dict(arguments: tuple[Any, ...]) -> dict[Any, Any]:
    if arguments not in ((), ([],)):
        raise Unreadable("an OrderedDict with content that is not set one by one")
    return {}


ADMITTED: dict[str, Callable[[tuple[Any, ...]], Any] | None] = {
    "collections.OrderedDict": _ordered_dict,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.Size": lambda arguments: tuple(arguments[0]) if arguments else (),
} | {f"torch.{storage}": None for storage in STORAGE_DTYPES}
"""The globals a pickle may name, and what calling them means. Storages are named, never called."""


def _fill(target: dict[Any, Any], values: list[Any]) -> dict[Any, Any]:
    """Set keys and values in turn. Hashing a tuple could take for ever: it may hold itself many times."""
    for key, value in zip(values[::2], values[1::2], strict=True):
        if type(key) not in (str, int):
            raise Unreadable(f"a dictionary with a {type(key).__name__} for a key")
        target[key] = value
    return target


class PickleReader:
    """Reads pickles, one after the other, from where `file` stands.

    Args:
        file: a binary file; after `load` it stands behind the pickle.
        where: the file's name, for messages.
    """

    def __init__(self, file: BinaryIO, where: str):
        self.file, self.where = file, where
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.left = PICKLE_LIMIT

    def load(self) -> Any:
        """Run one pickle.

        Returns:
            Dicts, lists, tuples, strings, numbers, None, and `StoredTensor`s.

        Raises:
            CheckpointError: it needs something that a dictionary of tensors does not.
        """
        self.stack, self.memo, self.left = [], {}, PICKLE_LIMIT
        try:
            for _ in range(STEP_LIMIT):
                code = self._read(1)
                if code == b".":
                    return self._pop()
                action = _ACTIONS.get(code)
                if action is None:
                    raise Unreadable(f"instruction {code!r}, which no dictionary of tensors needs")
                action(self)
            raise Unreadable("more values than a model has")
        except Unreadable as reason:
            raise CheckpointError(
                f"{self.where}: not read, because it holds {reason}",
                "Only dictionaries of tensors are read from pickles. Save the model as safetensors where you trust it.",
            ) from None
        except (IndexError, KeyError, TypeError, ValueError, struct.error) as error:
            raise CheckpointError(f"{self.where}: damaged pickle ({type(error).__name__})", REFETCH) from error

    # ------------------------------------------------------------------------------------------------- bytes and stack

    def _read(self, count: int) -> bytes:
        if count > self.left:
            raise Unreadable(f"a pickle of more than {PICKLE_LIMIT} bytes")
        data = self.file.read(count)
        if len(data) != count:
            raise Unreadable("an unfinished pickle: the file is cut short")
        self.left -= count
        return data

    def _line(self) -> str:
        data = self.file.readline(TEXT_LIMIT)
        if not data.endswith(b"\n") or len(data) > self.left:
            raise Unreadable("an unfinished line of text")
        self.left -= len(data)
        return data[:-1].decode("utf-8", "replace")

    def _text(self, count: int) -> str:
        if count > TEXT_LIMIT:
            raise Unreadable(f"a text of {count} bytes")
        return self._read(count).decode("utf-8", "replace")

    def _pop(self) -> Any:
        value = self.stack.pop()
        if value is _MARK:
            raise Unreadable("a misplaced mark")
        return value

    def _since_mark(self) -> list[Any]:
        values = []
        while (value := self.stack.pop()) is not _MARK:
            values.append(value)
        values.reverse()
        return values

    def _top(self, kind: type) -> Any:
        value = self.stack[-1]
        if not isinstance(value, kind):
            raise Unreadable(f"content for a {type(value).__name__}, which has none")
        return value

    # ---------------------------------------------------------------------------------------------------- instructions

    def _protocol(self) -> None:
        if self._read(1)[0] > 5:
            raise Unreadable("a newer pickle protocol")

    def _frame(self) -> None:
        self._read(8)  # a frame's length is a hint for readers that buffer

    def _global(self) -> None:
        self._admit(f"{self._line()}.{self._line()}")

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._admit(f"{module}.{name}")

    def _admit(self, name: str) -> None:
        if name not in ADMITTED:
            raise Unreadable(f"{name!r:.120}, which is not a tensor and would be run")
        self.stack.append(_Name(name))

    def _reduce(self) -> None:
        arguments, function = self._pop(), self._pop()
        action = ADMITTED.get(function) if isinstance(function, _Name) else None
        if action is None or not isinstance(arguments, tuple):
            raise Unreadable("a call of something that is no function")
        self.stack.append(action(arguments))

    def _persistent(self) -> None:
        """('storage', its class, its key, a device, its length); the legacy format adds a view, always None here."""
        reference = self._pop()
        if not isinstance(reference, tuple) or len(reference) not in (5, 6) or reference[0] != "storage":
            raise Unreadable("a reference to something that is no storage")
        kind, key, elements = reference[1], reference[2], reference[4]
        dtype = STORAGE_DTYPES.get(kind.removeprefix("torch.")) if isinstance(kind, _Name) else None
        if dtype is None or not isinstance(key, str) or type(elements) is not int or not 0 <= elements < 2**63:
            raise Unreadable("a storage of an unknown type")
        if len(reference) == 6 and reference[5] is not None:
            raise Unreadable("a storage that is a view of another")
        self.stack.append(Storage(key, dtype, elements))

    def _build(self) -> None:
        """The state of a dictionary (its `_metadata`) is put on it by torch; nothing here needs it."""
        self._pop()
        self._top(dict)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        _fill(self._top(dict), [key, value])

    def _set_items(self) -> None:
        values = self._since_mark()
        _fill(self._top(dict), values)

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def _dict(self) -> None:
        self.stack.append(_fill({}, self._since_mark()))

    def _long(self, count: int) -> None:
        if count > 16:  # sys_info of the legacy format holds a 10-byte number; sizes need 9
            raise Unreadable(f"a number of {count} bytes")
        self.stack.append(int.from_bytes(self._read(count), "little", signed=True))

    def _put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def _unpack(self, form: str) -> int:
        number: int
        (number,) = struct.unpack(form, self._read(struct.calcsize(form)))
        return number


_ACTIONS: dict[bytes, Callable[[PickleReader], Any]] = {
    b"\x80": PickleReader._protocol,
    b"\x95": PickleReader._frame,
    b"(": lambda r: r.stack.append(_MARK),
    b"0": lambda r: r._pop(),
    b"c": PickleReader._global,
    b"\x93": PickleReader._stack_global,
    b"R": PickleReader._reduce,
    b"Q": PickleReader._persistent,
    b"b": PickleReader._build,
    b"}": lambda r: r.stack.append({}),
    b"]": lambda r: r.stack.append([]),
    b")": lambda r: r.stack.append(()),
    b"d": PickleReader._dict,
    b"l": lambda r: r.stack.append(r._since_mark()),
    b"t": lambda r: r.stack.append(tuple(r._since_mark())),
    b"\x85": lambda r: r._tuple(1),
    b"\x86": lambda r: r._tuple(2),
    b"\x87": lambda r: r._tuple(3),
    b"s": PickleReader._set_item,
    b"u": PickleReader._set_items,
    b"a": PickleReader._append,
    b"e": PickleReader._appends,
    b"N": lambda r: r.stack.append(None),
    b"\x88": lambda r: r.stack.append(True),
    b"\x89": lambda r: r.stack.append(False),
    b"J": lambda r: r.stack.append(r._unpack("<i")),
    b"K": lambda r: r.stack.append(r._unpack("<B")),
    b"M": lambda r: r.stack.append(r._unpack("<H")),
    b"G": lambda r: r.stack.append(r._unpack(">d")),
    b"\x8a": lambda r: r._long(r._unpack("<B")),
    b"X": lambda r: r.stack.append(r._text(r._unpack("<I"))),
    b"\x8c": lambda r: r.stack.append(r._text(r._unpack("<B"))),
    b"q": lambda r: r._put(r._unpack("<B")),
    b"r": lambda r: r._put(r._unpack("<I")),
    b"\x94": lambda r: r._put(len(r.memo)),
    b"h": lambda r: r.stack.append(r.memo[r._unpack("<B")]),
    b"j": lambda r: r.stack.append(r.memo[r._unpack("<I")]),
}
