"""`mix` from end to end: index, sample, check, convert, write.

    mix.yaml ─▶ Plan: chunks and the chosen records ─▶ MediaChecker: results of their files ─▶ convert ─▶ one file

A few chunks are under way at a time and leave in the order they came, so memory stays the same however long the
input is. Workers read, check and convert; only this process writes.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, BinaryIO

import msgspec

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.machine.cores import usable_cores
from llavanext_cli.mixing import mindformers_format
from llavanext_cli.mixing.cache import CheckCache
from llavanext_cli.mixing.conversion import Context, Converted, Job, Source, file_state
from llavanext_cli.mixing.json_index import CHUNK_BYTES
from llavanext_cli.mixing.media_check import MediaChecker
from llavanext_cli.mixing.mixfile import DataSet, load_mix_file
from llavanext_cli.mixing.output import check_outputs, open_output
from llavanext_cli.mixing.plan import Plan
from llavanext_cli.mixing.report import MixReport, SourceReport, report_page
from llavanext_cli.mixing.request import MixRequest
from llavanext_cli.mixing.samples import HEADER_KEY, HEADER_VERSION
from llavanext_cli.mixing.size_limits import build_counter, plan_size_limits
from llavanext_cli.mixing.workers import WorkerPool

LISTED_REJECTS = 1000
"""Rejected records that the error of `on_bad="fail"` lists; `rejects` has all of them."""

Progress = Callable[[int, int], None]


def run_mix(request: MixRequest, progress: Progress | None = None) -> MixReport:
    """Write one file of samples from the data sets of a mix file.

    Args:
        progress: called with (records done, records in all).

    Raises:
        ConfigError: the mix file is wrong, or tokens cannot be counted with these settings.
        CheckpointError: `tokenizer` is not a folder of a tokenizer.
        DataError: a data set cannot be read, the output cannot be written, or records are bad and `on_bad` is "fail".
    """
    started = time.monotonic()
    data_sets = load_mix_file(request.mix_file)
    limits, frames = plan_size_limits(
        request.tokenizer, request.max_tokens, request.preset, request.frames, request.check
    )
    counted_by = build_counter(limits).fingerprint if limits else None
    check_outputs(request, [request.mix_file, *(data_set.json_path for data_set in data_sets)])
    report = _new_report(request, data_sets)
    report.max_tokens = limits.max_tokens if limits else None
    context = Context(tuple(map(_source, data_sets)), request.check, request.output_format, frames, limits)
    plan = Plan(report.sources, request.seed)
    if request.reads_media and not plan.complete():  # an error in a data set must not appear after hours of checks
        raise _no_records()
    out, rejects, page = (None if request.dry_run else path for path in (request.out, request.rejects, request.page))
    with open_output(out) as samples:
        with open_output(rejects) as listing, open_output(page) as html:
            lines = _convert(request, context, plan, report, samples, listing, counted_by, progress)
            if not report.sampled:
                raise _no_records()
            html.write(report_page(report).encode(errors="replace"))  # a name on Linux may not be Unicode
            samples.flush()  # a disk that is full now leaves none of the three
        if request.on_bad == "fail" and report.dropped:
            raise _bad_records(report, lines)
        if not report.kept:
            raise _all_bad(report, lines)
    report.seconds = time.monotonic() - started
    return report


def _new_report(request: MixRequest, data_sets: Iterable[DataSet]) -> MixReport:
    report = MixReport(
        out=request.out.absolute(),
        written=not request.dry_run,
        check=request.check,
        format=request.output_format,
        seed=request.seed,
        sources=[SourceReport(data_set) for data_set in data_sets],
        rejects=request.rejects.absolute() if request.rejects and not request.dry_run else None,
    )
    if request.dry_run and (request.rejects or request.page):
        report.notes.append("a dry run writes neither --rejects nor --report")
    return report


def _convert(
    request: MixRequest,
    context: Context,
    plan: Plan,
    report: MixReport,
    samples: BinaryIO,
    rejects: BinaryIO,
    counted_by: str | None,
    progress: Progress | None,
) -> list[str]:
    """Run the workers and write what they convert; returns the first rejected records as lines for an error."""
    done = 0

    def show(more: float = 0) -> None:
        if progress:
            progress(done + int(more), max(done, plan.expected))

    with ExitStack() as stack:
        has_folder = request.cache and request.cache.parent.is_dir()
        cache = CheckCache(request.cache.absolute() if has_folder else None)
        stack.callback(cache.close)
        pool = stack.enter_context(WorkerPool(context, _count_workers(request, report)))
        checker = MediaChecker(pool, context, cache, request.time_limit, show)
        jobs = checker.check(plan) if request.reads_media else plan
        writer = _Writer(report, samples, rejects, counted_by)
        for job, converted in pool.convert(jobs):
            writer.add(job, converted)
            done += len(job.chosen)
            show()
        writer.finish()
        report.files, report.files_known = checker.known + checker.checked, checker.known
        if request.cache and not cache.is_kept:
            why = "is not a cache of llavanext mix" if cache.is_foreign else "cannot be used"
            report.notes.append(f"{request.cache} {why}: the checks of this run are not remembered")
    return writer.rejected


def _count_workers(request: MixRequest, report: MixReport) -> int:
    """Workers, but not more than there are chunks, and only one for each few files."""
    wanted = request.workers or usable_cores()
    if request.reads_media:
        return max(1, min(wanted, report.sampled // 4))
    size = sum(source.data_set.json_path.stat().st_size for source in report.sources)
    return max(1, min(wanted, size // CHUNK_BYTES + 1))


class _Writer:
    """Writes converted chunks in their order, and adds them to the report."""

    def __init__(self, report: MixReport, samples: BinaryIO, rejects: BinaryIO, counted_by: str | None):
        self._report, self._samples, self._rejects = report, samples, rejects
        self._is_list, self._is_empty = report.format == "mindformers", True
        self.rejected: list[str] = []
        samples.write(mindformers_format.OPENING.encode() if self._is_list else _header(report, counted_by))

    def add(self, job: Job, converted: Converted) -> None:
        report, source = self._report, self._report.sources[job.source]
        source.kept += converted.kept
        source.dropped.update(reject.reason for reject in converted.rejects)
        report.contents.update(converted.contents)
        report.sizes.update(converted.sizes)
        report.tokens.update(converted.tokens)
        if converted.body:
            if self._is_list and not self._is_empty:
                self._samples.write(mindformers_format.BETWEEN.encode())
            self._samples.write(converted.body)
            self._is_empty = False
        file = os.fsencode(source.data_set.json_path).decode(errors="replace")  # a name may not be Unicode
        for reject in converted.rejects:
            row = {
                "source": source.data_set.name,
                "file": file,
                "line": reject.line,
                "record": reject.number,
                "id": reject.id,
                "reason": reject.reason,
                "detail": reject.detail,
            }
            self._rejects.write(msgspec.json.encode(row) + b"\n")
            if len(self.rejected) < LISTED_REJECTS:
                self.rejected.append(f"{file}, line {reject.line}, id {reject.id or '-'}: {reject.detail}")

    def finish(self) -> None:
        if self._is_list:
            end = mindformers_format.EMPTY[1:] if self._is_empty else mindformers_format.CLOSING
            self._samples.write(end.encode())


def _header(report: MixReport, counted_by: str | None) -> bytes:
    """The first line of the output. Media folders inside the output's own folder are relative: both move together."""
    roots = {}
    for source in report.sources:
        root = source.data_set.media_root
        inside = root.is_relative_to(report.out.parent)
        roots[source.data_set.name] = str(root.relative_to(report.out.parent)) if inside else str(root)
    head: dict[str, Any] = {HEADER_KEY: HEADER_VERSION, "roots": roots, "seed": report.seed, "check": report.check}
    head["strategies"] = {source.data_set.name: source.data_set.strategy_text for source in report.sources}
    if counted_by:
        head["counted_by"] = counted_by
    return msgspec.json.encode(head) + b"\n"


def _source(data_set: DataSet) -> Source:
    root = os.path.join(str(data_set.media_root), "")
    return Source(data_set.name, str(data_set.json_path), root, file_state(data_set.json_path))


def _no_records() -> LlavaNextError:
    return DataError("the mix has no records at all", "raise an amount in sampling_strategy, or add a data set")


def _bad_records(report: MixReport, lines: list[str]) -> LlavaNextError:
    total = report.dropped.total()
    if total > len(lines):
        lines = [*lines, f"... and {total - len(lines)} more"]
    hint = (
        f"all are in {report.rejects}" if report.rejects else "--on-bad drop leaves them out; --rejects FILE lists them"
    )
    return DataError(f"{total} of {report.sampled} records are bad, and no samples were written", hint, details=lines)


def _all_bad(report: MixReport, lines: list[str]) -> LlavaNextError:
    root = "is media_root the folder that the paths start from? " if report.dropped["missing"] else ""
    where = f"all are in {report.rejects}" if report.rejects else "--rejects FILE lists all"
    return DataError(
        f"all {report.sampled} records are bad, and no samples were written", root + where, details=lines[:10]
    )
