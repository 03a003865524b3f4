"""What worker processes of `mix` do.

inspect       chunk → the files that its records name, each with its length and modification time
check_files   files → their results                            (levels "header" and "full" only)
convert       chunk → its lines of the output, and the records that were rejected, with reasons
"""

from __future__ import annotations

import ctypes
import gc
import os
import signal
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from llavanext_cli.errors import DataError
from llavanext_cli.mixing import mindformers_format
from llavanext_cli.mixing.check_result import CheckResult, FileState, MediaFile
from llavanext_cli.mixing.checks import check_file, stat_file
from llavanext_cli.mixing.json_index import Chunk, split_records
from llavanext_cli.mixing.readers import BadRecordError, Reject, decode_records, locate_rejects, read_record
from llavanext_cli.mixing.size_limits import SizeLimits, build_counter, check_size, measure_sample
from llavanext_cli.records import Medium, Sample

MEMO_FILES = 200_000
"""Results of the level "exists" that a worker remembers."""

SLOT_BYTES = 4 << 20
"""Shared memory for the lines of one chunk, which take about two megabytes. They do not fit into the pool's pipe, and a
worker would wait in the middle of sending them; only longer ones go that way."""

_GOOD = CheckResult()
_encoder = msgspec.json.Encoder()


class Source(NamedTuple):
    """One data set. `root` is its media folder and ends in "/"; `state` identifies the content of the data file."""

    name: str
    json_path: str
    root: str
    state: tuple[int, ...]


class Context(NamedTuple):
    """What all chunks share. `frames` of a video are used in training; `limits` None counts nothing."""

    sources: tuple[Source, ...]
    check: str
    format: str
    frames: int
    limits: SizeLimits | None = None


class Job(NamedTuple):
    """One chunk: `chosen` are ascending positions in it; `results` of the checks "header" and "full" by (kind, path
    below the root); `slot` is the chunk's place in the shared memory."""

    source: int
    chunk: Chunk
    chosen: Sequence[int]
    results: dict[MediaFile, CheckResult] | None = None
    slot: int = 0


@dataclass
class Converted:
    """A converted chunk. Every record of the chunk is in `kept` or in `rejects`.

    Attributes:
        body: its part of the output.
        shared: bytes of its part of the output that are in the shared memory instead.
        contents: samples by what they hold ("image", "video", "image+video", "text").
        sizes: media by (kind, longer side in pixels).
        tokens: samples by number of tokens, those that are too long included.
    """

    body: bytes | memoryview = b""
    shared: int = 0
    kept: int = 0
    rejects: list[Reject] = field(default_factory=list)
    contents: Counter = field(default_factory=Counter)
    sizes: Counter = field(default_factory=Counter)
    tokens: Counter = field(default_factory=Counter)


class _Worker:
    """A worker's memory between tasks."""

    def __init__(self, context: Context, shared: str):
        self.context, self.shared = context, os.open(shared, os.O_WRONLY)
        self.existing: dict[str, CheckResult] = {}
        self.counter = build_counter(context.limits) if context.limits else None

    def check_exists(self, path: str) -> CheckResult:
        result = self.existing.get(path)
        if result is None:
            if len(self.existing) >= MEMO_FILES:
                self.existing.clear()
            state = stat_file(path)
            result = self.existing[path] = state if isinstance(state, CheckResult) else _GOOD
        return result


_worker: _Worker


def start_worker(context: Context, shared: str) -> None:
    """Called once in each worker process. `shared` is a file in memory, with `SLOT_BYTES` for each slot."""
    global _worker
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a decoder that hangs runs no handler of Python's
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)  # decoders write to stderr; what matters is in the result
    _keep_freed_memory()
    if context.check in ("header", "full"):  # importing the decoders must not count against the first file's time
        import llavanext_cli.mixing.video_check
        import llavanext_cli.processing.image  # noqa: F401
    _worker = _Worker(context, shared)
    gc.freeze()  # no later collection need look at what is loaded


