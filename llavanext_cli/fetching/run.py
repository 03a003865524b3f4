"""`run_fetch`: from names to a folder that `mix`, `convert` and `train` take.

list ──▶ select ──▶ (lock) compare with the folder ──▶ enough disk? ──▶ work ──▶ manifest ──▶ what to run next
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llavanext_cli.errors import ConfigError, DataError, FetchError
from llavanext_cli.fetching.digest import Expected
from llavanext_cli.fetching.faults import UnreachableError
from llavanext_cli.fetching.folder import Folder, locked_folder
from llavanext_cli.fetching.manifest import ArtifactRecord, Manifest
from llavanext_cli.fetching.net import Limits, Net
from llavanext_cli.fetching.network import open_network
from llavanext_cli.fetching.nextsteps import next_commands
from llavanext_cli.fetching.paths import absolute, files
from llavanext_cli.fetching.plan import (
    ADOPT,
    CHANGED,
    FOREIGN,
    READY,
    Space,
    Step,
    Wanted,
    compare_folder,
    join_wanted,
    list_artifact,
    offered_paths,
    parse_shards,
    plan_space,
    recorded_listing,
    select_files,
)
from llavanext_cli.fetching.registry import HUB, Artifact, find_artifact
from llavanext_cli.fetching.remote import Listing
from llavanext_cli.fetching.transfer import probe_size
from llavanext_cli.fetching.unpack import UnpackLimits
from llavanext_cli.fetching.work import StageOpener, Worker, address_of, silent_stage
from llavanext_cli.units import format_size


@dataclass(frozen=True)
class ArtifactReport:
    """One artifact: where it came from, and how many files and bytes of it are in the folder, archives included."""

    name: str
    source: str
    where: str
    requested: str
    revision: str
    files: int
    bytes: int


@dataclass(frozen=True)
class FetchReport:
    """What a fetch did, or with `dry_run` would do.

    Attributes:
        transferred: bytes of content that came over the network; with `dry_run`, that would.
        fetched, adopted, ready: files that were downloaded, found whole, and known to be there.
        unverified: files that were downloaded and of which no digest is published: their size alone was checked.
        needed, free: bytes of disk.
        next: commands to run now.
    """

    folder: Path
    dry_run: bool
    artifacts: tuple[ArtifactReport, ...]
    fetched: int
    adopted: int
    ready: int
    unverified: int
    transferred: int
    needed: int
    free: int
    seconds: float
    next: tuple[str, ...]


def run_fetch(
    names: Sequence[str],
    to: Path,
    *,
    source: str = HUB,
    endpoint: str | None = None,
    revision: str | None = None,
    only: Sequence[str] = (),
    shards: str | None = None,
    jobs: int = 4,
    keep_archives: bool = False,
    dry_run: bool = False,
    force: bool = False,
    limits: Limits | None = None,
    unpack_limits: UnpackLimits | None = None,
    artifacts: Sequence[Artifact] = (),
    stage: StageOpener = silent_stage,
    note: Callable[[str], None] = lambda line: None,
) -> FetchReport:
    """Bring artifacts into a folder: whole, checked, unpacked, at their places.

    Args:
        names: artifacts of the registry, `org/repo`, `dataset:org/repo`, or plain addresses.
        source: "hf" or "modelscope".
        endpoint: the server, instead of HF_ENDPOINT (or MODELSCOPE_DOMAIN) and the usual one.
        revision: commit, tag or branch, instead of the registry's.
        only: globs; other files are left out.
        shards: numbers of the shards wanted, as "1,3-5".
        jobs: downloads at once.
        keep_archives: leave archives beside what was unpacked from them.
        dry_run: plan, and touch nothing.
        force: replace files that are there and differ.
        unpack_limits: what an archive may become; only tests set other limits than the usual ones.
        artifacts: further artifacts, of no registry; only tests have some.
        stage: opens a named stage of the work, for progress.
        note: is told what is being waited for.

    Raises:
        ConfigError, DataError, FetchError: see there. What has arrived is kept, and the next call goes on from it.
        KeyboardInterrupt: likewise.
    """
    started = time.monotonic()
    chosen = [*artifacts, *(find_artifact(name) for name in dict.fromkeys(names))]
    if not chosen:
        raise ConfigError("nothing to fetch is named", "`llavanext fetch --list` shows what there is.")
    if revision and len(chosen) > 1:
        raise ConfigError("--revision is of one artifact, and several are named", "Fetch them one by one.")
    numbers = parse_shards(shards)
    to = absolute(to)
    for text in (*names, *only, revision or "", endpoint or ""):
        if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
            raise ConfigError(f"{text!a} is not valid text", "Type it anew, or set a UTF-8 locale.")

    def report(
        steps: Sequence[Step], space: Space, transferred: int, following: Sequence[str], manifest: Manifest
    ) -> FetchReport:
        adopted = sum(step.status == ADOPT for step in steps)
        ready = sum(step.status == READY for step in steps)
        return FetchReport(
            folder=to,
            dry_run=dry_run,
            artifacts=tuple(_report(a, x, steps, manifest) for a, x in zip(chosen, listings, strict=True)),
            fetched=len(steps) - adopted - ready,
            adopted=adopted,
            ready=ready,
            unverified=sum(step.status not in (READY, ADOPT) and not step.wanted.expected.version for step in steps),
            transferred=transferred,
            needed=space.needed,
            free=space.free,
            seconds=time.monotonic() - started,
            next=tuple(following),
        )

    with open_network(source, endpoint, limits, note, to) as net:
        listings = [_list(net, artifact, source, endpoint, revision, to) for artifact in chosen]
        pairs = [(a, x) for a, x in zip(chosen, listings, strict=True) if not x.offline]
        wanted = join_wanted([select_files(a, x, only, numbers) for a, x in pairs], to)
        if dry_run:
            folder = Folder(to)
            wanted = [_sized(net, folder, item) for item in wanted]
            with stage("Checking") as shown:
                steps = [*compare_folder(folder, wanted, shown), *_offline_steps(folder, chosen, listings)]
            _refuse_changed(folder, steps, force)
            space = plan_space(folder, steps, keep_archives, jobs)
            return report(steps, space, space.transfer, (), folder.manifest)
        with locked_folder(to, note) as folder:
            with stage("Checking") as shown:
                steps = [*compare_folder(folder, wanted, shown), *_offline_steps(folder, chosen, listings)]
            _refuse_changed(folder, steps, force)
            space = plan_space(folder, steps, keep_archives, jobs)
            refuse_full(to, space)
            _record_artifacts(folder, pairs, wanted, note)
            worker = Worker(net, folder, jobs, keep_archives, force, stage, note, unpack_limits or UnpackLimits())
            worker.run(steps)
            _record_artifacts(folder, pairs, wanted, note)
            records = folder.manifest.artifacts.items()
            whole = {name: record.paths for name, record in records if record.complete}
            part = {name for name, record in records if record.narrowed}
        return report(steps, space, net.received, next_commands(whole, to, part), folder.manifest)


def _list(net: Net, artifact: Artifact, source: str, endpoint: str | None, revision: str | None, to: Path) -> Listing:
    """The artifact's listing; without a network, an empty one if it is complete in the folder already."""
    try:
        return list_artifact(net, artifact, source, endpoint, revision)
    except UnreachableError as fault:
        recorded = recorded_listing(Manifest.load(to), artifact, revision)
        if recorded is None:
            raise
        net.note(f"{fault.what}; going by what is in {to}")
        return recorded


