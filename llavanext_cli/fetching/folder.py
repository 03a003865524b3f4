"""The user's folder while `fetch` works in it: what is there already, and how a file gets there.

compare     missing, present or verified? What is present is read, unless its size and time are as recorded
complete    download ──▶ .llavanext/download/… ──digest──▶ rename to its place ──▶ manifest
                                                    └─ an archive: unpack, rename its members, delete it
"""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from llavanext_cli.errors import DataError, FetchError
from llavanext_cli.fetching.hub import size_on_disk
from llavanext_cli.fetching.manifest import Manifest, Member, State, is_same_file
from llavanext_cli.fetching.parallel import run_all
from llavanext_cli.fetching.remote import STATE, Digests, RemoteFile, hash_file
from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.sources import Sources
from llavanext_cli.fetching.unpack import move_file, unpack_archive

ATTEMPTS = 2
"""How often a file whose digest is wrong is downloaded."""
LISTED = 20

Progress = Callable[[str], AbstractContextManager[Callable[[int, int], None]]]
"""Opens a named stage of the work; its value is called with (bytes done, bytes in all)."""


def silent(label: str) -> AbstractContextManager[Callable[[int, int], None]]:
    return nullcontext(lambda done, total: None)


@dataclass
class Comparison:
    """What a folder has of the files that are wanted.

    Attributes:
        ready: verified earlier, and untouched since.
        adopted: present, and verified by reading. Archives among them are still to be unpacked.
        missing: to be downloaded.
        changed: present, and neither what is wanted nor what `fetch` wrote there.
        broken: lines for what `--check` found.
        read: files that were read, and `size` their bytes.
    """

    ready: list[RemoteFile] = field(default_factory=list)
    adopted: list[tuple[RemoteFile, Digests]] = field(default_factory=list)
    missing: list[RemoteFile] = field(default_factory=list)
    changed: list[str] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    read: int = 0
    size: int = 0


