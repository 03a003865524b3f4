"""`llavanext mix`: from raw data sets to one file of checked samples."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavanext_cli import console
from llavanext_cli.options import Force, Json, Out, Preset, Seed, Workers
from llavanext_cli.signals import raise_on_termination

if TYPE_CHECKING:
    from llavanext_cli.mixing.report import MixReport


class Check(str, Enum):
    """How far media are checked."""

    none = "none"
    exists = "exists"
    header = "header"
    full = "full"


class OnBad(str, Enum):
    """What happens to a bad record."""

    drop = "drop"
    fail = "fail"


class Format(str, Enum):
    """Forms of the output."""

    llavanext = "llavanext"
    mindformers = "mindformers"


def mix(
    mix_file: Annotated[
        Path, typer.Argument(metavar="MIX.yaml", help="Which data sets, and how much of each.", show_default=False)
    ],
    out: Out,
    seed: Seed = 0,
    check: Annotated[
        Check,
        typer.Option(
            help="Read no media, check that they exist, read their headers (sizes are recorded), or decode them as "
            "training would."
        ),
    ] = Check.header,
    workers: Workers = None,
    on_bad: Annotated[
        OnBad, typer.Option(help="Leave bad records out, or fail at the end and list them.")
    ] = OnBad.drop,
    rejects: Annotated[
        Path | None, typer.Option(help="Write every bad record with its reason to this file, as JSON Lines.")
    ] = None,
    format: Annotated[
        Format | None,
        typer.Option(
            help="JSON Lines of llavanext, or the JSON of MindFormers' former llava_next.",
            show_default="mindformers for a name in .json, else llavanext",
        ),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(
            help="Count and record every sample's tokens, tiles and frames, with this folder's tokenizer.model and "
            "config.json: train need not count again."
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Samples of more tokens are bad.")] = None,
    preset: Preset = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000, help="Frames of a video that training will use.", show_default="the preset's, or 16"
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(min=0.1, max=1e6, help="Seconds that the check of one file may take.")
    ] = 60.0,
    page: Annotated[
        Path | None,
        typer.Option(
            "--report", metavar="FILE.html", help="Write the report with its plots to this file, as an HTML page."
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Read and check everything, write no output.")] = False,
    force: Force = False,
    json: Json = False,
) -> None:
    r"""Sample data sets, check every record and its media, and write one file for training.

    MIX.yaml lists the data sets:

      datasets:
        - json_path: images/llava_v1_5_mix665k.json
          sampling_strategy: random:10%  # or all, first:N, end:N; N or N%
          media_root: images             # default: the folder of json_path
          name: mix665k                  # default: the name of json_path

    With --tokenizer the tokens of every sample are counted; a preset says how many fit, and the frames of a video.
    OUT.cache remembers the checks of media, so that the next mix of the same files takes seconds.

    Example:
      llavanext mix mix.yaml --out samples.jsonl --check full --rejects bad.jsonl
      llavanext mix mix.yaml --out samples.jsonl \
        --tokenizer CHECKPOINT --preset video-7b-stage2

    Next: llavanext train video-7b-stage2 --data samples.jsonl --checkpoint CHECKPOINT --out run
    """
    from llavanext_cli.mixing.pipeline import run_mix
    from llavanext_cli.mixing.request import MixRequest

    if time_limit != time_limit:  # nan passes every comparison
        raise typer.BadParameter("nan is not a number of seconds", param_hint="--time-limit")
    request = MixRequest(
        mix_file=mix_file,
        out=out,
        seed=seed,
        check=check.value,
        workers=workers,
        on_bad=on_bad.value,
        rejects=rejects,
        format=format.value if format else None,
        frames=frames,
        tokenizer=tokenizer,
        max_tokens=max_tokens,
        preset=preset,
        time_limit=time_limit,
        page=page,
        force=force,
        dry_run=dry_run,
    )
    with raise_on_termination(), console.progress("Mixing", "records") as progress:
        report = run_mix(request, progress)
    if json:
        console.out_json(report.to_dict())
        return
    show_report(report)
    if report.written:
        if page:
            console.say(f"The report is in {page}")
        console.next_step(f"llavanext train PRESET --data {shlex.quote(str(out))} --checkpoint CHECKPOINT --out RUN")


def show_report(report: MixReport) -> None:
    """Print a report as tables: the records of each source, why some were dropped, how large the media are."""
    from llavanext_cli.mixing.report import REASONS, SOURCE_COLUMNS, bar_label, size_histogram, token_histogram

    rows = [source.row for source in report.sources]
    if len(rows) > 1:
        rows.append(("total", "", sum(row[2] for row in rows), report.sampled, report.kept, report.dropped.total()))
    console.table(SOURCE_COLUMNS, rows)
    if report.dropped:
        console.out()
        dropped = [
            (s.data_set.name, REASONS[reason], count)
            for s in report.sources
            for reason, count in s.dropped.most_common()
        ]
        console.table(("source", "dropped for", "records"), dropped)
    if report.sizes:
        console.out()
        bars = [(kind, bar_label(low), count) for (kind, low), count in sorted(size_histogram(report.sizes).items())]
        console.table(("media", "longer side", "samples"), bars)
    if report.tokens:
        console.out()
        bars = [(bar_label(low), count) for low, count in sorted(token_histogram(report.tokens).items())]
        console.table(("tokens", "samples"), bars)
        fit = f", and {report.max_tokens} fit: {report.dropped['too_long']} are too long" if report.max_tokens else ""
        console.say(f"The longest sample has {max(report.tokens)} tokens{fit}")
    for note in report.notes:
        console.warn(note)
    verb = "Wrote" if report.written else "Would write"
    where = f"; bad records are in {report.rejects}" if report.rejects and report.dropped else ""
    console.say(f"{verb} {report.kept} samples to {report.out} in {report.seconds:.1f} s{where}")
