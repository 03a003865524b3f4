"""`llavanext fetch`: download models and data sets into a folder."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llavanext_cli import console, options
from llavanext_cli.units import format_size

if TYPE_CHECKING:
    from llavanext_cli.fetching.request import FetchRequest


class Source(str, Enum):
    """Where repositories are looked up."""

    hf = "hf"
    modelscope = "modelscope"


def fetch(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="NAME...",
            help="Artifacts (see --list), ORG/REPO, dataset:ORG/REPO, or addresses.",
            autocompletion=options.complete_artifact,
        ),
    ] = None,
    to: Annotated[Path | None, typer.Option("--to", help="Folder to fill.", show_default=False)] = None,
    list_artifacts: Annotated[
        bool, typer.Option("--list", help="List the artifacts that llavanext knows by name.")
    ] = False,
    check: Annotated[
        Path | None,
        typer.Option(
            "--check",
            metavar="DIR",
            help="Check all files that were fetched into DIR and repair broken ones; with --dry-run, only list them.",
            show_default=False,
        ),
    ] = None,
    source: Annotated[Source, typer.Option("--source", help="Where repositories are looked up.")] = Source.hf,
    endpoint: Annotated[
        str | None,
        typer.Option("--endpoint", metavar="URL", help="A mirror of the source.", show_default="HF_ENDPOINT"),
    ] = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="Commit, tag or branch of one artifact.", show_default="the list's"),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option("--only", metavar="GLOB", help="Fetch only files that match this pattern. May be repeated."),
    ] = None,
    shards: Annotated[
        str | None, typer.Option("--shards", metavar="1,3-5", help="Fetch only the video archives with these numbers.")
    ] = None,
    keep_archives: Annotated[
        bool, typer.Option("--keep-archives", help="Keep archives after they are unpacked.")
    ] = False,
    jobs: options.Jobs = 4,
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", min=0.1, metavar="SECONDS", help="Time without any data after which a connection is closed."
        ),
    ] = 30.0,
    retries: Annotated[
        int, typer.Option("--retries", min=0, help="Further attempts after one that received no data.")
    ] = 5,
    dry_run: options.DryRun = False,
    force: options.Force = False,
    json: options.Json = False,
) -> None:
    """Download models and data sets, verify them, and put them where the other commands look for them.

    Archives of the artifacts in --list are unpacked; those of other repositories and addresses stay as they are.
    A download that was cut off or killed resumes when the same command runs again. Tokens are read from HF_TOKEN
    (or MODELSCOPE_API_TOKEN), mirrors from HF_ENDPOINT, proxies from HTTPS_PROXY.

    Example:
      llavanext fetch video-7b --to models/video-7b

    More:
      llavanext fetch mix665k coco-train2017 --to data/images
      llavanext fetch video178k-academic --shards 1,2 --to data/videos
      llavanext fetch --check data/videos

    Next: llavanext convert models/video-7b models/video-7b-mindspore
    """
    given = {
        "a name": names,
        "--to": to,
        "--revision": revision,
        "--only": only,
        "--shards": shards,
        "--keep-archives": keep_archives,
        "--force": force,
    }
    if list_artifacts:
        given |= {"--check": check, "--dry-run": dry_run}
    useless = ", ".join(option for option, value in given.items() if value)
    if useless and list_artifacts:
        raise typer.BadParameter(f"--list only shows the artifacts: omit {useless}")
    if useless and check is not None:
        raise typer.BadParameter(f"--check takes a folder and repairs it: omit {useless}")
    if list_artifacts:
        _list(json)
        return
    if check is None and not names:
        raise typer.BadParameter("name what to fetch, or use --list or --check DIR")
    if check is None and to is None:
        from llavanext_cli.fetching.registry import find_artifact

        for name in names:
            find_artifact(name)  # an unknown name is reported first
        raise typer.BadParameter("--to FOLDER is missing")

    from llavanext_cli.fetching.request import FetchRequest

    request = FetchRequest(
        to=check or to,
        names=tuple(names or ()),
        source=source.value,
        endpoint=endpoint,
        revision=revision,
        only=tuple(only or ()),
        shards=shards,
        keep_archives=keep_archives,
        jobs=jobs,
        timeout=timeout,
        retries=retries,
        dry_run=dry_run,
        force=force,
    )
    try:
        (_fetch if check is None else _check)(request, json)
    except KeyboardInterrupt:
        console.say("What has arrived is kept: run the same command again to resume.")
        raise


def _list(json: bool) -> None:
    from llavanext_cli.fetching.registry import ARTIFACTS

    if json:
        console.out_json(list(ARTIFACTS.values()))
        return
    rows = []
    for artifact in ARTIFACTS.values():
        first = artifact.hub.repo if artifact.hub else artifact.web.url.partition("://")[2]
        rows.append((artifact.name, format_size(artifact.size), first, artifact.licence, artifact.purpose))
    console.table(("name", "size", "source", "licence", "purpose"), rows)


def _fetch(request: FetchRequest, json: bool) -> None:
    from llavanext_cli.fetching.run import run_fetch

    report = run_fetch(request, progress=lambda label: console.progress(label, "bytes"))
    if json:
        console.out_json(report)
        return
    for artifact in report.artifacts:
        where = f", from {artifact.where}" if artifact.where != artifact.name else ""
        revision = f" at {artifact.revision[:12]}" if where and artifact.revision else ""
        console.say(f"{artifact.name}: {_files(artifact.files)}, {format_size(artifact.bytes)}{where}{revision}")
    if request.dry_run:
        disk = f"{format_size(report.needed)} of disk needed, {format_size(report.free)} free"
        console.say(f"To fetch: {_files(report.fetched)}, {format_size(report.transferred)}; {disk}.")
        if report.needed > report.free:
            console.warn("the disk does not have enough free space")
        return
    if report.unverified:
        console.say(f"{_files(report.unverified)} without a published digest: only the size was compared.")
    existing = f"{report.ready} already there" + (f", {report.adopted} recognised" if report.adopted else "")
    console.say(f"{_files(report.fetched)} fetched ({format_size(report.transferred)}), {existing}: {report.folder}")
    for command in report.next:
        console.next_step(command)


def _check(request: FetchRequest, json: bool) -> None:
    from llavanext_cli.fetching.run import run_check

    report = run_check(request, progress=lambda label: console.progress(label, "bytes"))
    if json:
        console.out_json(report)
    elif report.broken:
        for line in report.broken:
            console.say(f"Broken: {line}")
        console.say(
            f"{_files(report.files)} read, {len(report.broken)} of them broken and now repaired "
            f"({format_size(report.transferred)} fetched)."
        )
    else:
        console.say(f"{_files(report.files)} read ({format_size(report.bytes)}): all are intact.")
    for name in report.incomplete:
        console.warn(f"the fetch of {name} has not ended: run it again to resume")


def _files(count: int) -> str:
    return f"{count} file{'' if count == 1 else 's'}"
