"""Random access to a file of samples, for `train` and `ask --batch`: what `mix` wrote, and what the original wrote.

    {"llavanext_mix": 1, "roots": {"mix665k": "images"}, ...}      header; without it paths start at the file's folder
    {"id": ..., "source": "mix665k", "media": [...], "turns": [...]}
    ...

The file is walked once, every record is checked, and only offsets are kept (24 bytes a record): a file of a gigabyte
opens in seconds, and its records are parsed when they are asked for. A `SampleFile` can be pickled into workers.
"""

from __future__ import annotations

import os
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from llavanext_cli.errors import DataError
from llavanext_cli.mixing import mindformers_format
from llavanext_cli.mixing.splitter import UNPARSED, Chunk, index_chunks, record_lines, split_records
from llavanext_cli.records import ROLES, Medium, Sample

HEADER_KEY = "llavanext_mix"
HEADER_VERSION = 1
_MIX_AGAIN = "make the file again: llavanext mix --help"


class _Turn(msgspec.Struct, gc=False):
    role: str
    text: str


class _Medium(msgspec.Struct, gc=False):
    kind: Literal["image", "video"]
    path: str
    size: tuple[Annotated[int, msgspec.Meta(gt=0)], Annotated[int, msgspec.Meta(gt=0)]] | None = None


class _Line(msgspec.Struct, gc=False):
    """What most lines are; `Sample.from_dict` has the last word on those that are not."""

    turns: list[_Turn]
    media: list[_Medium] = msgspec.field(default_factory=list)
    source: str = ""


_lines = msgspec.json.Decoder(_Line)


def read_samples(path: Path) -> SampleFile:
    """Open a file of samples: our JSON Lines, or the processed JSON of the original (see `tagged`).

    Every record is looked at once, so that a broken one is found here and not in the middle of a training run.

    Raises:
        DataError: the file is missing, empty, or not what it should be; the message names file and line.
    """
    path = Path(path).absolute()
    if path.exists() and not (path.is_file() and path.stat().st_size):
        raise DataError(f"{path}: {'the file is empty' if path.is_file() else 'is no file'}", _MIX_AGAIN)
    index = _Index(array("q"), array("q"), array("q"))
    header: dict[str, Any] = {}
    roots: dict[str, Path] = {}
    is_tagged = False
    with _opened(path) as file:
        for chunk in index_chunks(path):
            is_tagged = not chunk.lines
            data = chunk.read(file)
            places = _places(data, chunk)
            if chunk.first == 0 and chunk.lines:
                header = read_header(path, _cut(data, chunk, places[0]), places[0].line)
                roots = header_roots(path, header)
                places = places[1:] if header else places
            for place, quick in zip(places, _decode_quickly(data, chunk, places), strict=True):
                source = _source_of(quick)
                if source is _DOUBTFUL:
                    sample = _parse(path, _cut(data, chunk, place), place.line, is_tagged, len(index.lines))
                    source = sample.source if _needs_root(sample.media) else None
                if source is not None and source not in roots:
                    if header:
                        raise DataError(
                            f"{path}, line {place.line}: source {source!r} is not among the roots", _MIX_AGAIN
                        )
                    roots[source] = path.parent
                index.add(place)
    if not index.lines:
        raise DataError(f"{path}: the file holds no samples", _MIX_AGAIN)
    return SampleFile(path, header, roots, is_tagged, index)


class _Place(NamedTuple):
    """Where one record lies: offset and length in bytes, and its line from 1."""

    offset: int
    length: int
    line: int


def _places(data: bytes, chunk: Chunk) -> list[_Place]:
    places, offset, line = [], chunk.offset, chunk.line
    if chunk.lines:
        for text in data.split(b"\n"):
            if text and not text.isspace():
                places.append(_Place(offset, len(text), line))
            offset += len(text) + 1
            line += 1
        return places
    records = split_records(data, lines=False)
    position = 0
    for record, start in zip(records, record_lines(data, records, line), strict=True):
        text = bytes(record)
        position = data.find(text, position)
        places.append(_Place(offset + position, len(text), start))
        position += len(text)
    return places


def _cut(data: bytes, chunk: Chunk, place: _Place) -> bytes:
    start = place.offset - chunk.offset
    return data[start : start + place.length]


