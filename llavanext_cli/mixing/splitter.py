"""Cuts a data file into chunks of whole records without reading it whole. First step of `mix`; `samples` uses it too.

A public data set is one JSON array of up to a gigabyte, or JSON Lines. `index_chunks` walks it once, a megabyte
at a time, proves that it is well-formed and notes where the chunks lie; workers then read chunks on
their own, in parallel:

    [ {..}, {..}, {..},   {..}, {..},   {..} ]
     └──── chunk 0 ────┘ └─ chunk 1 ─┘ └ 2 ┘

A cut is guessed from the text between two records and then *proved*: `[` + chunk + `]` must parse. A guess inside a
string or inside a record leaves something open, and the parse fails. msgspec does this work: it skips over JSON at
several hundred megabytes a second, decodes straight into typed records, and has wheels for x86-64 and aarch64. The
standard library's parser is only asked where msgspec gives up, because it knows where in the text that was.
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

CHUNK_BYTES = 1 << 20
"""Bytes read at a time: a chunk takes a worker some ten milliseconds, so that handing it out costs next to nothing."""

MAX_RECORD_BYTES = 256 << 20
"""A single record beyond this is a broken file, not a conversation."""

UNPARSED = (msgspec.DecodeError, UnicodeDecodeError, RecursionError)
"""What msgspec raises for text that it cannot parse."""

_BLANK = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"
_BETWEEN = re.compile(rb"\}[ \t\r\n]*(,)[ \t\r\n]*\{")
_FIRST_KEY = re.compile(rb'[ \t\r\n]*\{[ \t\r\n]*("(?:[^"\\]|\\.)*")')
_LIST_HINT = "write its records as a list, [{...}, {...}]; if it has one record a line, name it .jsonl"
_GUESSES = 8
_TAIL_BYTES = 1 << 13
_array_of_raw = msgspec.json.Decoder(list[msgspec.Raw])
_line_of_raw = msgspec.json.Decoder(msgspec.Raw)
_scanner = json.JSONDecoder()


@dataclass(frozen=True)
class Chunk:
    """Whole records that lie together in a file.

    Attributes:
        offset: bytes before the chunk.
        length: bytes of the chunk, without the array's brackets and without the comma behind it.
        first: number of the chunk's first record in the file, from 0.
        count: records in the chunk, at least 1.
        line: line of the file in which the chunk starts, from 1.
        lines: the file is JSON Lines, one record a line, and not one array.
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
            head = file.read(4096)
            start = len(_BOM) if head.startswith(_BOM) else 0
            while head and not head[start:].strip(_BLANK):
                start, head = 0, file.read(4096)
            first = head[start:].lstrip(_BLANK)[:1]
            if not first:
                raise DataError(f"{path}: the file is empty", "download it again: llavanext fetch --list")
            file.seek(0)
            bom = len(_BOM) if file.read(3) == _BOM else 0
            file.seek(bom)
            if first == b"[":
                yield from _index_array(path, file, bom, chunk_bytes)
            elif first == b"{":
                if path.suffix == ".json" and not _has_record_lines(file):
                    raise DataError(
                        f"{path}: a .json data set is a list of records, and this file holds one object",
                        _LIST_HINT,
                    )
                file.seek(bom)
                yield from _index_lines(path, file, bom, chunk_bytes)
            elif _is_json(head[start:]):
                raise DataError(f"{path}: a data set is a list of records, and this file holds one value", _LIST_HINT)
            else:
                raise DataError(f"{path}, line 1, column 1: this is not JSON", "check that the download is complete")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", "check json_path, or get the data: llavanext fetch"
        ) from error


def split_records(data: bytes, lines: bool) -> list[bytes | msgspec.Raw]:
    """The records of a chunk, still as JSON text.

    Raises:
        DataError: the text is not well-formed; the message ends in "line L, column C", counted from the chunk's start.
    """
    try:
        return _line_of_raw.decode_lines(data) if lines else _array_of_raw.decode(b"[" + data + b"]")
    except UNPARSED:
        return _split_slowly(data, lines)


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


