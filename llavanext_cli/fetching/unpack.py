"""Unpack an archive into a folder of ours, member by member, and only then into the user's folder.

    archive ──▶ DIR/.llavanext/partial/NAME.unpacked/…  ──▶  DIR/coco/train2017/…
                + NAME.members: a line for each file          by renaming, when the last member is there

No path leaves the folder, no link points out of it, there are no devices, and the bytes are counted against a limit.
What a killed process had unpacked is not written again.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from llavanext_cli.errors import DataError, FetchError
from llavanext_cli.fetching.archive import FILE, FOLDER, HARD_LINK, LINK, ArchiveMember, open_archive
from llavanext_cli.fetching.manifest import Member
from llavanext_cli.fetching.net import StoppedError
from llavanext_cli.fetching.paths import normal, unsafe

BLOCK = 1 << 20


@dataclass(frozen=True)
class UnpackLimits:
    """What an archive may become.

    Attributes:
        members: entries.
        ratio, floor: bytes unpacked may be `ratio` times the archive's, or `floor` if that is more.
        spare: bytes of disk that stay free.
    """

    members: int = 2_000_000
    ratio: float = 20.0
    floor: int = 64 << 20
    spare: int = 64 << 20


def unpack_archive(
    archive: Path,
    stage: Path,
    *,
    name: str = "",
    into: str = "",
    tops: Collection[str] = (),
    only: Collection[str] | None = None,
    limits: UnpackLimits | None = None,
    report: Callable[[int], None] = lambda done: None,
    stop: threading.Event | None = None,
) -> list[Member]:
    """Unpack into `stage`, a folder that nobody else uses; a second call goes on where the first was killed.

    Args:
        name: what to call the archive in messages; its file name when empty.
        into: put in front of the members' paths in the result.
        tops: names that may stand at the top; empty allows all.
        only: paths (with `into`) of the files to unpack; None is all.
        report: told how many bytes of the archive have been read.

    Returns:
        The files, with their digests, in the order of the archive, then the links. They lie in `stage`, without `into`.

    Raises:
        DataError: the archive is broken, or holds what it must not.
        FetchError: the disk is too small.
        OSError: `stage` cannot be written.
        StoppedError: `stop` was set.
    """
    unpacker = _Unpacker(archive, name or archive.name, stage, into, tops, only, limits or UnpackLimits(), stop)
    stage.mkdir(parents=True, exist_ok=True)
    with open_archive(archive, report, name) as members, unpacker.recording():
        for member in members:
            unpacker.take(member)
    unpacker.make_links()
    links = [Member(unpacker.full(link), 0, "", target) for link, target in unpacker.links.items()]
    return [*unpacker.found.values(), *links]


class _Unpacker:
    def __init__(
        self,
        archive: Path,
        name: str,
        stage: Path,
        into: str,
        tops: Collection[str],
        only: Collection[str] | None,
        limits: UnpackLimits,
        stop: threading.Event | None,
    ):
        self.name, self.stage, self.into, self.tops = name, stage, into, frozenset(tops)
        self.only, self.limits, self.stop = None if only is None else frozenset(only), limits, stop
        self.allowance = max(limits.floor, int(limits.ratio * archive.stat().st_size))
        self.found: dict[str, Member] = {}
        self.links: dict[str, str] = {}
        self.count = self.bytes = 0
        self.journal_path = stage.with_name(stage.name + ".members")
        self.earlier = self._read_journal()

    def take(self, member: ArchiveMember) -> None:
        """Check one member and write it."""
        if self.stop is not None and self.stop.is_set():
            raise StoppedError
        self.count += 1
        if self.count > self.limits.members:
            raise self._refused(f"it has more than {self.limits.members} members")
        name = member.name.removeprefix("./")
        name = name.rstrip("/") if member.kind == FOLDER else name
        if member.kind == FOLDER and name in ("", "."):
            return
        if why := unsafe(name):
            raise self._refused(f"{member.name[:200]!r}: {why}")
        name = normal(name)
        top = name.partition("/")[0]
        if self.tops and (top not in self.tops or (member.kind != FOLDER and name == top)):
            raise self._refused(f"{name!r} is at its top, where only {', '.join(sorted(self.tops))}/ is expected")
        target = self.stage / name
        if member.kind == FOLDER:
            self._make_folder(target, name)
        elif member.kind == FILE:
            if self.only is None or self.full(name) in self.only:
                self._write(member, name, target)
        elif member.kind in (LINK, HARD_LINK):
            self._check_link(member, name)
        else:
            raise self._refused(f"{name!r} is a device or another special file")

    def make_links(self) -> None:
        """Links come last, when nothing is written any more that could go through one."""
        for name, target in self.links.items():
            path = self.stage / name
            self._make_folder(path.parent, name)
            if path.is_dir() and not path.is_symlink():
                raise self._refused(f"{name!r} is a link here and a folder there")
            path.unlink(missing_ok=True)
            path.symlink_to(target)
        root = Path(os.path.realpath(self.stage))
        for name in self.links:
            if not Path(os.path.realpath(self.stage / name)).is_relative_to(root):
                raise self._refused(f"{name!r} is a link out of the folder")

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Within, every file that is finished is written down, for a call after this one was killed."""
        with open(self.journal_path, "a", encoding="utf-8", buffering=1) as self._journal:
            yield

    def _write(self, member: ArchiveMember, name: str, target: Path) -> None:
        if name in self.found or name in self.links:
            raise self._refused(f"{name!r} is in it twice")
        before = self.earlier.get(name)
        if before is not None and before.size == member.size and _size_of(target) == before.size:
            self.bytes += before.size
            self.found[name] = before
            return
        free = shutil.disk_usage(self.stage).free
        if member.size > self.allowance - self.bytes:
            raise self._refused(f"it grows to more than {self.allowance} bytes (at {name!r})")
        if member.size + self.limits.spare > free:
            raise FetchError(
                f"no room to unpack {self.name}: {name} needs {member.size} bytes, {free} are free",
                "Make room and run the same command: what is unpacked is kept.",
            )
        self._make_folder(target.parent, name)
        digest, size = hashlib.sha256(), 0
        try:
            with member.open() as source, open(target, "wb", buffering=0) as file:
                while block := source.read(BLOCK):
                    size += len(block)
                    self.bytes += len(block)
                    if size > member.size or self.bytes > self.allowance:
                        raise self._refused(f"{name!r} holds more bytes than its header says")
                    if self.stop is not None and self.stop.is_set():
                        raise StoppedError
                    digest.update(block)
                    _write_all(file, block)
        except (IsADirectoryError, NotADirectoryError):
            raise self._refused(f"{name!r} is a file here and a folder there") from None
        if size != member.size:
            raise self._refused(f"{name!r} ends after {size} of {member.size} bytes")
        done = Member(self.full(name), size, digest.hexdigest())
        self.found[name] = done
        self._journal.write(json.dumps({"name": name} | asdict(done), ensure_ascii=False) + "\n")

    def _check_link(self, member: ArchiveMember, name: str) -> None:
        """A symbolic or hard link may point to a place inside; a hard link is unpacked as a symbolic one."""
        if name in self.found or name in self.links:
            raise self._refused(f"{name!r} is in it twice")
        target = member.target
        base = "" if member.kind == HARD_LINK else name.rpartition("/")[0]
        inside = os.path.normpath(os.path.join("/root", base, target))
        if not target or "\0" in target or target.startswith("/") or not (inside + "/").startswith("/root/"):
            raise self._refused(f"{name!r} is a link out of the folder, to {target[:200]!r}")
        if member.kind == HARD_LINK:
            target = os.path.relpath(inside, os.path.join("/root", name.rpartition("/")[0]))
        if self.only is None or self.full(name) in self.only:
            self.links[name] = target

    def _make_folder(self, path: Path, name: str) -> None:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except (FileExistsError, NotADirectoryError):
            raise self._refused(f"{name!r} is a file here and a folder there") from None

    def full(self, name: str) -> str:
        return f"{self.into}/{name}" if self.into else name

    def _read_journal(self) -> dict[str, Member]:
        """What an earlier, killed call finished; lines that were cut off are skipped."""
        earlier = {}
        try:
            with open(self.journal_path, encoding="utf-8") as file:
                for line in file:
                    try:
                        data = json.loads(line)
                        earlier[data["name"]] = Member(data["path"], data["size"], data["sha256"])
                    except (ValueError, KeyError, TypeError):
                        continue
        except (OSError, UnicodeError):
            return {}
        return earlier

    def _refused(self, why: str) -> DataError:
        return DataError(
            f"{self.name} is not safe to unpack: {why}",
            "Nothing of it was put into your folder. Is it the archive you meant, from where you meant?",
        )


def merge_tree(stage: Path, target: Path) -> None:
    """Move everything below `stage` to `target`, by renaming; folders that exist on both sides are merged.

    A call that is interrupted can be repeated.
    """
    target.mkdir(parents=True, exist_ok=True)
    for entry in sorted(os.scandir(stage), key=lambda e: e.name):
        goal = target / entry.name
        if entry.is_dir(follow_symlinks=False) and os.path.lexists(goal):
            merge_tree(Path(entry.path), goal)
        else:
            _move(Path(entry.path), goal)
    stage.rmdir()


def _move(source: Path, goal: Path) -> None:
    try:
        os.replace(source, goal)
    except OSError as fault:
        if fault.errno != errno.EXDEV:
            raise
        # The user's folder is a link to another disk: copy to a temporary name there, then rename.
        temporary = goal.with_name(f".{goal.name}.{os.getpid()}")
        if source.is_dir():
            merge_tree(source, goal)
            return
        shutil.copy2(source, temporary, follow_symlinks=False)
        os.replace(temporary, goal)
        source.unlink()


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def _write_all(file: IO[bytes], block: bytes) -> None:
    view = memoryview(block)
    while view:
        view = view[file.write(view) :]
