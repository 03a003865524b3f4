"""`mix` from end to end: index, sample, check, convert, write. The only module of the folder that writes the output.

    mix.yaml ─▶ chunks of each data set ─▶ chosen records ─▶ workers: inspect ─▶ check files ─▶ convert ─▶ one file

A few chunks are under way at a time and leave in the order they came, so memory stays the same however long the
input is.
"""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.mixing import tagged
from llavanext_cli.mixing.cache import VerdictCache
from llavanext_cli.mixing.media import LEVELS, FileState, Verdict
from llavanext_cli.mixing.mixfile import DataSet, load_mix_file
from llavanext_cli.mixing.output import OutputFile, check_output_folder
from llavanext_cli.mixing.pool import Lost, Pool
from llavanext_cli.mixing.report import MixReport, SourceReport
from llavanext_cli.mixing.sampling import within
from llavanext_cli.mixing.splitter import index_chunks
from llavanext_cli.mixing.worker import ChunkJob, ChunkResult, Context, Source

FORMATS = ("llavanext", "mindformers")
ON_BAD = ("drop", "fail")
FILES_A_TASK = 16
"""Files a worker is handed at once; it answers each on its own."""
LISTED_FAULTS = 1000
"""Rejected records that `on_bad="fail"` names in its error; `rejects` holds all of them."""

Progress = Callable[[int, int], None]


