"""What a worker of `mix` does with a chunk of records, and with one file: the inner loop, free of waiting.

inspect   chunk → the files its records name, each with its length and time of change
check     file  → verdict                               (levels "header" and "full" only)
convert   chunk → its lines of the output, and the records that were rejected, with reasons
"""

from __future__ import annotations

import gc
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from llavanext_cli.errors import DataError
from llavanext_cli.mixing import mindformers_format
from llavanext_cli.mixing.json_index import Chunk, split_records
from llavanext_cli.mixing.lengths import LengthRule, build_counter, check_size, measure_sample
from llavanext_cli.mixing.media import FileState, Verdict, check_file, stat_file
from llavanext_cli.mixing.readers import (
    BadRecordError,
    Converted,
    Fault,
    Media,
    build_converted,
    build_sample,
    decode_records,
    describe_faults,
    read_record,
    sample_id,
)
from llavanext_cli.mixing.spool import put

Verdicts = dict[tuple[str, str], Verdict]
"""What is known of files, by (kind, path below the root)."""

GOOD = Verdict()
_encoder = msgspec.json.Encoder()

MEMO_FILES = 200_000
"""Verdicts of the level "exists" that one worker remembers; with more files than that it looks again now and then."""


class Source(NamedTuple):
    """One data set as a worker sees it; `root` is its media folder and ends in "/". `state` must not change."""

    name: str
    json_path: str
    root: str
    state: tuple[int, ...]


class Context(NamedTuple):
    """What all chunks share. `frames` of a clip would be used in training; `lengths` None counts no tokens; `spool` is
    the descriptor of a `spool.Spool`."""

    sources: tuple[Source, ...]
    check: str
    format: str
    frames: int
    lengths: LengthRule | None = None
    spool: int | None = None


class ChunkJob(NamedTuple):
    """One chunk: `chosen` are ascending positions in it; `verdicts` by (kind, path) for "header" and "full"; `slot` is
    where in the spool its lines go."""

    source: int
    chunk: Chunk
    chosen: Sequence[int]
    verdicts: Verdicts | None = None
    slot: int = 0


@dataclass
class ChunkResult:
    """A converted chunk. `body` is its part of the output, or `spooled` bytes of it are in the spool; every record of
    the chunk is in `kept` or in `faults`."""

    body: bytes = b""
    spooled: int = 0
    kept: int = 0
    faults: list[Fault] = field(default_factory=list)
    contents: Counter = field(default_factory=Counter)
    """Samples by what they hold: "image", "video", "image+video", "text"."""
    sizes: Counter = field(default_factory=Counter)
    """Pictures and clips by (kind, longer side in pixels)."""
    tokens: Counter = field(default_factory=Counter)
    """Samples by their number of tokens, where tokens are counted; those that are too long included."""


class Prepared:
    """A worker's memory between chunks."""

    def __init__(self, context: Context):
        self.context = context
        self.found: dict[str, Verdict] = {}
        self.counter = build_counter(context.lengths) if context.lengths else None

    def look(self, path: str) -> Verdict:
        """The verdict of the level "exists"."""
        verdict = self.found.get(path)
        if verdict is None:
            if len(self.found) >= MEMO_FILES:
                self.found.clear()
            state = stat_file(path)
            verdict = self.found[path] = state if isinstance(state, Verdict) else GOOD
        return verdict


def prepare(context: Context) -> Prepared:
    """Called once in a new worker."""
    if context.check in ("header", "full"):  # loading the decoders is not the first file's fault
        import llavanext_cli.mixing.clips
        import llavanext_cli.processing.image  # noqa: F401 - loaded here, used by what the worker calls
    gc.freeze()  # what is loaded stays; no later collection need walk through it
    return Prepared(context)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Records of a chunk hold no cycles, and looking for some would take longer than all the rest."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def inspect(prepared: Prepared, job: ChunkJob) -> dict[tuple[str, str], FileState | Verdict]:
    """The files that a chunk's good records name, by (kind, path below the root)."""
    root = prepared.context.sources[job.source].root
    found: dict[tuple[str, str], FileState | Verdict] = {}
    with _no_collection():
        for record in decode_records(_read(prepared, job), job.chunk.lines, job.chosen):
            try:
                media, _ = read_record(record, root)
            except BadRecordError:
                continue
            for medium in media:
                key = (medium.kind, medium.path)
                if key not in found:
                    found[key] = stat_file(root + medium.path)
    return found


