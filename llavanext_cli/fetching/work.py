"""Carry out a plan: download each file, check it, put it in its place, unpack it, write it down.

download ──▶ partial/…  ──digest──▶ right? ──▶ rename to its place ──▶ manifest
                             │                └─ an archive: unpack, rename its members, delete it
                             └─ wrong: throw it away, once more, then an error
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llavanext_cli.errors import DataError, FetchError
from llavanext_cli.fetching.digest import Digests, Expected, Follower, hash_file
from llavanext_cli.fetching.folder import Folder
from llavanext_cli.fetching.hub import Hub, uses_xet
from llavanext_cli.fetching.journal import journal_path
from llavanext_cli.fetching.manifest import Member
from llavanext_cli.fetching.modelscope import file_url
from llavanext_cli.fetching.net import Net
from llavanext_cli.fetching.paths import files
from llavanext_cli.fetching.plan import ADOPT, READY, REPAIR, Step, Wanted
from llavanext_cli.fetching.pool import run_all
from llavanext_cli.fetching.rangefile import unpack_members
from llavanext_cli.fetching.registry import HUB, MODELSCOPE
from llavanext_cli.fetching.transfer import download_url
from llavanext_cli.fetching.unpack import UnpackLimits, merge_tree, unpack_archive

LARGE = 32 << 20
"""Bytes from which on a plain file is worth several connections."""
TIMES = 2
"""How often a file whose digest is wrong is downloaded."""

Progress = Callable[[int, int], None]
StageOpener = Callable[[str], AbstractContextManager[Progress]]
"""Opens a named stage of the work; its value is told (bytes done, bytes in all)."""


def silent_stage(label: str) -> AbstractContextManager[Progress]:
    return nullcontext(lambda done, total: None)


@dataclass
class Tally:
    """How far a set of downloads is."""

    total: int
    report: Progress
    done: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _told: float = 0.0

    def update(self, path: str, count: int) -> None:
        with self._lock:
            self.done[path] = max(count, self.done.get(path, 0))
            now = time.monotonic()
            if now - self._told >= 0.1:
                self._told = now
                done = sum(self.done.values())
                self.report(min(done, self.total) if self.total else done, self.total)


@dataclass
class Worker:
    """Everything that the tasks of one run share."""

    net: Net
    folder: Folder
    jobs: int
    keep_archives: bool
    force: bool
    stage: StageOpener
    note: Callable[[str], None]
    unpack_limits: UnpackLimits = field(default_factory=UnpackLimits)
    merging: threading.Lock = field(default_factory=threading.Lock)

    def run(self, steps: Sequence[Step]) -> None:
        """Carry out every step. Raises what the first one to fail raised; finished files stay recorded."""
        todo = [step for step in steps if step.status != READY]
        todo.sort(key=lambda step: -(step.wanted.expected.size or 0))  # the longest first
        transfers = [step for step in todo if step.status != ADOPT]
        adopted = [step for step in todo if step.status == ADOPT]
        try:
            if adopted:
                self._run_adopted(adopted)
            if transfers:
                total = sum(step.wanted.expected.size or 0 for step in transfers)
                with self.stage("Downloading") as report:
                    tally = Tally(total, report)
                    tally.report(0, total)
                    # A large plain file uses all connections by itself, so these come one after another.
                    alone = [s for s in transfers if _is_plain(s) and not 0 < (s.wanted.expected.size or 0) < LARGE]
                    shared = [step for step in transfers if not any(step is other for other in alone)]
                    run_all(self.net, [partial(self._fetch, step, tally, 1) for step in shared], self.jobs)
                    run_all(self.net, [partial(self._fetch, step, tally, self.jobs) for step in alone], 1)
        finally:
            self.folder.save()
            self.folder.tidy()

    # -------------------------------------------------------------------------------------------------- already there

    def _run_adopted(self, steps: Sequence[Step]) -> None:
        run_all(self.net, [partial(self._adopt, step.wanted) for step in steps], self.jobs)

    def _adopt(self, wanted: Wanted) -> None:
        path = self.folder.path(wanted.path)
        digests = hash_file(path, stop=self.net.stop)
        self.folder.record_file(wanted.path, digests, wanted.origin)
        if wanted.unpacking is not None:
            self._unpack(wanted, path, digests, None)  # an archive that the user brought stays

    # ------------------------------------------------------------------------------------------------------- fetching

    def _fetch(self, step: Step, tally: Tally, connections: int) -> None:
        wanted = step.wanted
        if step.status == REPAIR and self._repair_members(step, tally):
            return
        home = self.folder.stage(wanted.path, wanted.expected.version or wanted.origin.revision)
        for attempt in range(TIMES):
            path, digests = self._download(wanted, home, tally, connections)
            fault = wanted.expected.fault(digests)
            if not fault:
                break
            shutil.rmtree(home / "file", ignore_errors=True)
            if attempt + 1 == TIMES:
                raise FetchError(
                    f"{wanted.path} is not what it should be: {fault}",
                    "It was thrown away. The server, or a proxy on the way, changes it: use another source.",
                )
        tally.update(wanted.path, digests.size)
        if wanted.unpacking is None or step.only == ():  # an archive that was kept, and whose members are whole
            self._place(wanted, path, digests)
        else:
            self._unpack(wanted, path, digests, step.only)
        self.folder.clear(wanted.path)

    def _download(self, wanted: Wanted, home: Path, tally: Tally, connections: int) -> tuple[Path, Digests]:
        """The file in `home/file`, and what it is."""
        origin, expected = wanted.origin, wanted.expected
        stage = home / "file"
        follower = Follower(want_git=bool(expected.git_blob))
        told = partial(tally.update, wanted.path)
        try:
            if origin.source == HUB:
                path = Hub(self.net, origin.endpoint).download(origin, stage, follower, told)
                if wanted.xet and uses_xet():
                    self.net.count(expected.size or 0)  # it has its own connections
            else:
                stage.mkdir(parents=True, exist_ok=True)
                path = stage / "whole"
                follower.follow(lambda: os.open(path, os.O_RDONLY))

                def report(done: int, prefix: int) -> None:
                    told(done)
                    follower.advance(prefix)

                if not _is_complete(path, expected):
                    download_url(
                        self.net,
                        address_of(wanted),
                        path,
                        size=expected.size,
                        version=expected.version,
                        connections=connections,
                        report=report,
                    )
        except BaseException:
            follower.abandon()
            raise
        left = (expected.size or 0) - follower.position
        with self.stage(f"Verifying {Path(wanted.path).name}") if left > LARGE else nullcontext(None) as shown:
            total = path.stat().st_size
            digests = follower.finish(
                path, report=(lambda done: shown(done, total)) if shown else (lambda done: None), stop=self.net.stop
            )
        return path, digests

    def _place(self, wanted: Wanted, path: Path, digests: Digests) -> None:
        goal = self.folder.path(wanted.path)
        goal.parent.mkdir(parents=True, exist_ok=True)
        if goal.is_dir():
            raise DataError(f"{goal} is a folder, and a file is to go there", "Move it away.")
        os.replace(path, goal)
        self.folder.record_file(wanted.path, digests, wanted.origin)

    # ------------------------------------------------------------------------------------------------------ unpacking

    def _unpack(self, wanted: Wanted, archive: Path, digests: Digests, only: Sequence[str] | None) -> None:
        """Unpack an archive, move its members to their places, and keep or delete it."""
        rule = wanted.unpacking
        stage = self.folder.stage(wanted.path, f"{digests.sha256} unpacked {only or ''}") / "tree"
        with self.stage(f"Unpacking {archive.name if archive.name != 'whole' else Path(wanted.path).name}") as report:
            size = archive.stat().st_size
            try:
                members = unpack_archive(
                    archive,
                    stage,
                    name=Path(wanted.path).name,
                    into=rule.into,
                    tops=rule.tops,
                    only=only,
                    limits=self.unpack_limits,
                    report=lambda done: report(done, size),
                    stop=self.net.stop,
                )
            except DataError:  # broken or hostile: nothing of it is worth keeping
                shutil.rmtree(stage.parent, ignore_errors=True)
                if self.folder.partial in archive.parents:
                    archive.unlink()
                raise
        self._move_members(wanted, digests, members, stage, only)
        mine = self.folder.partial in archive.parents
        if mine and (self.keep_archives or wanted.path in self.folder.manifest.files):
            self._place(wanted, archive, digests)
        elif mine:
            archive.unlink()

    def _move_members(
        self, wanted: Wanted, digests: Digests, members: list[Member], stage: Path, only: Sequence[str] | None
    ) -> None:
        if only is not None:
            fresh = {member.path: member for member in members}
            members = [fresh.get(member.path, member) for member in self.folder.members(wanted.path)]
        with self.merging:  # two archives may bring the same folders
            self._check_free(wanted, members)
            self.folder.write_members(wanted.path, members)
            merge_tree(stage, self.folder.path(wanted.unpacking.into))
            self.folder.record_archive(wanted.path, digests, wanted.origin, wanted.unpacking, members)
        shutil.rmtree(stage.parent, ignore_errors=True)

    def _check_free(self, wanted: Wanted, members: list[Member]) -> None:
        """Refuse to write over files that are not ours and differ."""
        if self.force or wanted.path in self.folder.manifest.archives:
            return
        foreign = []
        for member in members:
            path = self.folder.path(member.path)
            if not os.path.lexists(path):
                continue
            same = self.folder.looks_whole(member) and (member.link or path.is_file())
            if not same or not (member.link or hash_file(path, stop=self.net.stop).sha256 == member.sha256):
                foreign.append(member.path)
        if foreign:
            raise DataError(
                f"{wanted.path} would replace {files(len(foreign))} of yours, such as {foreign[0]}",
                "Move them away, or replace them with --force.",
            )

    def _repair_members(self, step: Step, tally: Tally) -> bool:
        """Bring back members without their whole archive, if it was kept or can be read in parts."""
        wanted, record = step.wanted, self.folder.manifest.archives[step.wanted.path]
        kept = self.folder.path(wanted.path)
        if self.folder.as_recorded(wanted.path):
            digests = hash_file(kept, stop=self.net.stop)
            if digests.sha256 == record.sha256:
                self._unpack(wanted, kept, digests, step.only)
                tally.update(wanted.path, digests.size)
                return True
        if step.only is None or wanted.origin.source == HUB or not wanted.path.endswith(".zip"):
            return False
        known = {member.path: member for member in self.folder.members(wanted.path)}
        stage = self.folder.stage(wanted.path, f"{record.sha256} repaired") / "tree"
        members = unpack_members(
            self.net,
            address_of(wanted),
            stage,
            record.size,
            wanted.unpacking.into,
            [known[path] for path in step.only],
        )
        if members is None:
            self.note(f"{wanted.path} cannot be read in parts; it is fetched again")
            shutil.rmtree(stage.parent, ignore_errors=True)
            return False
        self._move_members(wanted, Digests(record.size, record.sha256, ""), members, stage, step.only)
        tally.update(wanted.path, wanted.expected.size or 0)
        return True


def _is_complete(path: Path, expected: Expected) -> bool:
    """Whether a download ended here before, and something after it failed. Its digest is checked in any case."""
    ended = path.is_file() and not journal_path(path).exists()
    return ended and bool(expected.sha256) and path.stat().st_size == expected.size


def address_of(wanted: Wanted) -> str:
    """Where a file that is not the Hub's is downloaded."""
    return file_url(wanted.origin) if wanted.origin.source == MODELSCOPE else wanted.origin.url


def _is_plain(step: Step) -> bool:
    return step.wanted.origin.source != HUB