def _decode_quickly(data: bytes, chunk: Chunk, places: list[_Place]) -> list[_Line | None]:
    """The records at `places` at once, where all of them are what they should be; else None for each."""
    if places and chunk.lines:
        try:
            found = _lines.decode_lines(data[places[0].offset - chunk.offset :])
            if len(found) == len(places):
                return found
        except UNPARSED:
            pass
    return [None] * len(places)


_DOUBTFUL = object()
_ALTERNATING = list(ROLES) * 2000


def _source_of(quick: _Line | None) -> Any:
    """The source whose root a record needs, None where it needs none, `_DOUBTFUL` where the full test must look."""
    if quick is None or not quick.turns or [t.role for t in quick.turns] != _ALTERNATING[: len(quick.turns)]:
        return _DOUBTFUL
    return quick.source if _needs_root(quick.media) else None


def _needs_root(media: Sequence[_Medium | Medium]) -> bool:
    return any(not medium.path.startswith("/") for medium in media)


class _Index(NamedTuple):
    """Where each sample lies: offset and length in bytes, and its line from 1; each `int64[samples]`."""

    offsets: array
    lengths: array
    lines: array

    def add(self, place: _Place) -> None:
        for column, value in zip(self, place, strict=True):
            column.append(value)


class SampleFile(Sequence):
    """Samples of one file, parsed one by one as they are asked for. Made by `read_samples`.

    Attributes:
        path: absolute path of the file.
        header: its first line, or {} where there is none.
        roots: absolute media folder of each source, ready for `processing.processor.Processor`.
    """

    def __init__(self, path: Path, header: dict[str, Any], roots: dict[str, Path], is_tagged: bool, index: _Index):
        self.path, self.header, self.roots = path, header, roots
        self._is_tagged, self._index = is_tagged, index
        self._descriptor: int | None = None

    def __len__(self) -> int:
        return len(self._index.lines)

    def __getitem__(self, index: Any) -> Any:
        """The sample at `index`, a `records.Sample`; for a slice, a list of them."""
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"{self.path} holds {len(self)} samples, and number {index} was asked for")
        index %= len(self)
        if self._descriptor is None:
            with _opened(self.path) as file:
                self._descriptor = os.dup(file.fileno())
        # pread leaves the file's position alone: forked workers and threads may share the descriptor.
        text = os.pread(self._descriptor, self._index.lengths[index], self._index.offsets[index])
        return _parse(self.path, text, self._index.lines[index], self._is_tagged, index)

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


def _opened(path: Path) -> Any:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", "name the file that llavanext mix wrote") from error


def read_header(path: Path, record: bytes | msgspec.Raw, line: int) -> dict[str, Any]:
    """The header of a file whose first record, in `line`, is given; {} where that is a sample.

    Raises:
        DataError: it is no JSON, or a header that cannot be used.
    """
    first = _decode(path, record, line)
    if not isinstance(first, dict) or HEADER_KEY not in first:
        return {}
    if first[HEADER_KEY] != HEADER_VERSION:
        raise DataError(
            f"{path}, line {line}: the samples have format {first[HEADER_KEY]!r}, and {HEADER_VERSION} is known here",
            "update llavanext, or make the file again",
        )
    roots = first.get("roots", {})
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        raise DataError(f"{path}, line {line}: roots must name a folder for each source", _MIX_AGAIN)
    return first


def header_roots(path: Path, header: dict[str, Any]) -> dict[str, Path]:
    """Absolute media folder of each source that the header of a file names."""
    return {name: Path(os.path.abspath(path.parent / root)) for name, root in header.get("roots", {}).items()}


def _parse(path: Path, text: bytes, line: int, is_tagged: bool, number: int) -> Sample:
    where = f"{path}, line {line}"
    data = _decode(path, text, line)
    if is_tagged:
        return mindformers_format.decode(data, where, number)
    if isinstance(data, dict) and "conversations" in data and "turns" not in data:
        raise DataError(
            f"{where}: this is a record of a raw data set, not a sample", "make samples first: llavanext mix --help"
        )
    return Sample.from_dict(data, where)


def _decode(path: Path, text: bytes | msgspec.Raw, line: int) -> Any:
    try:
        return msgspec.json.decode(text)
    except UNPARSED as error:
        raise DataError(
            f"{path}, line {line}: not valid JSON: {error}", "did the file change? Make it again"
        ) from error