def _index_array(path: Path, file: BinaryIO, offset: int, chunk_bytes: int) -> Iterator[Chunk]:
    where = _Place(path, offset)
    # One buffer for the whole file. Its first byte is the bracket or the comma before the next record, so that an end
    # written over the comma behind a record makes an array of what lies between, without a copy.
    buffer = bytearray(chunk_bytes)
    filled = file.readinto(buffer)
    while (opening := buffer.find(b"[", 0, filled)) < 0:  # only blanks so far
        where.advance(buffer, 0, filled)
        filled = file.readinto(buffer)
    where.advance(buffer, 0, opening + 1)
    filled -= opening
    buffer[:filled] = buffer[opening : opening + filled]
    key, number = b"", 0
    while True:
        filled += file.readinto(memoryview(buffer)[filled:])
        if filled < len(buffer):
            yield from _last_chunk(bytes(buffer[1:filled]), where, number)
            return
        key = key or _first_key(buffer, 1)
        cut, count = _find_cut(buffer, key, where)
        if not cut:  # not one whole record in the buffer yet
            if len(buffer) > MAX_RECORD_BYTES:
                raise DataError(f"{where}: a record of more than {MAX_RECORD_BYTES >> 20} MiB", "the file is damaged")
            buffer.extend(bytes(len(buffer)))
            continue
        yield Chunk(where.offset, cut - 1, number, count, where.line, lines=False)
        number += count
        where.advance(buffer, 1, cut + 1)
        rest = filled - cut
        buffer[:rest] = buffer[cut:filled]
        filled = rest
        del buffer[max(chunk_bytes, filled + 1) :]


def _last_chunk(buffer: bytes, where: _Place, number: int) -> Iterator[Chunk]:
    """What is left at the end of the file must be records and the closing bracket, and nothing behind it."""
    text = buffer.rstrip(_BLANK)
    body = text[:-1]
    try:
        if not text.endswith(b"]"):
            raise msgspec.DecodeError
        count = len(_array_of_raw.decode(b"[" + text))
    except UNPARSED:
        spans, problem = _scan(text)
        behind = text[spans[-1][1] if spans else 0 :].lstrip(_BLANK)
        garbage = behind[1:].lstrip(_BLANK)
        if not problem and behind[:1] == b"]" and garbage:
            problem = (len(text) - len(garbage), "the list has ended, and nothing may follow it")
        if problem or behind[:1] != b"]":
            raise where.error(text, problem) from None
        count = len(spans)
    if count == 0 and number > 0:
        raise where.error(text, (len(body), "a record must follow the comma"))
    if count:
        yield Chunk(where.offset, len(body), number, count, where.line, lines=False)


def _find_cut(buffer: bytearray, key: bytes, where: _Place) -> tuple[int, int]:
    """Where the comma behind the last whole record stands, and how many records precede it; (0, 0) if there is none."""
    for start in (max(1, len(buffer) - _TAIL_BYTES), 1):
        commas = [found.start(1) for found in _BETWEEN.finditer(buffer, start)]
        # Turns inside a record look alike from outside; the name of a record's first key tells most of them apart.
        likely = [at for at in commas if _first_key(buffer, at + 1) == key]
        for at in (likely or commas)[: -_GUESSES - 1 : -1]:
            count = _count_records(buffer, at)
            if count:
                return at, count
    spans, problem = _scan(buffer[1:])
    if problem and not spans:
        position, message = problem
        if position + 32 < len(buffer) and "Unterminated string" not in message:
            raise where.error(buffer[1:], problem)
    for count in range(len(spans), 0, -1):
        behind = spans[count - 1][1] + 1
        comma = buffer.find(b",", behind)
        if comma >= 0 and not buffer[behind:comma].strip(_BLANK):
            return comma, count
    return 0, 0


def _count_records(buffer: bytearray, at: int) -> int:
    """Records between the buffer's first byte and `at`; 0 if that is not where a record ends."""
    first, last = buffer[0], buffer[at]
    buffer[0], buffer[at] = b"[]"
    try:
        return len(_array_of_raw.decode(memoryview(buffer)[: at + 1]))
    except UNPARSED:
        return 0
    finally:
        buffer[0], buffer[at] = first, last


def _index_lines(path: Path, file: BinaryIO, offset: int, chunk_bytes: int) -> Iterator[Chunk]:
    where, number = _Place(path, offset), 0
    while True:
        buffer = file.read(chunk_bytes)
        buffer += file.readline()
        if not buffer:
            return
        records = split_lines(buffer, where)
        if records:
            yield Chunk(where.offset, len(buffer), number, len(records), where.line, lines=True)
        number += len(records)
        where.advance(buffer)


