"""Cuts a data file into chunks of whole records without holding it in memory. Workers then read chunks in parallel.

    [ {..}, {..}, {..},   {..}, {..},   {..} ]          a JSON array of up to a gigabyte, or JSON Lines
     └──── chunk 0 ────┘ └─ chunk 1 ─┘ └ 2 ┘

A cut in an array is guessed from the text between two records, and then proved: `[` + chunk + `]` must parse. A guess
inside a string or a record leaves something open, and the parse fails. msgspec parses; the standard library, which is
slower, takes over where msgspec fails: it accepts lone surrogates and NaN, and knows the position of an error.

One `msgspec.json.Decoder(list[Raw])` over a mapped file would be shorter, but it keeps the whole file resident (744 MiB
where this takes 19), and a file that shrinks meanwhile would kill the process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from llavanext_cli.errors import DataError
from llavanext_cli.records import INVALID_JSON

CHUNK_BYTES = 1 << 21
"""A worker converts a chunk of this size in about ten milliseconds."""

MAX_RECORD_BYTES = 256 << 20
"""A record beyond this means a damaged file."""

_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_FIRST_KEY = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*("(?:[^"\\]|\\.){0,200}")')
_COMMA = re.compile(rb"[ \t\r\n]*,")
_TAIL_BYTES = 1 << 13
_GUESSES = 8
_LIST_HINT = "write its records as a list, [{...}, {...}]; if it has one record a line, name it .jsonl"
_array_of_raw = msgspec.json.Decoder(list[msgspec.Raw])
_line_of_raw = msgspec.json.Decoder(msgspec.Raw)
_scanner = json.JSONDecoder()


@dataclass(frozen=True)
class Chunk:
    """Consecutive whole records of a file.

    Attributes:
        offset: bytes before the chunk.
        length: bytes of the chunk, without the array's brackets and without the comma behind it.
        first: number of the chunk's first record in the file, from 0.
        count: records in the chunk, at least 1.
        line: line of the file in which the chunk starts, from 1.
        lines: whether the file is JSON Lines, one record a line, and not one array.
    """

    offset: int
    length: int
    first: int
    count: int
    line: int
    lines: bool

    def read(self, file: BinaryIO) -> bytes:
        """The chunk's bytes, from a file opened with "rb"."""
        file.seek(self.offset)
        return file.read(self.length)


def index_chunks(path: Path, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Chunk]:
    """Yield the chunks of a `.json` array or a JSON Lines file, in order; memory stays at a few chunks.

    Raises:
        DataError: the file is missing, unreadable, empty, truncated or not JSON; the message has line and column.
    """
    try:
        with path.open("rb") as file:
            place = _Place(path, len(_BOM) if file.read(len(_BOM)) == _BOM else 0)
            file.seek(place.offset)
            while (text := file.read(chunk_bytes)) and not text.strip(_BLANK):
                place.advance(text)
            first = text.lstrip(_BLANK)[:1]
            if not first:
                raise DataError(f"{path}: the file is empty", "download it again: llavanext fetch --list")
            file.seek(place.offset)
            if first == b"[":
                yield from _index_array(file, place, chunk_bytes)
            elif first == b"{":
                if path.suffix == ".json" and not _has_record_lines(file):
                    raise DataError(
                        f"{path}: a .json data set is a list of records, and this file holds one object", _LIST_HINT
                    )
                file.seek(place.offset)
                yield from _index_lines(file, place, chunk_bytes)
            else:
                try:
                    json.loads(file.read(4096))
                except ValueError:
                    raise DataError(f"{place}: this is not JSON", "check that the download is complete") from None
                raise DataError(f"{path}: a data set is a list of records, and this file holds one value", _LIST_HINT)
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "check json_path, or get the data: llavanext fetch"
        ) from error


