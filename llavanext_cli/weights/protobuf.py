"""As much of protocol buffers as MindSpore's files need.

Encoding: https://protobuf.dev/programming-guides/encoding/
"""

from __future__ import annotations

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


def read_fields(data: bytes | memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """The fields of one message: number and value, an int (as a signed 64-bit number) or the field's bytes.

    Raises:
        ValueError: the message is damaged or has kinds of fields that MindSpore's messages have not.
    """
    view, at = memoryview(data), 0
    while at < len(view):
        key, at = _varint(view, at)
        if key & 7 == VARINT:
            value, at = _varint(view, at)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
        elif key & 7 == LENGTH_DELIMITED:
            length, at = _varint(view, at)
            if at + length > len(view):
                raise ValueError("a field ends behind its message")
            yield key >> 3, view[at : at + length]
            at += length
        else:
            raise ValueError(f"a field of kind {key & 7}")


def content(value: int | memoryview) -> memoryview:
    """The bytes of a field that must have some.

    Raises:
        ValueError: it is a number.
    """
    if isinstance(value, int):
        raise ValueError("a number in place of a message")
    return value


def read_numbers(data: int | memoryview, field: int) -> list[int]:
    """The numbers of a repeated field of a message, packed into one field or not."""
    numbers: list[int] = []
    for number, value in read_fields(content(data)):
        if number != field:
            continue
        if isinstance(value, int):
            numbers.append(value)
            continue
        at = 0
        while at < len(value):
            one, at = _varint(value, at)
            numbers.append(one - (1 << 64) if one >> 63 else one)
    return numbers


def _varint(view: memoryview, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(view):
            raise ValueError("a number that does not end")
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value & (1 << 64) - 1, at
    raise ValueError("a number that does not end")
