"""What a worker of `mix` does with a chunk of records, and with one file: the inner loop, free of waiting.

inspect   chunk → the files its records name, each with its length and time of change
check     file  → verdict                               (levels "header" and "full" only)
convert   chunk → its lines of the output, and the records that were rejected, with reasons
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from llavanext_cli.mixing import tagged
from llavanext_cli.mixing.media import FileState, Verdict, check_file, stat_file
from llavanext_cli.mixing.readers import (
    BadRecordError,
    Converted,
    Fault,
    Media,
    Record,
    decode_records,
    describe_faults,
    media_of,
    sample_id,
    turns_of,
)
from llavanext_cli.mixing.splitter import Chunk, split_records

MEMO_FILES = 200_000
"""Verdicts of the level "exists" that one worker remembers; with more files than that it looks again now and then."""


class Source(NamedTuple):
    """One data set as a worker sees it. `root` ends in "/"; `tag_root` is how the tagged form writes it."""

    name: str
    json_path: str
    root: str
    tag_root: str


class Context(NamedTuple):
    """What all chunks share. `frames` of a clip would be used in training."""

    sources: tuple[Source, ...]
    check: str
    format: str
    frames: int


class ChunkJob(NamedTuple):
    """One chunk: `chosen` are ascending positions in it; `verdicts` by (kind, path) for "header" and "full"."""

    source: int
    chunk: Chunk
    chosen: Sequence[int]
    verdicts: dict[tuple[str, str], Verdict] | None = None


@dataclass
class ChunkResult:
    """A converted chunk. `body` is its part of the output; every record of the chunk is in `kept` or in `faults`."""

    body: bytes
    kept: int
    faults: list[Fault]
    contents: Counter = field(default_factory=Counter)
    """Samples by what they hold: "image", "video", "image+video", "text"."""
    sizes: Counter = field(default_factory=Counter)
    """Pictures and clips by (kind, longer side in pixels)."""


class Prepared:
    """A worker's memory between chunks."""

    def __init__(self, context: Context):
        self.context = context
        self.memo: dict[str, FileState | Verdict] = {}

    def stat(self, path: str) -> FileState | Verdict:
        found = self.memo.get(path)
        if found is None:
            if len(self.memo) >= MEMO_FILES:
                self.memo.clear()
            found = self.memo[path] = stat_file(path)
        return found


def prepare(context: Context) -> Prepared:
    # Records live for one chunk and hold no cycles; collecting them takes longer than everything else.
    gc.disable()
    return Prepared(context)


def inspect(prepared: Prepared, job: ChunkJob) -> dict[tuple[str, str], FileState | Verdict]:
    """The files that a chunk's good records name, by (kind, path below the root)."""
    root = prepared.context.sources[job.source].root
    found: dict[tuple[str, str], FileState | Verdict] = {}
    for record in decode_records(_read(prepared, job), job.chunk.lines, job.chosen):
        if isinstance(record, Record):
            try:
                media = media_of(record, root)
                turns_of(record, media)
            except BadRecordError:
                continue
            for medium in media:
                key = (medium.kind, medium.path)
                if key not in found:
                    found[key] = prepared.stat(root + medium.path)
    return found


def check(prepared: Prepared, item: tuple[str, str]) -> Verdict:
    """Check one file, given as (kind, absolute path)."""
    return check_file(item[0], item[1], prepared.context.check, prepared.context.frames)


def convert(prepared: Prepared, job: ChunkJob) -> ChunkResult:
    """Write a chunk's records as samples."""
    context, source = prepared.context, prepared.context.sources[job.source]
    data = _read(prepared, job)
    records = decode_records(data, job.chunk.lines, job.chosen)
    samples, bad, kept = [], [], []
    contents: Counter = Counter()
    sizes: Counter = Counter()
    for position, record in zip(job.chosen, records, strict=True):
        try:
            if not isinstance(record, Record):
                raise record
            media = media_of(record, source.root)
            turns = turns_of(record, media)
            if media:
                _judge(prepared, source, media, job.verdicts)
        except BadRecordError as error:
            bad.append((position, error))
            continue
        samples.append(Converted(sample_id(record, job.chunk.first + position), source.name, media, turns))
        kept.append(position)
        contents["+".join(sorted({medium.kind for medium in media})) or "text"] += 1
        for medium in media:
            if medium.size:
                sizes[medium.kind, max(medium.size)] += 1
    if context.format == "mindformers":
        texts = split_records(data, job.chunk.lines)
        body = tagged.encode([texts[position] for position in kept], [s.media for s in samples], source.tag_root)
    else:
        body = msgspec.json.Encoder().encode_lines(samples) if samples else b""
    faults = describe_faults(data, job.chunk.lines, job.chunk.first, job.chunk.line, bad)
    return ChunkResult(body, len(samples), faults, contents, sizes)


def _judge(prepared: Prepared, source: Source, media: list[Media], verdicts: Any) -> None:
    """Raise if a medium of a sample is bad; give the others the size that was found."""
    if prepared.context.check == "none":
        return
    for medium in media:
        if verdicts is None:
            verdict = prepared.stat(source.root + medium.path)
        else:
            verdict = verdicts[medium.kind, medium.path]
            medium.size = verdict.size if isinstance(verdict, Verdict) else None
        if isinstance(verdict, Verdict) and verdict.reason:
            raise BadRecordError(verdict.reason, verdict.detail)


def _read(prepared: Prepared, job: ChunkJob) -> bytes:
    with Path(prepared.context.sources[job.source].json_path).open("rb") as file:
        return job.chunk.read(file)