def split_lines(data: bytes, where: _Place) -> list[bytes | msgspec.Raw]:
    written = sum(1 for line in data.split(b"\n") if line.strip(_BLANK))
    try:
        records = _line_of_raw.decode_lines(data)
        if len(records) == written:
            return records
    except UNPARSED:
        pass
    return _split_slowly(data, lines=True, where=where)


def _split_slowly(data: bytes, lines: bool, where: _Place | None = None) -> list[bytes]:
    """As msgspec splits, in the standard library's words: for text that msgspec refuses, a lone surrogate for one."""
    where = where or _Place(Path("chunk"), 0)
    if not lines:
        spans, problem = _scan(data)
        if problem:
            raise where.error(data, problem)
        return [data[start:end] for start, end in spans]
    records, position = [], 0
    for line in data.split(b"\n"):
        text = line.strip(_BLANK)
        if text:
            spans, problem = _scan(line)
            if spans and (problem or line[spans[0][1] :].strip(_BLANK)):
                after = line[spans[0][1] :]
                problem = (len(line) - len(after.lstrip(_BLANK)), "one record a line")
            if problem:
                raise where.error(data, (position + problem[0], problem[1]))
            records.append(text)
        position += len(line) + 1
    return records


def _scan(data: bytes | bytearray) -> tuple[list[tuple[int, int]], tuple[int, str] | None]:
    """Byte spans of the elements in `data` (an array's inside), and where and why the scan stopped before its end.

    A closing bracket behind an element ends the scan without a problem.
    """
    # latin-1 keeps one character a byte, so that positions are byte positions; the grammar itself is ASCII.
    text = data.decode("latin-1")
    spans: list[tuple[int, int]] = []
    position = _skip_blanks(text, 0)
    while position < len(text):
        if text[position] == "]":
            return spans, None
        try:
            _, end = _scanner.raw_decode(text, position)
        except json.JSONDecodeError as error:
            return spans, (error.pos, error.msg)
        except RecursionError:
            return spans, (position, "nested too deeply")
        spans.append((position, end))
        position = _skip_blanks(text, end)
        if position < len(text) and text[position] == ",":
            position = _skip_blanks(text, position + 1)
            if text[position : position + 1] == "]":
                return spans, (position, "a record must follow the comma")
        elif position < len(text) and text[position] != "]":
            return spans, (position, "Expecting ',' delimiter")
    return spans, None


def _skip_blanks(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def _has_record_lines(file: BinaryIO) -> bool:
    """Whether a file has one object a line. A lone one must be a record or a sample: it may be a config file."""
    try:
        first = json.loads(file.readline())
    except ValueError:
        return False
    is_alone = not file.read(CHUNK_BYTES).strip(_BLANK)
    return isinstance(first, dict) and not (is_alone and "conversations" not in first and "turns" not in first)


def _first_key(data: bytes | bytearray, position: int) -> bytes:
    found = _FIRST_KEY.match(data, position, position + 256)
    return found.group(1) if found else b""


class _Place:
    """Where the walk stands in a file: offset in bytes, line and column from 1 (columns count bytes)."""

    def __init__(self, path: Path, offset: int):
        self.path, self.offset, self.line, self.column = path, offset, 1, 1

    def __str__(self) -> str:
        return f"{self.path}, line {self.line}, column {self.column}"

    def advance(self, data: bytes | bytearray, start: int = 0, end: int | None = None) -> None:
        """Go on over `data[start:end]`."""
        end = len(data) if end is None else end
        self.offset += end - start
        newlines = data.count(b"\n", start, end)
        self.line += newlines
        self.column = end - data.rfind(b"\n", start, end) if newlines else self.column + end - start

    def error(self, data: bytes | bytearray, problem: tuple[int, str] | None) -> DataError:
        """A `DataError` at `problem`'s position in `data`, which starts here; without a problem the file just ends."""
        position, message = problem or (len(data), "")
        self.advance(data, 0, position)
        if position >= len(data):
            return DataError(
                f"{self}: the file ends in the middle of the list", "the download is incomplete: fetch it again"
            )
        return DataError(f"{self}: not valid JSON: {message}", "repair that line, or fetch the file again")