def split_records(data: bytes, lines: bool) -> list[bytes | msgspec.Raw]:
    """The records of a chunk, still as JSON text."""
    try:
        return _line_of_raw.decode_lines(data) if lines else _array_of_raw.decode(b"[" + data + b"]")
    except INVALID_JSON:
        if lines:
            return [line.strip(_BLANK) for line in data.split(b"\n") if line.strip(_BLANK)]
        return [data[start:end] for start, end in _scan(data)[0]]


def record_lines(data: bytes, records: list[bytes | msgspec.Raw], line: int) -> list[int]:
    """The line in which each record of a chunk starts, where the chunk itself starts in line `line`."""
    numbers, position = [], 0
    for record in records:
        text = bytes(record)
        found = data.find(text, position)
        line += data.count(b"\n", position, found)
        numbers.append(line)
        line += text.count(b"\n")
        position = found + len(text)
    return numbers


def _index_array(file: BinaryIO, place: _Place, chunk_bytes: int) -> Iterator[Chunk]:
    # One buffer for the whole file: a fresh one for each chunk would cost more time than the parser. Its first byte is
    # always the bracket, later in the place of a comma, so that it can be parsed without a copy.
    blanks = file.read(chunk_bytes)
    place.advance(blanks, 0, blanks.index(b"[") + 1)
    file.seek(place.offset)
    text, number = bytearray(b"["), 0
    while more := file.read(chunk_bytes - len(text) if len(text) < chunk_bytes else len(text)):
        text += more
        cut, count = _find_cut(text, place)
        if cut:
            yield Chunk(place.offset, cut - 1, number, count, place.line, lines=False)
            number += count
            place.advance(text, 1, cut + 1)
            text[cut : cut + 1] = b"["
            del text[:cut]
        elif len(text) > MAX_RECORD_BYTES:
            raise DataError(f"{place}: a record of more than {MAX_RECORD_BYTES >> 20} MiB", "the file is damaged")
    end = bytes(text[1:])
    count, length = _check_end(end, place)
    if number and not count:
        raise place.error(end, length, "a record must follow the comma")
    if count:
        yield Chunk(place.offset, length, number, count, place.line, lines=False)


def _find_cut(text: bytearray, place: _Place) -> tuple[int, int]:
    """Position of the comma behind the last whole record, and the records before it; (0, 0) if none is whole yet."""
    # Turns inside a record look like records; the name of the first key distinguishes most of them.
    key = _FIRST_KEY.match(text, 1)
    border = re.compile(rb"\}[ \t\r\n]*(,)[ \t\r\n]*\{[ \t\r\n]*" + (re.escape(key.group(1)) if key else b""))
    for start in (max(1, len(text) - _TAIL_BYTES), 1):
        for cut in [found.start(1) for found in border.finditer(text, start)][: -_GUESSES - 1 : -1]:
            count = _count_records(text, cut)
            if count:
                return cut, count
    spans, position, problem = _scan(text[1:])
    if problem and not spans and position + 32 < len(text) and "Unterminated string" not in problem:
        raise place.error(text[1:], position, problem)
    for count in range(len(spans), 0, -1):
        end = spans[count - 1][1] + 1
        comma = _COMMA.match(text, end)
        if comma:
            return comma.end() - 1, count
    return 0, 0


def _count_records(text: bytearray, cut: int) -> int:
    """Records before `cut`; 0 if that is not where a record ends."""
    text[cut] = ord("]")
    try:
        with memoryview(text) as view, view[: cut + 1] as array:
            return len(_array_of_raw.decode(array))
    except INVALID_JSON:
        return 0
    finally:
        text[cut] = ord(",")


def _check_end(text: bytes, place: _Place) -> tuple[int, int]:
    """Number and length of the records at the end of an array; only the closing bracket may follow them."""
    body = text.rstrip(_BLANK)
    try:
        return len(_array_of_raw.decode(b"[" + body)), len(body) - 1
    except INVALID_JSON:
        spans, position, problem = _scan(text)
    rest = text[position + 1 :].lstrip(_BLANK)
    if rest and not problem:
        position, problem = len(text) - len(rest), "the list has ended, and nothing may follow it"
    if problem or position == len(text):
        raise place.error(text, position, problem)
    return len(spans), position