def _sized(net: Net, folder: Folder, item: Wanted) -> Wanted:
    """With the size that the server says, where its listing (or an address) says none."""
    if item.expected.size is not None or item.origin.source == HUB or folder.as_recorded(item.path):
        return item
    return replace(item, expected=replace(item.expected, size=probe_size(net, address_of(item))))


def _offline_steps(folder: Folder, chosen: Sequence[Artifact], listings: Sequence[Listing]) -> list[Step]:
    """READY for each file of the artifacts that could not be asked about.

    Raises:
        UnreachableError: one of them is damaged, and there is no network to repair it.
    """
    steps = []
    for artifact, listing in zip(chosen, listings, strict=True):
        if not listing.offline:
            continue
        for path in folder.manifest.artifacts[artifact.name].paths:
            archive = folder.manifest.archives.get(path)
            whole = not folder.damaged_members(path) if archive else folder.as_recorded(path)
            record = archive or folder.manifest.files.get(path)
            if not whole or record is None:
                raise UnreachableError(
                    f"{path} is not whole, and the network cannot be reached to repair it",
                    "Check the network; or use a mirror (HF_ENDPOINT=https://…, --endpoint).",
                )
            steps.append(
                Step(Wanted(path, Expected(record.size, record.sha256), record.origin, (artifact.name,)), READY)
            )
    return steps


