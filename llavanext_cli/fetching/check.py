"""`check_folder`: read everything that was fetched, and fetch again what is broken, and only that."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from llavanext_cli.errors import DataError
from llavanext_cli.fetching.digest import Digests, Expected, hash_file
from llavanext_cli.fetching.endpoint import chosen_endpoint
from llavanext_cli.fetching.folder import Folder, locked_folder
from llavanext_cli.fetching.manifest import ArchiveRecord, FileRecord, Member
from llavanext_cli.fetching.net import Limits, Net
from llavanext_cli.fetching.network import open_network
from llavanext_cli.fetching.paths import STATE, absolute
from llavanext_cli.fetching.plan import FETCH, REPAIR, Step, Wanted, plan_space
from llavanext_cli.fetching.pool import run_all
from llavanext_cli.fetching.registry import HUB, SOURCES, Unpacking
from llavanext_cli.fetching.run import refuse_full
from llavanext_cli.fetching.work import StageOpener, Tally, Worker, silent_stage

MOST_LINES = 20


@dataclass(frozen=True)
class CheckReport:
    """What a check found: files and bytes read, files that were broken, and how many bytes repairing them took.

    `incomplete` names artifacts whose fetch has not ended yet.
    """

    folder: Path
    files: int
    bytes: int
    broken: tuple[str, ...]
    repaired: bool
    incomplete: tuple[str, ...]
    transferred: int
    seconds: float


def check_folder(
    folder: Path,
    *,
    repair: bool = True,
    source: str = HUB,
    endpoint: str | None = None,
    jobs: int = 4,
    limits: Limits | None = None,
    stage: StageOpener = silent_stage,
    note: Callable[[str], None] = lambda line: None,
) -> CheckReport:
    """Read every file that `fetch` put into a folder, compare digests, and fetch again what is broken.

    The network is used only when something is broken.

    Args:
        repair: False only reports.

    Raises:
        DataError: the folder holds nothing that was fetched; or something is broken and `repair` is False.
        FetchError: as `run_fetch`.
    """
    started = time.monotonic()
    root = absolute(folder)
    if not (root / STATE).is_dir():
        raise DataError(f"{root} holds nothing that was fetched", "llavanext fetch NAME --to FOLDER fills a folder.")
    with open_network(source, endpoint, limits, note, root) as net, locked_folder(root, note, create=False) as opened:
        if not opened.manifest.files and not opened.manifest.archives:
            raise DataError(f"{root} holds nothing that was fetched", "Run the fetch again: it was not finished.")
        with stage("Checking") as report:
            steps, broken, files, size = _find_broken(net, opened, jobs, report, _mirror(source, endpoint))
        lines = broken[:MOST_LINES] + ([f"and {len(broken) - MOST_LINES} more"] if len(broken) > MOST_LINES else [])
        if broken and not repair:
            raise DataError(
                f"{len(broken)} of {files} files in {root} are broken",
                f"Repair them: llavanext fetch --check {root}",
                details=lines,
            )
        if steps:
            for line in lines:
                note(f"broken: {line}")
            refuse_full(root, plan_space(opened, steps, False, jobs))
            Worker(net, opened, jobs, keep_archives=False, force=True, stage=stage, note=note).run(steps)
        incomplete = tuple(name for name, record in opened.manifest.artifacts.items() if not record.complete)
        return CheckReport(
            root, files, size, tuple(broken), bool(steps), incomplete, net.received, time.monotonic() - started
        )


def _mirror(source: str, endpoint: str | None) -> dict[str, str]:
    """Source → the server that the user asks for now, in place of the one that the manifest names."""
    found = {name: chosen_endpoint(name, endpoint if name == source else None) for name in SOURCES}
    return {name: server for name, server in found.items() if server}


def _find_broken(
    net: Net, folder: Folder, jobs: int, report: Callable[[int, int], None], mirror: dict[str, str]
) -> tuple[list[Step], list[str], int, int]:
    """(what to do, what is wrong, files, bytes): every file and every unpacked member is read."""
    manifest = folder.manifest
    todo: list[tuple[Member, str]] = [(Member(path, r.size, r.sha256), "") for path, r in manifest.files.items()]
    lost: set[str] = set()
    for archive in manifest.archives:
        try:
            todo += [(member, archive) for member in folder.members(archive)]
        except DataError:
            lost.add(archive)
    total = sum(member.size for member, _ in todo)
    tally = Tally(total, report)
    found: dict[str, tuple[str, str]] = {}

    def check(member: Member, archive: str) -> None:
        why = _why_broken(net, folder, member, lambda done: tally.update(member.path, done))
        if why:
            found[member.path] = (why, archive)

    run_all(net, [partial(check, *item) for item in todo], jobs)
    report(total, total)
    steps = []
    for path, record in manifest.files.items():
        if path in found and path not in manifest.archives:
            steps.append(Step(_wanted(path, record, folder, mirror), FETCH))
        elif (
            path not in found and not folder.as_recorded(path) and os.access(folder.state, os.W_OK)
        ):  # touched, but whole
            folder.record_file(path, Digests(record.size, record.sha256, ""), record.origin)
    folder.save()
    for archive, record in manifest.archives.items():
        damaged = tuple(sorted(path for path, (_, owner) in found.items() if owner == archive))
        if archive in found:  # one that was kept: it comes again, and what it held with it
            steps.append(Step(_wanted(archive, record, folder, mirror), FETCH, None if archive in lost else damaged))
        elif archive in lost or damaged:
            steps.append(Step(_wanted(archive, record, folder, mirror), REPAIR, None if archive in lost else damaged))
    broken = [f"{path}: {why}" for path, (why, _) in sorted(found.items())]
    broken += [f"{archive}: the list of its files is lost" for archive in sorted(lost)]
    return steps, broken, len(todo), total


def _why_broken(net: Net, folder: Folder, member: Member, report: Callable[[int], None]) -> str:
    path, expected = folder.path(member.path), Expected(member.size, member.sha256)
    try:
        if member.link:
            return "" if folder.looks_whole(member) else f"it is no link to {member.link}"
        if path.stat().st_size != expected.size:
            return f"{path.stat().st_size} bytes instead of {expected.size}"
        return expected.fault(hash_file(path, report=report, stop=net.stop))
    except FileNotFoundError:
        return "it is gone"
    except OSError as fault:
        return f"it cannot be read ({os.strerror(fault.errno) if fault.errno else 'no reason given'})"


def _wanted(path: str, record: FileRecord | ArchiveRecord, folder: Folder, mirror: dict[str, str]) -> Wanted:
    """The file as it was when it was recorded."""
    origin = replace(record.origin, endpoint=mirror.get(record.origin.source, record.origin.endpoint))
    owners = tuple(name for name, artifact in folder.manifest.artifacts.items() if path in artifact.paths)
    rule = Unpacking(path, record.into, record.tops) if isinstance(record, ArchiveRecord) else None
    return Wanted(path, Expected(record.size, record.sha256), origin, owners, rule)
