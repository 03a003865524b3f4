"""`mix` from end to end: index, sample, check, convert, write. The only module of the folder that writes the output.

    mix.yaml ─▶ chunks of each data set ─▶ chosen records ─▶ workers: inspect ─▶ check files ─▶ convert ─▶ one file

A few chunks are under way at a time and leave in the order they came, so memory stays the same however long the
input is.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from llavanext_cli.errors import DataError, LlavaNextError
from llavanext_cli.machine.cores import usable_cores
from llavanext_cli.mixing import mindformers_format
from llavanext_cli.mixing.cache import VerdictCache
from llavanext_cli.mixing.lengths import plan_lengths
from llavanext_cli.mixing.media import LEVELS
from llavanext_cli.mixing.mixfile import DataSet, load_mix_file
from llavanext_cli.mixing.output import JSON, PAGE, OutputFile, check_output_file
from llavanext_cli.mixing.pipeline import Pipeline, Progress
from llavanext_cli.mixing.plan import Plan
from llavanext_cli.mixing.pool import Pool
from llavanext_cli.mixing.report import MixReport, SourceReport, report_page
from llavanext_cli.mixing.samples import HEADER_KEY, HEADER_VERSION
from llavanext_cli.mixing.spool import Spool
from llavanext_cli.mixing.worker import ChunkJob, ChunkResult, Context, Source, file_state

FORMATS = ("llavanext", "mindformers")
ON_BAD = ("drop", "fail")
LISTED_FAULTS = 1000
"""Rejected records that `on_bad="fail"` names in its error; `rejects` holds all of them."""


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
    frames: int | None = None,
    tokenizer: Path | None = None,
    max_tokens: int | None = None,
    preset: str | None = None,
    time_limit: float = 60.0,
    page: Path | None = None,
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
        frames: frames of a clip that training will use, for the check "full" and for counting; 16 if no preset tells.
        tokenizer: folder with tokenizer.model and config.json; with it the tokens of every sample are counted.
        max_tokens: samples of more tokens are bad.
        preset: name or file; its seq_length and frames stand for `max_tokens` and `frames` where those are None.
        time_limit: seconds that the check of one file may take.
        page: an HTML file for the report, written whenever the rejects are.
        force: replace what is there.
        dry_run: do all but write; the cache is kept.
        progress: called with (records done, records in all).

    Raises:
        ConfigError: the mix file is wrong, or tokens cannot be counted with these settings.
        CheckpointError: `tokenizer` is no folder of a tokenizer.
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
    _check_names(out, rejects, page)
    out, rejects, page = out.absolute(), rejects and rejects.absolute(), page and page.absolute()
    format = format or ("mindformers" if out.suffix == ".json" else "llavanext")
    workers = max(1, workers or usable_cores())
    data_sets = load_mix_file(mix_file)
    lengths, frames = plan_lengths(tokenizer, max_tokens, preset, frames, check)
    needs_cache = check in ("header", "full")
    targets = [(t, begins) for t, begins in ((out, JSON), (rejects, JSON), (page, PAGE)) if t and not dry_run]
    inputs = [mix_file.absolute(), *(data_set.json_path for data_set in data_sets)]
    _check_targets(targets, _cache_path(out) if needs_cache else None, inputs, force)
    report = MixReport(out, not dry_run, check, format, seed, [SourceReport(d) for d in data_sets])
    if not dry_run:
        report.rejects = rejects
    elif rejects or page:
        report.notes.append("a dry run writes neither --rejects nor --report")
    report.max_tokens = lengths.max_tokens if lengths else None
    plan = Plan(data_sets, report.sources, seed)
    if needs_cache and not plan.walk_now():  # what is wrong with a data set must not come out after hours of checks
        raise _no_records()
    with ExitStack() as stack:
        body, listing, sheet = (
            stack.enter_context(OutputFile(None if dry_run else target, force)) for target in (out, rejects, page)
        )
        cache = VerdictCache(_cache_path(out) if needs_cache and out.parent.is_dir() else None)
        stack.callback(cache.close)
        spool = stack.enter_context(Spool())
        context = Context(tuple(_source(d) for d in data_sets), check, format, frames, lengths, spool.fd)
        pool = stack.enter_context(Pool("llavanext_cli.mixing.worker", context, workers, inherited=[spool.fd]))
        run = Pipeline(context, plan, pool, spool, cache, time_limit, report, progress)
        problems = _write(run.results(), report, body, listing)
        if needs_cache and not cache.is_kept:
            why = "is no cache of llavanext mix" if cache.is_strange else "could not be used"
            report.notes.append(f"{_cache_path(out)} {why}: the checks of this run are not remembered")
        if not report.sampled:
            raise _no_records()
        sheet.write(report_page(report).encode(errors="replace"))  # a name on Linux may be no text
        for file in (body, listing, sheet):
            file.finish()  # a disk that is full now leaves none of them
        listing.commit()
        sheet.commit()
        if on_bad == "fail" and report.dropped:
            raise _failure(report, problems)
        if not report.kept:
            raise _nothing_left(report, problems)
        body.commit()
    report.seconds = time.monotonic() - started
    return report


def _check_names(out: Path, rejects: Path | None, page: Path | None) -> None:
    if Path("-") in (out, rejects, page):
        raise DataError("-: a mix writes whole files, and not to stdout", "name a file for it, such as samples.jsonl")
    if page and page.suffix.lower() not in (".html", ".htm"):
        raise DataError(f"{page}: the report is an HTML page", "give it a name that ends in .html")


def _check_targets(
    targets: Sequence[tuple[Path, tuple[bytes, ...]]], cache: Path | None, inputs: Sequence[Path], force: bool
) -> None:
    """The output, the rejects, the page (each with how such a file begins) and the cache: different files, none of them
    an input, each writable."""
    written = [target for target, _ in targets] + ([cache] if cache else [])
    places = [os.path.realpath(target) for target in written]
    twice = [place for place in places if places.count(place) > 1]
    if twice:
        raise DataError(f"{twice[0]}: one file would overwrite the other", "name another for --rejects and --report")
    for target in written:
        if any(target.exists() and target.samefile(path) for path in inputs):
            raise DataError(f"{target} is what this mix is made from", "name another file for the output")
    for target, begins in targets:
        check_output_file(target, force, begins)


def _write(
    results: Iterator[tuple[ChunkJob, ChunkResult]], report: MixReport, body: OutputFile, listing: OutputFile
) -> list[str]:
    """Write chunks as they come; returns the first rejected records as lines for an error."""
    tagged_form = report.format == "mindformers"
    encoder = msgspec.json.Encoder()
    listed: list[str] = []
    body.write((mindformers_format.OPENING if tagged_form else _header(report) + "\n").encode())
    empty = True
    for job, result in results:
        source = report.sources[job.source]
        source.kept += result.kept
        source.dropped.update(fault.reason for fault in result.faults)
        report.contents.update(result.contents)
        report.sizes.update(result.sizes)
        report.tokens.update(result.tokens)
        if tagged_form and result.body and not empty:
            body.write(mindformers_format.BETWEEN.encode())
        body.write(result.body)
        empty = empty and not result.body
        for fault in result.faults:
            row = {
                "source": source.data_set.name,
                "file": os.fsencode(source.data_set.json_path).decode(errors="replace"),  # a name may be no text
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
        body.write((mindformers_format.CLOSING if not empty else mindformers_format.EMPTY[1:]).encode())
    return listed


def _header(report: MixReport) -> str:
    """The first line of the output. Roots inside the output's own folder are relative, so that both move together."""
    roots = {}
    for source in report.sources:
        root = source.data_set.media_root
        inside = root.is_relative_to(report.out.parent)
        roots[source.data_set.name] = str(root.relative_to(report.out.parent)) if inside else str(root)
    head: dict[str, Any] = {HEADER_KEY: HEADER_VERSION, "roots": roots, "seed": report.seed, "check": report.check}
    head["strategies"] = {source.data_set.name: source.data_set.strategy_text for source in report.sources}
    return msgspec.json.encode(head).decode()


def _source(data_set: DataSet) -> Source:
    root = os.path.join(str(data_set.media_root), "")
    return Source(data_set.name, str(data_set.json_path), root, file_state(data_set.json_path))


def _cache_path(out: Path) -> Path:
    return out.with_name(out.name + ".cache")


def _no_records() -> LlavaNextError:
    return DataError("the mix holds no records at all", "raise an amount in sampling_strategy, or add a data set")


def _failure(report: MixReport, listed: list[str]) -> LlavaNextError:
    total = report.dropped.total()
    if total > len(listed):
        listed = [*listed, f"... and {total - len(listed)} more"]
    hint = (
        f"all are in {report.rejects}" if report.rejects else "--on-bad drop leaves them out; --rejects FILE lists them"
    )
    return DataError(f"{total} of {report.sampled} records are bad, and no samples were written", hint, details=listed)


def _nothing_left(report: MixReport, listed: list[str]) -> LlavaNextError:
    root = "is media_root the folder that the paths start from? " if report.dropped["missing"] else ""
    where = f"all are in {report.rejects}" if report.rejects else "--rejects FILE lists all"
    return DataError(
        f"all {report.sampled} records are bad, and no samples were written", root + where, details=listed[:10]
    )