# -------------------------------------------------------------------------------------------------------------- refusal


def _refuse_changed(folder: Folder, steps: Sequence[Step], force: bool) -> None:
    foreign = [step.wanted.path for step in steps if step.status == FOREIGN]
    changed = [step.wanted.path for step in steps if step.status == CHANGED]
    if force or not (foreign or changed):
        return
    if foreign:
        raise ConfigError(
            f"{foreign[0]} in {folder.root} belongs to something else that was fetched there",
            "Use a folder for each; or replace it with --force.",
        )
    known = any(path in folder.manifest.files for path in changed)
    raise DataError(
        f"{folder.root} holds {files(len(changed))} already, other than would be fetched",
        "Replace them with --force"
        + (f", or repair what was fetched with llavanext fetch --check {folder.root}." if known else "."),
        details=changed[:20] + ([f"and {len(changed) - 20} more"] if len(changed) > 20 else []),
    )


def refuse_full(to: Path, space: Space) -> None:
    """Raises `FetchError` when the plan needs more disk than is free."""
    if space.needed > space.free:
        raise FetchError(
            f"{format_size(space.needed)} are needed in {to}, and {format_size(space.free)} are free",
            "Make room, choose another disk with --to, or fetch less with --only or --shards.",
        )


# ------------------------------------------------------------------------------------------------------------ recording


def _report(artifact: Artifact, listing: Listing, steps: Sequence[Step], manifest: Manifest) -> ArtifactReport:
    mine = [step.wanted for step in steps if artifact.name in step.wanted.artifacts]
    # A plain address says its size when it is asked for the file, and no earlier.
    found = {**manifest.files, **manifest.archives}
    size = sum(item.expected.size or (found[item.path].size if item.path in found else 0) for item in mine)
    return ArtifactReport(
        artifact.name, listing.source, listing.where, listing.requested, listing.revision, len(mine), size
    )


def _record_artifacts(
    folder: Folder,
    pairs: Sequence[tuple[Artifact, Listing]],
    wanted: Sequence[Wanted],
    note: Callable[[str], None],
) -> None:
    """Write down what was asked for, and whether all of it is there. A warm fetch writes nothing."""
    manifest = folder.manifest
    for artifact, listing in pairs:
        paths = tuple(item.path for item in wanted if artifact.name in item.artifacts)
        before = manifest.artifacts.get(artifact.name)
        if before is not None and (before.source, before.revision) == (listing.source, listing.revision):
            # Perhaps another part of the same artifact (--only, --shards): both belong to it.
            paths = tuple(dict.fromkeys((*before.paths, *paths)))
        elif before is not None and (left := set(before.paths) - set(paths) & set(manifest.files)):
            note(f"{files(len(left))} of revision {before.revision[:12]} stay in {folder.root}, such as {min(left)}")
        whole = all(path in manifest.files or path in manifest.archives for path in paths)
        record = ArtifactRecord(
            listing.source,
            listing.where,
            listing.requested,
            listing.revision,
            paths,
            complete=whole,
            narrowed=not offered_paths(artifact, listing) <= set(paths),
        )
        if before != record:
            folder.record_artifact(artifact.name, record)