class Folder:
    """One folder and its manifest."""

    def __init__(self, root: Path, request: FetchRequest, sources: Sources, progress: Progress):
        """Raises `DataError` when the manifest is broken."""
        self.root, self.request, self.sources, self.progress = root, request, sources, progress
        self.manifest = Manifest(root)
        self.downloads = root / STATE / "download"
        self._finished = 0
        self._running: dict[str, RemoteFile] = {}
        self._moving = threading.Lock()

    # ------------------------------------------------------------------------------------------------------- comparing

    def compare(self, wanted: Sequence[RemoteFile], rehash: bool = False) -> Comparison:
        """Find out which files have to be downloaded.

        Args:
            rehash: read every file and every member of an archive, even those that look untouched.

        Raises:
            DataError: a folder is in the place of a file.
            OSError: a file cannot be read.
        """
        states = {file.path: self.manifest.state_of(file) for file in wanted}
        doubtful: dict[str, bool] = {}  # path → compute its git blob id
        for file in wanted:
            path = self.root / file.path
            if path.is_dir():
                raise DataError(f"{path} is a folder, but a file must be written there", "move the folder away")
            if path.is_file() and (rehash or states[file.path] is State.PRESENT):
                doubtful[file.path] = bool(file.git_blob)
            if rehash:
                doubtful |= {m.path: False for m in self._members(file) if (self.root / m.path).is_file()}
        found = self._read(doubtful)
        result = Comparison(read=len(found), size=sum(digests.size for digests in found.values()))
        for file in wanted:
            self._sort(file, states[file.path], found, rehash, result)
        return result

    def _members(self, file: RemoteFile) -> tuple[Member, ...]:
        return self.manifest.files[file.path].members if file.path in self.manifest.files else ()

    def _read(self, paths: dict[str, bool]) -> dict[str, Digests]:
        """Hash files, several at once."""
        total = sum(self.manifest.size_of(path) for path in paths)
        found: dict[str, Digests] = {}
        done = 0

        def count(size: int) -> None:
            nonlocal done
            done += size

        def read(path: str, git: bool) -> None:
            found[path] = hash_file(self.root / path, git, report=count)

        with self.progress("Checking") if paths else nullcontext(lambda done, total: None) as report:
            tasks = [partial(read, path, git) for path, git in paths.items()]
            run_all(tasks, self.request.jobs, self.sources.stop, lambda: report(done, total))
        return found

    def _sort(
        self, file: RemoteFile, state: State, found: dict[str, Digests], rehash: bool, result: Comparison
    ) -> None:
        """Put a file into one of the lists of `result`."""
        faults = self._faults(file, found) if rehash else []
        result.broken += faults
        digests = found.get(file.path)
        if state is State.VERIFIED and not faults and (not rehash or self._members(file)):
            result.ready.append(file)
        elif digests is not None and file.digest and not file.mismatch(digests):
            result.adopted.append((file, digests))
        elif digests is None or rehash or self._is_ours(file):
            result.missing.append(file)
        else:
            result.changed.append(file.path)

    def _faults(self, file: RemoteFile, found: dict[str, Digests]) -> list[str]:
        """What is wrong with a file, or with the members of an archive; the archive itself may have been deleted."""
        members = self._members(file)
        expected = [RemoteFile(member.path, file.origin, member.size, member.sha256) for member in members]
        if not members or file.path in found:
            expected.append(file)
        reasons = ((item, item.mismatch(found[item.path]) if item.path in found else "missing") for item in expected)
        return [f"{item.path}: {reason}" for item, reason in reasons if reason]

    def _is_ours(self, file: RemoteFile) -> bool:
        """Whether the file that is there is another version of the wanted one, as `fetch` wrote it."""
        record = self.manifest.files.get(file.path)
        return record is not None and is_same_file(record.origin, file.origin) and self.manifest.is_untouched(file.path)

    # ------------------------------------------------------------------------------------------------------ completing

    def stage(self, file: RemoteFile) -> Path:
        """The folder for what is on its way: the same one for the same version of a file."""
        return self.downloads / f"{_short(file.path)}-{_short(file.digest or file.origin.revision)}"

    def complete(self, comparison: Comparison) -> None:
        """Adopt, download and unpack. Raises what the first file to fail raised; finished files stay recorded."""
        try:
            for file, digests in comparison.adopted:
                if file.unpacking is not None:
                    self._unpack(file, self.root / file.path, digests)
                else:
                    self.manifest.record(file, digests)
            files = sorted(comparison.missing, key=lambda file: -(file.size or 0))
            if not files:
                return
            total = sum(file.size or 0 for file in files)
            with self.progress("Downloading") as report:
                report(0, total)

                def tick() -> None:
                    arrived = sum(size_on_disk(self.stage(file)) for file in list(self._running.values()))
                    report(min(self._finished + arrived, total), total)

                run_all([partial(self._fetch, file) for file in files], self.request.jobs, self.sources.stop, tick)
        finally:
            if self.manifest.files:
                self.manifest.save()
            with suppress(OSError):  # it is not empty, or does not exist
                self.downloads.rmdir()

    def _fetch(self, file: RemoteFile) -> None:
        """Download a file, verify it, and put it into its place."""
        stage = self.stage(file)
        self._running[file.path] = file
        for attempt in range(ATTEMPTS):
            path, digests = self.sources.download(file, stage)
            mismatch = file.mismatch(digests)
            if not mismatch:
                break
            shutil.rmtree(stage)
            if attempt + 1 == ATTEMPTS:
                raise FetchError(
                    f"{file.path} differs from the published file: {mismatch}",
                    "it was deleted; use another --source, as the server or a proxy changes the file",
                )
        del self._running[file.path]
        self._finished += digests.size
        if file.unpacking is not None:
            self._unpack(file, path, digests)
        else:
            move_file(path, self.root / file.path)
            self.manifest.record(file, digests)
        for stale in self.downloads.glob(f"{_short(file.path)}-*"):  # other versions of it included
            shutil.rmtree(stale)

    def _unpack(self, file: RemoteFile, archive: Path, digests: Digests) -> None:
        """Unpack an archive, move its members to their places, and keep or delete it."""
        rule = file.unpacking
        tree = self.stage(file) / "tree"
        shutil.rmtree(tree, ignore_errors=True)  # of a command that was killed
        tree.mkdir(parents=True)
        name = Path(file.path).name
        try:
            with self.progress(f"Unpacking {name}") as report:
                found = unpack_archive(
                    archive,
                    tree,
                    name=name,
                    tops=rule.tops,
                    report=lambda done: report(done, max(done, digests.size)),
                    stop=self.sources.stop,
                )
        except DataError:  # broken or hostile
            shutil.rmtree(self.stage(file))
            raise
        into = f"{rule.into}/" if rule.into else ""
        members = [member._replace(path=into + member.path) for member in found]
        with self._moving:  # two archives may bring the same folders
            self._check_members(file, members)
            for before, member in zip(found, members, strict=True):
                move_file(tree / before.path, self.root / member.path)
        target = self.root / file.path
        if archive != target and (self.request.keep_archives or target.exists()):
            move_file(archive, target)
        self.manifest.record(file, digests, members)
        shutil.rmtree(self.stage(file))

    def _check_members(self, file: RemoteFile, members: Iterable[Member]) -> None:
        """Raises `DataError` when members would replace files that are not ours and differ."""
        ours = {member.path for member in self._members(file)}
        foreign = [
            member.path
            for member in members
            if not self.request.force
            and member.path not in ours
            and os.path.lexists(self.root / member.path)
            and (
                self.manifest.size_of(member.path) != member.size
                or hash_file(self.root / member.path, git=False).sha256 != member.sha256
            )
        ]
        if foreign:
            raise DataError(
                f"{file.path} would replace {len(foreign)} of your files, such as {foreign[0]}",
                "move them away, or replace them with --force",
            )


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