def check(prepared: Prepared, item: tuple[str, str]) -> Verdict:
    """Check one file, given as (kind, absolute path)."""
    return check_file(item[0], item[1], prepared.context.check, prepared.context.frames)


def convert(prepared: Prepared, job: ChunkJob) -> ChunkResult:
    """Write a chunk's records as samples."""
    with _no_collection():
        result = _convert(prepared, job)
    if prepared.context.spool is not None and put(prepared.context.spool, job.slot, result.body):
        result.body, result.spooled = b"", len(result.body)
    return result


def _convert(prepared: Prepared, job: ChunkJob) -> ChunkResult:
    source = prepared.context.sources[job.source]
    data = _read(prepared, job)
    samples: list[Converted] = []
    kept: list[int] = []
    contents: list[str] = []
    bad: list[tuple[int, str, str]] = []
    result = ChunkResult()
    for position, record in zip(job.chosen, decode_records(data, job.chunk.lines, job.chosen), strict=True):
        try:
            media, texts = read_record(record, source.root)
            if media and prepared.context.check != "none":
                _judge(prepared, source, media, job.verdicts)
            if prepared.counter:
                _measure(prepared, texts, media, result)
        except BadRecordError as error:
            # The error itself would hold this frame, and all of the chunk with it.
            bad.append((position, error.reason, error.detail))
            continue
        name = sample_id(record, job.chunk.first + position)
        samples.append(build_converted(name, source.name, media, texts))
        kept.append(position)
        contents.append(media[0].kind if len(media) == 1 else _content(media))
        for medium in media:
            if medium.size:
                result.sizes[medium.kind, max(medium.size)] += 1
    result.contents.update(contents)
    if prepared.context.format == "mindformers":
        records = split_records(data, job.chunk.lines)
        result.body = mindformers_format.encode(
            [records[position] for position in kept], [s.media for s in samples], source.root
        )
    else:
        result.body = _encoder.encode_lines(samples)
    result.kept = len(samples)
    result.faults = describe_faults(data, job.chunk.lines, job.chunk.first, job.chunk.line, bad)
    return result


def _content(media: Sequence[Media]) -> str:
    return "+".join(sorted({medium.kind for medium in media})) or "text"


def _judge(prepared: Prepared, source: Source, media: Sequence[Media], verdicts: Verdicts | None) -> None:
    """Raise if a medium of a sample is bad; give the others the size that was found."""
    for medium in media:
        if verdicts is None:
            path = source.root + medium.path
            verdict = prepared.found.get(path) or prepared.look(path)
        else:
            verdict = verdicts[medium.kind, medium.path]
            medium.size = verdict.size
        if verdict.reason:
            raise BadRecordError(verdict.reason, verdict.detail)


def _measure(prepared: Prepared, texts: Sequence[str], media: Sequence[Media], result: ChunkResult) -> None:
    """Count the tokens of a sample, and raise if it is too large."""
    size = measure_sample(prepared.counter, build_sample(texts, media))
    result.tokens[size.tokens] += 1
    check_size(size, prepared.context.lengths)


def _read(prepared: Prepared, job: ChunkJob) -> bytes:
    source = prepared.context.sources[job.source]
    try:
        with open(source.json_path, "rb") as file:
            data = job.chunk.read(file)
            state = file_state(file.fileno())
    except OSError:  # it is gone, or was
        state = ()
    if state != source.state:
        raise DataError(f"{source.json_path} changed while it was read", "run the command again when it is complete")
    return data


def file_state(file: Path | int) -> tuple[int, ...]:
    """What tells whether a data file is still the same: its number, length and time of change; () if it is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