def run_mix(
    mix_file: Path,
    out: Path,
    seed: int = 0,
    check: str = "header",
    workers: int | None = None,
    on_bad: str = "drop",
    rejects: Path | None = None,
    format: str | None = None,
    *,
    frames: int = 16,
    time_limit: float = 60.0,
    force: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> MixReport:
    """Make one file of samples from the data sets of a mix file.

    Args:
        mix_file: YAML, see `mixfile`.
        out: the file to write; it appears when it is complete. Beside it, OUT.cache remembers the checks of media.
        seed: of the strategy `random`.
        check: one of `LEVELS`.
        workers: processes; None takes every core this process may use.
        on_bad: "drop" leaves bad records out, "fail" raises in the end and writes no output.
        rejects: JSON Lines of every bad record with its reason; written in both cases.
        format: one of `FORMATS`; None takes "mindformers" for a name that ends in .json.
        frames: frames of a clip that training will use, for the check "full".
        time_limit: seconds that the check of one file may take.
        force: replace what is there.
        dry_run: do all but write; the cache is kept.
        progress: called with (records done, records in all).

    Raises:
        ConfigError: the mix file is wrong.
        DataError: a data set cannot be read, the output cannot be written, or records are bad and `on_bad` is "fail".
    """
    started = time.monotonic()
    for name, value, known in (
        ("check", check, LEVELS),
        ("on_bad", on_bad, ON_BAD),
        ("format", format, (None, *FORMATS)),
    ):
        if value not in known:
            raise ValueError(f"{name} is one of {known}, not {value!r}")
    out, rejects = out.absolute(), rejects.absolute() if rejects else None
    format = format or ("mindformers" if out.suffix == ".json" else "llavanext")
    workers = max(1, workers or len(os.sched_getaffinity(0)))
    data_sets = load_mix_file(mix_file)
    if not dry_run:
        for target in (out, rejects):
            if target:
                check_output_folder(target, force)
        if rejects == out:
            raise DataError(
                f"{out}: the rejects would overwrite the output", "name another file: --rejects rejects.jsonl"
            )
    report = MixReport(out, not dry_run, check, format, seed, [SourceReport(d) for d in data_sets], rejects)
    plan = plan_chunks(data_sets, report, seed)
    context = Context(tuple(_source(d) for d in data_sets), check, format, frames)
    with ExitStack() as stack:
        body = stack.enter_context(OutputFile(None if dry_run else out))
        listing = stack.enter_context(OutputFile(None if dry_run else rejects))
        needs_cache = check in ("header", "full")
        cache = VerdictCache(_cache_path(out) if needs_cache and out.parent.is_dir() else None)
        stack.callback(cache.close)
        pool = stack.enter_context(Pool("llavanext_cli.mixing.worker", context, workers))
        run = _Run(context, plan, pool, cache, time_limit, report, progress)
        problems = _write(run.results(), report, body, listing)
        if needs_cache and not cache.is_kept:
            report.notes.append(f"{_cache_path(out)} could not be used: the checks of this run are not remembered")
        if on_bad == "fail" and report.dropped:
            listing.commit()
            raise _failure(report, problems)
        if not report.kept:
            listing.commit()
            raise _nothing_left(report, problems)
        body.commit()
        listing.commit()
    report.seconds = time.monotonic() - started
    return report


def plan_chunks(data_sets: Sequence[DataSet], report: MixReport, seed: int) -> list[ChunkJob]:
    """Walk every data set once and choose its records; fills `records` and `sampled` of the report."""
    jobs = []
    for number, data_set in enumerate(data_sets):
        chunks = list(index_chunks(data_set.json_path))
        total = sum(chunk.count for chunk in chunks)
        selected = data_set.strategy.select(total, f"{seed}/{data_set.name}")
        report.sources[number].records, report.sources[number].sampled = total, len(selected)
        for chunk in chunks:
            chosen = within(selected, chunk.first, chunk.count)
            if len(chosen):
                jobs.append(ChunkJob(number, chunk, chosen))
    return jobs


@dataclass
class _Underway:
    """A chunk between being read and being written."""

    job: ChunkJob
    verdicts: dict[tuple[str, str], Verdict] = field(default_factory=dict)
    waiting: set[tuple[str, str]] = field(default_factory=set)
    files: int = 0
    result: ChunkResult | None = None


class _Run:
    """Keeps workers busy and chunks in order. A chunk goes inspect → check its files → convert; with the levels "none"
    and "exists" it goes straight to convert, where the worker looks for the files itself."""

    def __init__(
        self,
        context: Context,
        jobs: Sequence[ChunkJob],
        pool: Pool,
        cache: VerdictCache,
        time_limit: float,
        report: MixReport,
        progress: Progress | None,
    ):
        self.context, self.jobs, self.pool, self.cache = context, jobs, pool, cache
        self.time_limit, self.report, self.progress = time_limit, report, progress
        self.reads_files = context.check in ("header", "full")
        self.line: deque[_Underway] = deque()
        self.next = 0
        self.finished = 0
        self.window = 2 * pool.count + 2
        # Files being checked: (kind, absolute path) → state, and the chunks that wait for it.
        self.states: dict[tuple[str, str], FileState] = {}
        self.waiters: dict[tuple[str, str], list[tuple[_Underway, tuple[str, str]]]] = {}

    def results(self) -> Iterator[tuple[ChunkJob, ChunkResult]]:
        """Yield converted chunks in the order of the plan."""
        self._advance()
        for key, index, value in self.pool.results():
            stage, subject = key
            if stage == "inspect":
                self._inspected(subject, value)
            elif stage == "check":
                self._checked(subject[index], value)
            else:
                subject.result = value
            while self.line and self.line[0].result is not None:
                done = self.line.popleft()
                self.finished += len(done.job.chosen)
                yield done.job, done.result
            self._advance()
            self._tell()

    def _advance(self) -> None:
        while len(self.line) < self.window and self.next < len(self.jobs):
            chunk = _Underway(self.jobs[self.next])
            self.next += 1
            self.line.append(chunk)
            if self.reads_files:
                self.pool.submit(("inspect", chunk), "inspect", [chunk.job])
            else:
                self.pool.submit(("convert", chunk), "convert", [chunk.job])

    def _inspected(self, chunk: _Underway, found: dict[tuple[str, str], FileState | Verdict]) -> None:
        root = self.context.sources[chunk.job.source].root
        unknown: dict[tuple[str, str], FileState] = {}
        for (kind, path), state in found.items():
            if isinstance(state, Verdict):
                chunk.verdicts[kind, path] = state
            else:
                unknown[kind, root + path] = state
        chunk.files = len(unknown)
        known: dict[tuple[str, str], Verdict] = {}
        for kind in {kind for kind, _ in unknown}:
            states = {
                path: state for (of, path), state in unknown.items() if of == kind and (of, path) not in self.waiters
            }
            for path, verdict in self.cache.find(kind, states, self.context.check, self.context.frames).items():
                known[kind, path] = verdict
        new = []
        for file, state in unknown.items():
            key = (file[0], file[1][len(root) :])
            if file in known:
                chunk.verdicts[key] = known[file]
                continue
            chunk.waiting.add(key)
            if file not in self.waiters:
                self.states[file] = state
                new.append(file)
            self.waiters.setdefault(file, []).append((chunk, key))
        self.report.files_known += len(known)
        self.report.files += len(known) + len(new)
        for start in range(0, len(new), FILES_A_TASK):
            part = new[start : start + FILES_A_TASK]
            self.pool.submit(("check", part), "check", part, time_limit=self.time_limit)
        self._convert_if_ready(chunk)

    def _checked(self, file: tuple[str, str], verdict: Verdict | Lost) -> None:
        if isinstance(verdict, Lost):
            what = f"took more than {self.time_limit:g} s" if verdict.reason == "timeout" else "crashed its decoder"
            verdict = Verdict(verdict.reason, f"{file[1]}: the check {what}")
        state = self.states.pop(file)
        if verdict.reason != "timeout":  # a slow disk may be faster tomorrow
            self.cache.add([(*file, state, verdict)], self.context.check, self.context.frames)
        for chunk, key in self.waiters.pop(file):
            chunk.verdicts[key] = verdict
            chunk.waiting.discard(key)
            self._convert_if_ready(chunk)

    def _convert_if_ready(self, chunk: _Underway) -> None:
        if not chunk.waiting:
            job = chunk.job._replace(verdicts=chunk.verdicts)
            self.pool.submit(("convert", chunk), "convert", [job], urgent=True)

    def _tell(self) -> None:
        if self.progress:
            partly = sum(
                len(c.job.chosen) * (1 - len(c.waiting) / c.files) for c in self.line if c.files and not c.result
            )
            self.progress(self.finished + int(partly), self.report.sampled)


def _write(
    results: Iterator[tuple[ChunkJob, ChunkResult]], report: MixReport, body: OutputFile, listing: OutputFile
) -> list[str]:
    """Write chunks as they come; returns the first rejected records as lines for an error."""
    tagged_form = report.format == "mindformers"
    encoder = msgspec.json.Encoder()
    listed: list[str] = []
    body.write((tagged.OPENING if tagged_form else _header(report) + "\n").encode())
    empty = True
    for job, result in results:
        source = report.sources[job.source]
        source.kept += result.kept
        source.dropped.update(fault.reason for fault in result.faults)
        report.contents.update(result.contents)
        report.sizes.update(result.sizes)
        if tagged_form and result.body and not empty:
            body.write(tagged.BETWEEN.encode())
        body.write(result.body)
        empty = empty and not result.body
        for fault in result.faults:
            row = {
                "source": source.data_set.name,
                "file": str(source.data_set.json_path),
                "line": fault.line,
                "record": fault.number,
                "id": fault.id,
                "reason": fault.reason,
                "detail": fault.detail,
            }
            listing.write(encoder.encode(row) + b"\n")
            if len(listed) < LISTED_FAULTS:
                listed.append(f"{row['file']}, line {fault.line}, id {fault.id or '-'}: {fault.detail}")
    if tagged_form:
        body.write((tagged.CLOSING if not empty else tagged.EMPTY[1:]).encode())
    return listed


def _header(report: MixReport) -> str:
    """The first line of the output. Roots inside the output's own folder are relative, so that both move together."""
    roots = {}
    for source in report.sources:
        root = source.data_set.media_root
        inside = root.is_relative_to(report.out.parent)
        roots[source.data_set.name] = str(root.relative_to(report.out.parent)) if inside else str(root)
    head: dict[str, Any] = {"llavanext_mix": 1, "roots": roots, "seed": report.seed, "check": report.check}
    head["datasets"] = [
        {
            "name": s.data_set.name,
            "sampling_strategy": s.data_set.strategy_text,
            "records": s.records,
            "sampled": s.sampled,
        }
        for s in report.sources
    ]
    return msgspec.json.encode(head).decode()


def _source(data_set: DataSet) -> Source:
    root = os.path.join(str(data_set.media_root), "")
    return Source(data_set.name, str(data_set.json_path), root, os.path.join(data_set.written_root, ""))


def _cache_path(out: Path) -> Path:
    return out.with_name(out.name + ".cache")


def _failure(report: MixReport, listed: list[str]) -> LlavaNextError:
    total = report.dropped.total()
    if total > len(listed):
        listed = [*listed, f"... and {total - len(listed)} more"]
    hint = (
        f"all are in {report.rejects}" if report.rejects else "--on-bad drop leaves them out; --rejects FILE lists them"
    )
    return DataError(f"{total} of {report.sampled} records are bad, and nothing was written", hint, details=listed)


def _nothing_left(report: MixReport, listed: list[str]) -> LlavaNextError:
    if not report.sampled:
        return DataError("the mix holds no records at all", "raise an amount in sampling_strategy")
    return DataError(
        f"all {report.sampled} records are bad, and nothing was written",
        "is media_root the folder that the paths start from? " + ("" if report.rejects else "--rejects FILE lists all"),
        details=listed[:10],
    )