def _keep_freed_memory() -> None:
    """Let glibc keep what is freed: fresh pages for every chunk take a tenth of a worker's time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library
        return
    for option, value in (
        (-3, 8 << 20),
        (-1, 32 << 20),
        (-2, 8 << 20),
    ):  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD
        mallopt(option, value)


@contextmanager
def _no_collection() -> Iterator[None]:
    """Records of a chunk have no reference cycles, and looking for some takes longer than all the rest."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def inspect(job: Job) -> dict[MediaFile, FileState | CheckResult]:
    """The files that a chunk's good records name, by (kind, path below the root)."""
    root = _worker.context.sources[job.source].root
    found: dict[MediaFile, FileState | CheckResult] = {}
    with _no_collection():
        for record in decode_records(_read(job), job.chunk.lines, job.chosen):
            try:
                media = read_record(record, root).media
            except BadRecordError:
                continue
            for medium in media:
                if (medium.kind, medium.path) not in found:
                    found[medium.kind, medium.path] = stat_file(root + medium.path)
    return found


def check_files(files: Sequence[MediaFile]) -> list[CheckResult]:
    """Check files, given as (kind, absolute path)."""
    context = _worker.context
    return [check_file(kind, path, context.check, context.frames) for kind, path in files]


def convert(job: Job) -> Converted:
    """Convert a chunk's records to samples."""
    with _no_collection():
        converted = _convert(job)
    if len(converted.body) <= SLOT_BYTES:
        converted.shared = os.pwrite(_worker.shared, converted.body, job.slot * SLOT_BYTES)
        converted.body = b""
    return converted


def _convert(job: Job) -> Converted:
    context = _worker.context
    source = context.sources[job.source]
    data = _read(job)
    samples: list[Sample] = []
    kept: list[int] = []
    bad: list[tuple[int, str, str]] = []
    converted = Converted()
    for position, record in zip(job.chosen, decode_records(data, job.chunk.lines, job.chosen), strict=True):
        try:
            sample = read_record(record, source.root, source.name, job.chunk.first + position)
            if sample.media and context.check != "none":
                sample = _with_sizes(sample, source.root, job.results)
            if _worker.counter and context.limits:
                size = measure_sample(_worker.counter, sample)
                converted.tokens[size.tokens] += 1
                check_size(size, context.limits)
                sample = Sample(sample.id, sample.source, sample.media, sample.turns, *size)
        except BadRecordError as error:
            # not the error itself: its traceback would keep all of the chunk in memory
            bad.append((position, error.reason, error.detail))
            continue
        samples.append(sample)
        kept.append(position)
    converted.contents.update([_content(sample.media) for sample in samples])
    converted.sizes.update((m.kind, max(m.size)) for sample in samples for m in sample.media if m.size)
    if context.format == "mindformers":
        records = split_records(data, job.chunk.lines)
        converted.body = mindformers_format.encode([records[p] for p in kept], samples, source.root)
    else:
        converted.body = _encoder.encode_lines(samples)
    converted.kept = len(samples)
    converted.rejects = locate_rejects(data, job.chunk.lines, job.chunk.first, job.chunk.line, bad)
    return converted


def _content(media: Sequence[Medium]) -> str:
    if len(media) == 1:
        return media[0].kind
    return "+".join(sorted({medium.kind for medium in media})) or "text"


def _with_sizes(sample: Sample, root: str, results: dict[MediaFile, CheckResult] | None) -> Sample:
    """The sample with the sizes that checks found. Raises if a medium is bad."""
    if results is None:
        for medium in sample.media:
            result = _worker.check_exists(root + medium.path)
            if result.reason:
                raise BadRecordError(result.reason, result.detail)
        return sample
    media = []
    for medium in sample.media:
        result = results[medium.kind, medium.path]
        if result.reason:
            raise BadRecordError(result.reason, result.detail)
        media.append(Medium(medium.kind, medium.path, result.size))
    return Sample(sample.id, sample.source, tuple(media), sample.turns)


def _read(job: Job) -> bytes:
    source = _worker.context.sources[job.source]
    try:
        with open(source.json_path, "rb") as file:
            data = job.chunk.read(file)
            state = file_state(file.fileno())
    except OSError:  # it was removed
        state = ()
    if state != source.state:
        raise DataError(
            f"{source.json_path} changed while it was read", "run the command again when the file is complete"
        )
    return data


def file_state(file: Path | int) -> tuple[int, ...]:
    """What identifies the content of a data file: its inode, length and modification time; () if it is missing."""
    try:
        found = os.stat(file)
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns
