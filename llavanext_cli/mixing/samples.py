"""Random access to a file of samples, for `train` and `ask --batch`: what `mix` wrote, and what the original wrote.

    {"llavanext_mix": 1, "roots": {"mix665k": "images"}, "counted_by": "5f1c...", ...}      header
    {"id": ..., "source": "mix665k", "media": [...], "turns": [...], "tokens": 812, "tiles": 5, "frames": 0}
    ...

Without a header, paths start at the file's folder. `counted_by` is the `Processor.fingerprint` of what counted the
tokens, tiles and frames. Opening a file keeps where its records are (24 bytes a record); a record is parsed and
checked when it is asked for. A `SampleFile` can be pickled into workers.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import msgspec

from llavanext_cli.errors import DataError
from llavanext_cli.mixing import mindformers_format
from llavanext_cli.mixing.json_index import index_chunks, record_lines, split_records
from llavanext_cli.records import Sample, decode_json, decode_sample

HEADER_KEY = "llavanext_mix"
HEADER_VERSION = 1
_BOM = b"\xef\xbb\xbf"
_MIX_AGAIN = "write the file again: llavanext mix --help"


class _Index(NamedTuple):
    """Where each record is: offset and length in bytes, and its line from 1; each `int64[samples]`."""

    offsets: array
    lengths: array
    lines: array

    def add(self, offset: int, length: int, line: int) -> None:
        for column, value in zip(self, (offset, length, line), strict=True):
            column.append(value)


def read_samples(path: Path) -> SampleFile:
    """Open a file of samples: our JSON Lines, or the processed JSON of the original (see `mindformers_format`).

    Raises:
        DataError: the file is missing or empty, or its header is invalid; the message names file and line.
    """
    path = Path(path).absolute()
    header: dict[str, Any] = {}
    index = _Index(array("q"), array("q"), array("q"))
    with _open(path) as file:
        start = len(_BOM) if file.read(len(_BOM)) == _BOM else 0
        file.seek(start)
        is_array = _first_character(file) == b"["
        file.seek(start)
        if is_array:
            _index_array(path, file, index)
        else:
            header = _index_lines(path, file, index)
    if not index.lines:
        raise DataError(f"{path}: the file has no samples", _MIX_AGAIN)
    return SampleFile(path, header, is_array, index)


def _first_character(file: BinaryIO) -> bytes:
    while (character := file.read(1)).isspace():
        pass
    return character


def _index_lines(path: Path, file: BinaryIO, index: _Index) -> dict[str, Any]:
    """Add all lines but blank ones and the header, which is returned."""
    header: dict[str, Any] = {}
    offset, is_first = file.tell(), True
    for number, line in enumerate(file, 1):
        if not line.isspace():
            if is_first:
                header = read_header(path, line, number)
            if not (is_first and header):
                index.add(offset, len(line), number)
            is_first = False
        offset += len(line)
    return header


def _index_array(path: Path, file: BinaryIO, index: _Index) -> None:
    for chunk in index_chunks(path):
        data, position = chunk.read(file), 0
        records = split_records(data, lines=False)
        for record, line in zip(records, record_lines(data, records, chunk.line), strict=True):
            text = bytes(record)
            position = data.find(text, position)
            index.add(chunk.offset + position, len(text), line)
            position += len(text)


class SampleFile(Sequence):
    """Samples of one file, parsed one by one as they are asked for. `read_samples` opens it.

    Attributes:
        path: absolute path of the file.
        header: its first line, or {} where there is none.
        roots: absolute media folder of each source, ready for `processing.processor.Processor`; "" stands for every
            other source.
    """

    def __init__(self, path: Path, header: dict[str, Any], is_array: bool, index: _Index):
        self.path, self.header = path, header
        self.roots = header_roots(path, header) if header else {"": path.parent}
        self._is_array, self._index = is_array, index
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._index.lines)

    def __getitem__(self, index: Any) -> Any:
        """The sample at `index`, a `records.Sample`; for a slice, a list of them.

        Raises:
            DataError: it is not a sample, or its source has no media folder; the message names file and line.
        """
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} has {len(self)} samples, and number {index} was asked for")
        index %= len(self)
        if self._descriptor is None:
            with _open(self.path) as file:
                self._descriptor = os.dup(file.fileno())
        # pread leaves the file's position alone: forked workers and threads may share the descriptor.
        text = os.pread(self._descriptor, self._index.lengths[index], self._index.offsets[index])
        where = f"{self.path}, line {self._index.lines[index]}"
        if self._is_array:
            return mindformers_format.decode(decode_json(text, where), where, index)
        sample = decode_sample(text, where)
        needs_root = self.header and any(not medium.path.startswith("/") for medium in sample.media)
        if needs_root and sample.source not in self.roots:
            raise DataError(f"{where}: source {sample.source!r} is missing in the header's roots", _MIX_AGAIN)
        return sample

    def __iter__(self) -> Iterator[Sample]:
        return (self[index] for index in range(len(self)))

    def close(self) -> None:
        """Close the file; it opens again when a sample is asked for."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descriptor": None}

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()


def _open(path: Path) -> BinaryIO:
    try:
        if path.exists() and not (path.is_file() and path.stat().st_size):
            raise DataError(f"{path}: {'the file is empty' if path.is_file() else 'is not a file'}", _MIX_AGAIN)
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "name the file that llavanext mix wrote") from error


def read_header(path: Path, record: bytes | msgspec.Raw, line: int) -> dict[str, Any]:
    """The header of a file whose first record, in `line`, is given; {} where that is a sample.

    Raises:
        DataError: it is not JSON, or the header is invalid.
    """
    first = decode_json(record, f"{path}, line {line}")
    if not isinstance(first, dict) or HEADER_KEY not in first:
        return {}
    if first[HEADER_KEY] != HEADER_VERSION:
        raise DataError(
            f"{path}, line {line}: the samples have format {first[HEADER_KEY]!r}; this version reads {HEADER_VERSION}",
            "update llavanext, or write the file again",
        )
    roots = first.get("roots", {})
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        raise DataError(f"{path}, line {line}: roots must name a folder for each source", _MIX_AGAIN)
    return first


def header_roots(path: Path, header: dict[str, Any]) -> dict[str, Path]:
    """Absolute media folder of each source that the header of a file names."""
    return {name: Path(os.path.abspath(path.parent / root)) for name, root in header.get("roots", {}).items()}
