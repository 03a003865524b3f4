"""As much of protocol buffers as MindSpore's files need.

Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

VARINT, LENGTH_DELIMITED = 0, 2


def write_varint(value: int) -> bytes:
    """Seven bits a byte, the lowest first."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def write_delimited(field: int, data: bytes) -> bytes:
    """A field of bytes, with its number and length."""
    return write_varint(field << 3 | LENGTH_DELIMITED) + write_varint(len(data)) + data


def read_fields(data: bytes | mmap.mmap, where: range | int | None = None) -> Iterator[tuple[int, int | range]]:
    """The fields of one message: number, and a signed number or the range of `data` that holds the field's bytes.

    Args:
        where: the message's own range; None for all of `data`.

    Raises:
        ValueError: the message is damaged, or has a kind of field that MindSpore's messages do not have.
    """
    where = range(len(data)) if where is None else as_range(where)
    at = where.start
    while at < where.stop:
        key, at = _read_varint(data, at, where.stop)
        value, at = _read_varint(data, at, where.stop)
        if key & 7 == LENGTH_DELIMITED:
            if at + value > where.stop:
                raise ValueError("a field ends after the end of its message")
            yield key >> 3, range(at, at + value)
            at += value
        elif key & 7 == VARINT:
            yield key >> 3, _signed(value)
        else:
            raise ValueError(f"a field of kind {key & 7}")


def as_range(value: int | range) -> range:
    """The value of a field that must hold bytes.

    Raises:
        ValueError: it is a number.
    """
    if isinstance(value, int):
        raise ValueError("a number instead of a message")
    return value


def read_bytes(data: bytes | mmap.mmap, value: int | range) -> bytes:
    """The bytes of a field."""
    where = as_range(value)
    return data[where.start : where.stop]


def read_numbers(data: bytes | mmap.mmap, where: int | range, field: int) -> list[int]:
    """The numbers of a repeated field of a message, packed into one field or not."""
    numbers: list[int] = []
    for number, value in read_fields(data, where):
        if number != field:
            continue
        if isinstance(value, int):
            numbers.append(value)
            continue
        at = value.start
        while at < value.stop:
            one, at = _read_varint(data, at, value.stop)
            numbers.append(_signed(one))
    return numbers


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _read_varint(data: bytes | mmap.mmap, at: int, end: int) -> tuple[int, int]:
    value = 0
    for position in range(at, min(at + 10, end)):
        byte = data[position]
        value |= (byte & 0x7F) << 7 * (position - at)
        if byte < 0x80:
            return value & (1 << 64) - 1, position + 1
    raise ValueError("an unfinished number")