def _index_lines(file: BinaryIO, place: _Place, chunk_bytes: int) -> Iterator[Chunk]:
    number = 0
    while text := file.read(chunk_bytes) + file.readline():
        count = _count_lines(text, place)
        if count:
            yield Chunk(place.offset, len(text), number, count, place.line, lines=True)
        number += count
        place.advance(text)


def _count_lines(text: bytes, place: _Place) -> int:
    """Number of records in `text`. Raises `DataError` where a line is not exactly one JSON value."""
    lines = text.split(b"\n")
    written = sum(1 for line in lines if line.strip(_BLANK))
    try:
        if len(_line_of_raw.decode_lines(text)) == written:
            return written
    except INVALID_JSON:
        pass
    start = 0
    for line in lines:
        if line.strip(_BLANK):
            spans, position, problem = _scan(line)
            if spans and (len(spans) > 1 or line[spans[0][1] :].strip(_BLANK)):
                rest = line[spans[0][1] :].lstrip(_BLANK)
                position, problem = len(line) - len(rest), "one record a line"
            if problem:
                raise place.error(text, start + position, problem)
        start += len(line) + 1
    return written


def _scan(data: bytes | bytearray) -> tuple[list[tuple[int, int]], int, str]:
    """Byte spans of the elements in `data`, the inside of an array.

    Returns:
        The spans, where the scan stopped, and why if that is an error. At a closing bracket or the end it is not one.
    """
    # latin-1 keeps one character a byte, so that positions are byte positions; the grammar itself is ASCII.
    text = data.decode("latin-1")
    spans: list[tuple[int, int]] = []
    position = _skip_blanks(text, 0)
    while position < len(text) and text[position] != "]":
        try:
            _, end = _scanner.raw_decode(text, position)
        except json.JSONDecodeError as error:
            return spans, error.pos, error.msg
        except RecursionError:
            return spans, position, "nested too deeply"
        spans.append((position, end))
        position = _skip_blanks(text, end)
        if text[position : position + 1] == ",":
            position = _skip_blanks(text, position + 1)
            if text[position : position + 1] == "]":
                return spans, position, "a record must follow the comma"
        elif text[position : position + 1] not in ("", "]"):
            return spans, position, "Expecting ',' delimiter"
    return spans, position, ""


def _skip_blanks(text: str, position: int) -> int:
    while text[position : position + 1] in (" ", "\t", "\r", "\n"):
        position += 1
    return position


def _has_record_lines(file: BinaryIO) -> bool:
    """Whether a file has one object a line. A lone one must be a record or a sample: it may be a config file."""
    try:
        first = json.loads(file.readline())
    except ValueError:
        return False
    is_alone = not file.read(CHUNK_BYTES).strip(_BLANK)
    return isinstance(first, dict) and not (is_alone and "conversations" not in first and "turns" not in first)


class _Place:
    """A position in a file: offset in bytes; line and column from 1 (columns count bytes)."""

    def __init__(self, path: Path, offset: int):
        self.path, self.offset, self.line, self.column = path, offset, 1, 1

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}, column {self.column}"

    def advance(self, text: bytes | bytearray, start: int = 0, end: int | None = None) -> None:
        """Move over `text[start:end]`, which begins here."""
        end = len(text) if end is None else end
        self.offset += end - start
        newlines = text.count(b"\n", start, end)
        self.line += newlines
        self.column = end - text.rfind(b"\n", start, end) if newlines else self.column + end - start

    def error(self, text: bytes | bytearray, position: int, problem: str) -> DataError:
        """The error for `problem` at `position` in `text`, which begins here; at its end the file is cut off."""
        self.advance(text, 0, position)
        if position >= len(text):
            return DataError(
                f"{self}: the file ends in the middle of the list", "the download is incomplete: fetch it again"
            )
        return DataError(f"{self}: not valid JSON: {problem}", "repair that line, or fetch the file again")
