"""`run_fetch` and `run_check`: from a request to a folder that `mix`, `convert` and `train` take.

names ──▶ plan ──▶ (claim) compare with the folder ──▶ enough disk? ──▶ complete ──▶ what to run next
"""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.errors import ConfigError, DataError, FetchError
from llavanext_cli.fetching.folder import LISTED, Folder, Progress, silent
from llavanext_cli.fetching.manifest import ArtifactRecord, Manifest
from llavanext_cli.fetching.next_steps import next_commands
from llavanext_cli.fetching.plan import Selection, Space, plan_files, plan_space
from llavanext_cli.fetching.remote import STATE, RemoteFile
from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.sources import Sources
from llavanext_cli.files import claim


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
        fetched, adopted, ready: files that were downloaded, recognised by their digest, and verified earlier.
        unverified: files that were downloaded and have no published digest, so only the size could be compared.
        transferred: bytes of the downloaded files that had not arrived before.
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


@dataclass(frozen=True)
class CheckReport:
    """What a check found: files and bytes read, what was broken, and how many bytes the repair took.

    `incomplete` names artifacts of which files are missing because their fetch has not ended.
    """

    folder: Path
    files: int
    bytes: int
    broken: tuple[str, ...]
    repaired: bool
    incomplete: tuple[str, ...]
    transferred: int
    seconds: float


def run_fetch(request: FetchRequest, progress: Progress = silent) -> FetchReport:
    """Bring artifacts into a folder: whole, verified, unpacked, at their places.

    Args:
        progress: opens a named stage of the work.

    Raises:
        ConfigError, DataError, FetchError: with the reason. What has arrived is kept, and the next call resumes.
        KeyboardInterrupt: likewise.
    """
    started = time.monotonic()
    root = _absolute(request.to)
    with _claimed(root, request):
        folder = Folder(root, request, Sources(request), progress)
        selections = plan_files(folder.sources, request, folder.manifest)
        wanted = list({file.path: file for selection in selections for file in selection.files}.values())
        comparison = folder.compare(wanted)
        if comparison.changed and not request.force:
            raise DataError(
                f"{root}: files that differ from what would be fetched: {len(comparison.changed)}",
                f"replace them with --force, repair what was fetched with llavanext fetch --check {root}, "
                "or choose another folder",
                details=_shortened(comparison.changed),
            )
        comparison.missing += [file for file in wanted if file.path in comparison.changed]
        space = _space(folder, comparison.missing)
        following: Sequence[str] = ()
        if not request.dry_run:
            space.check(root)
            _record_artifacts(folder.manifest, selections)
            folder.complete(comparison)
            following = _next_commands(folder.manifest, root)
        return FetchReport(
            folder=root,
            dry_run=request.dry_run,
            artifacts=tuple(_report(selection, folder.manifest) for selection in selections),
            fetched=len(comparison.missing),
            adopted=len(comparison.adopted),
            ready=len(comparison.ready),
            unverified=sum(not file.digest for file in comparison.missing),
            transferred=space.transfer,
            needed=space.needed,
            free=space.free,
            seconds=time.monotonic() - started,
            next=tuple(following),
        )


def run_check(request: FetchRequest, progress: Progress = silent) -> CheckReport:
    """Read every file that was fetched into a folder, compare digests, and fetch again what is broken.

    The network is used only when something is broken. With `request.dry_run` nothing is repaired.

    Raises:
        DataError: the folder has no files that llavanext fetch downloaded; or something is broken and not repaired.
        FetchError: as `run_fetch`.
    """
    started = time.monotonic()
    root = _absolute(request.to)
    if not (root / STATE / "manifest.json").is_file():
        raise DataError(
            f"{root} has no files that llavanext fetch downloaded", "fill it with `llavanext fetch NAME --to FOLDER`"
        )
    with _claimed(root, request):
        folder = Folder(root, request, Sources(request), progress)
        manifest = folder.manifest
        comparison = folder.compare(manifest.wanted(manifest.files), rehash=True)
        if comparison.broken and request.dry_run:
            raise DataError(
                f"{root}: broken or missing files: {len(comparison.broken)}",
                f"repair them: llavanext fetch --check {root}",
                details=_shortened(comparison.broken),
            )
        space = _space(folder, comparison.missing)
        if not request.dry_run:
            space.check(root)
            folder.complete(comparison)
        return CheckReport(
            folder=root,
            files=comparison.read,
            bytes=comparison.size,
            broken=tuple(comparison.broken),
            repaired=bool(comparison.broken),
            incomplete=tuple(name for name in manifest.artifacts if not manifest.is_complete(name)),
            transferred=space.transfer,
            seconds=time.monotonic() - started,
        )


@contextmanager
def _claimed(root: Path, request: FetchRequest) -> Iterator[None]:
    """Hold the folder while it is written, and explain a full disk."""
    if root.exists() and not root.is_dir():
        raise ConfigError(f"{root} is a file, not a folder", "choose another --to")
    try:
        with nullcontext() if request.dry_run else claim(root / STATE / "download"):
            yield
    except OSError as fault:
        if fault.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise FetchError(f"{root}: the disk is full", "make room and run the same command again: it resumes") from fault


def _absolute(path: Path) -> Path:
    try:
        return Path(os.path.abspath(path.expanduser()))
    except RuntimeError:
        raise ConfigError(f"{path}: no such user", f"for a folder of that name write ./{path}") from None


def _space(folder: Folder, missing: Iterable[RemoteFile]) -> Space:
    request = folder.request
    return plan_space(
        folder.root, [(file, folder.stage(file)) for file in missing], request.keep_archives, request.jobs
    )


def _record_artifacts(manifest: Manifest, selections: Sequence[Selection]) -> None:
    """Write down which files are wanted. Parts of an artifact that were fetched earlier still belong to it."""
    for selection in selections:
        listing, paths = selection.listing, tuple(file.path for file in selection.files)
        before = manifest.artifacts.get(selection.name)
        if before is not None and (before.source, before.revision) == (listing.source, listing.revision):
            paths = tuple(dict.fromkeys((*before.paths, *paths)))
        manifest.artifacts[selection.name] = ArtifactRecord(
            listing.source, listing.where, listing.requested, listing.revision, paths, selection.offered
        )


def _next_commands(manifest: Manifest, root: Path) -> list[str]:
    complete = {name: record.paths for name, record in manifest.artifacts.items() if manifest.is_complete(name)}
    narrowed = {name for name, record in manifest.artifacts.items() if len(record.paths) < record.offered}
    return next_commands(complete, root, narrowed)


def _report(selection: Selection, manifest: Manifest) -> ArtifactReport:
    listing = selection.listing
    sizes = [file.size or getattr(manifest.files.get(file.path), "size", 0) for file in selection.files]
    return ArtifactReport(
        selection.name, listing.source, listing.where, listing.requested, listing.revision, len(sizes), sum(sizes)
    )


def _shortened(lines: Sequence[str]) -> list[str]:
    return [*lines[:LISTED], *([f"and {len(lines) - LISTED} more"] if len(lines) > LISTED else [])]
