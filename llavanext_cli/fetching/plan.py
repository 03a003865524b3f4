"""From names to files: what is wanted, what is there, and what that means for the disk. Nothing is changed here.

names ──list──▶ listings ──select──▶ Wanted ──compare with the folder──▶ Plan (READY, ADOPT, FETCH, …)
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llavanext_cli.errors import ConfigError, DataError, FetchError, LlavaNextError
from llavanext_cli.fetching.digest import Expected, hash_file
from llavanext_cli.fetching.endpoint import hub_endpoint, modelscope_endpoint
from llavanext_cli.fetching.folder import Folder
from llavanext_cli.fetching.hub import Hub
from llavanext_cli.fetching.manifest import Manifest
from llavanext_cli.fetching.modelscope import ModelScope
from llavanext_cli.fetching.net import Net
from llavanext_cli.fetching.paths import matches, matches_loosely, normal, unsafe
from llavanext_cli.fetching.redaction import public_url
from llavanext_cli.fetching.registry import ARTIFACTS, HUB, MODELSCOPE, URL, Artifact, Unpacking, WebFile
from llavanext_cli.fetching.remote import Listing, Origin, RemoteFile

READY = "ready"
"""There, and as it was recorded."""
FETCH = "fetch"
"""Not there."""
ADOPT = "adopt"
"""There and whole, but not recorded: somebody else put it there, or a process died before it could."""
UPDATE = "update"
"""There, as fetched from another revision."""
REPAIR = "repair"
"""An archive that was unpacked, and of which members are missing."""
CHANGED = "changed"
"""There, and neither what was fetched nor what is wanted."""
FOREIGN = "foreign"
"""There, and part of another artifact."""


@dataclass(frozen=True)
class Wanted:
    """One file that belongs in the folder. `path` is relative to it; `unpacking` is set for archives."""

    path: str
    expected: Expected
    origin: Origin
    artifacts: tuple[str, ...]
    unpacking: Unpacking | None = None
    xet: bool = False


@dataclass(frozen=True)
class Step:
    """What is to be done about one file.

    Attributes:
        status: READY, FETCH, ...
        only: for REPAIR, the members to unpack; None is all.
    """

    wanted: Wanted
    status: str
    only: tuple[str, ...] | None = None


def list_artifact(net: Net, artifact: Artifact, source: str, endpoint: str | None, revision: str | None) -> Listing:
    """Ask an artifact's source what there is. An artifact at a plain address needs no question.

    Raises:
        ConfigError: the artifact is not at this source, or has no revisions.
        FetchError: as `Hub.list_files`.
    """
    if artifact.web is not None and (source == HUB or artifact.place(source) is None):
        if revision:
            raise ConfigError(
                f"{artifact.name} is one file at a plain address: it has no revisions", "Leave --revision out."
            )
        web = artifact.web
        expected = Expected(web.size or None, web.sha256)
        origin = Origin(URL, url=web.url)
        return Listing(URL, public_url(web.url), "", web.sha256, (RemoteFile(web.name, expected, origin),))
    place = artifact.place(source)
    if place is None:
        names = [name for name, other in ARTIFACTS.items() if other.place(source)]
        raise ConfigError(f"{artifact.name} is not at {source}", f"There are: {', '.join(names)}.")
    if source == MODELSCOPE:
        listing = ModelScope(net, modelscope_endpoint(endpoint)).list_files(place, revision)
        return _pinned(listing, artifact.web) if artifact.web is not None else listing
    return Hub(net, hub_endpoint(endpoint)).list_files(place, revision)


def _pinned(listing: Listing, web: WebFile) -> Listing:
    """The listing of a file's other home, where it must have the digest that is known of it."""
    pin = Expected(web.size or None, web.sha256)
    for file in listing.files:
        known = file.expected
        same = known.size in (None, pin.size) and known.sha256 in ("", pin.sha256)
        if file.path == web.name and web.sha256 and not same:
            raise FetchError(
                f"{file.path} at {listing.where} has another size or digest than the one at {web.url}",
                "Leave --source out.",
            )
    files = (replace(f, expected=pin) if f.path == web.name and web.sha256 else f for f in listing.files)
    return replace(listing, files=tuple(files))


def select_files(artifact: Artifact, listing: Listing, only: Sequence[str], shards: frozenset[int]) -> list[Wanted]:
    """The files of a listing that are wanted, at their places in the folder.

    Args:
        only: globs typed by the user; empty takes all.
        shards: numbers of shards; empty takes all.

    Raises:
        ConfigError: nothing is left, or the artifact has no such shard.
        DataError: the source offers a file whose name is not safe.
    """
    files = _offered(artifact, listing)
    if shards:
        files = _select_shards(artifact, files, shards)
    if only:
        files = [f for f in files if any(matches_loosely(f.path, pattern) for pattern in only)]
    if not files:
        offered = ", ".join(f.path for f in listing.files[:6]) or "nothing"
        raise ConfigError(
            f"{artifact.name} at {listing.where} has no file that is wanted" + (f": {', '.join(only)}" if only else ""),
            f"It offers {offered}{', …' if len(listing.files) > 6 else ''}.",
        )
    wanted = []
    for file in files:
        if why := unsafe(file.path):
            raise DataError(
                f"{listing.where} offers a file that is not safe to write: {file.path[:200]!r} ({why})",
                "Tell its owner; take what you need with --only.",
            )
        path = _path_in_folder(artifact, file)
        unpacking = artifact.unpacking
        if unpacking is not None and not matches(path, unpacking.pattern):
            unpacking = None
        wanted.append(Wanted(path, file.expected, file.origin, (artifact.name,), unpacking, file.xet))
    return wanted


def offered_paths(artifact: Artifact, listing: Listing) -> set[str]:
    """Where all files of an artifact would lie, whatever part of them is wanted."""
    return {_path_in_folder(artifact, file) for file in _offered(artifact, listing)}


def _offered(artifact: Artifact, listing: Listing) -> list[RemoteFile]:
    files = [f for f in listing.files if any(matches(f.path, pattern) for pattern in artifact.include)]
    if artifact.name in ARTIFACTS and any(f.path.endswith(".safetensors") for f in files):
        # The same weights twice: the pickles are the older form.
        files = [f for f in files if not f.path.startswith("pytorch_model")]
    return files


def _path_in_folder(artifact: Artifact, file: RemoteFile) -> str:
    return normal(f"{artifact.under}/{file.path}" if artifact.under else file.path)


def parse_shards(text: str | None) -> frozenset[int]:
    """`"1,3-5"` is {1, 3, 4, 5}; None and "" are no choice. Raises `ConfigError`."""
    chosen: set[int] = set()
    for part in (text or "").split(","):
        part = part.strip()
        if not part:
            continue
        match = re.fullmatch(r"(\d{1,6})(?:-(\d{1,6}))?", part)
        if not match or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(f"--shards {text}: {part!r} is no number or range", "Example: --shards 1,3-5")
        chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(chosen)


def _select_shards(artifact: Artifact, files: list[RemoteFile], shards: frozenset[int]) -> list[RemoteFile]:
    found = ((f.path, re.search(artifact.shards, f.path)) for f in files if artifact.shards)
    numbers = {path: int(match[1]) for path, match in found if match}
    if not numbers:
        raise ConfigError(f"{artifact.name} has no shards", "Leave --shards out, or choose files with --only.")
    missing = sorted(shards - set(numbers.values()))
    if missing:
        raise ConfigError(
            f"{artifact.name} has no shard {', '.join(map(str, missing[:5]))}{', …' if len(missing) > 5 else ''}",
            f"It has {min(numbers.values())} to {max(numbers.values())}.",
        )
    return [f for f in files if numbers.get(f.path) is None or numbers[f.path] in shards]


def join_wanted(selections: Iterable[list[Wanted]], root: Path) -> list[Wanted]:
    """All artifacts' files in one list, each path once.

    Raises:
        ConfigError: two artifacts want different files at the same path.
    """
    joined: dict[str, Wanted] = {}
    clashes = []
    for wanted in (wanted for selection in selections for wanted in selection):
        other = joined.get(wanted.path)
        if other is None:
            joined[wanted.path] = wanted
        elif other.expected == wanted.expected and (other.expected.version or other.origin == wanted.origin):
            joined[wanted.path] = replace(other, artifacts=(*other.artifacts, *wanted.artifacts))
        else:
            clashes.append((wanted.path, other.artifacts[0], wanted.artifacts[0]))
    if clashes:
        path, first, second = clashes[0]
        raise ConfigError(
            f"{first} and {second} both have a {path}: they need a folder each",
            f"llavanext fetch {second} --to {root / second.rpartition('/')[2]}",
        )
    paths = set(joined)
    for path in paths:
        if any(parent in paths for parent in map(str, Path(path).parents)):
            raise ConfigError(f"{path} would lie in a file of the same name", "Fetch the two into different folders.")
    return list(joined.values())


def recorded_listing(manifest: Manifest, artifact: Artifact, revision: str | None) -> Listing | None:
    """Without a network: what an earlier, complete fetch of the artifact recorded, without its files; None when there
    was none, or one of another revision."""
    record = manifest.artifacts.get(artifact.name)
    if record is None or not record.complete or (revision and revision not in (record.requested, record.revision)):
        return None
    return Listing(record.source, record.where, record.requested, record.revision, (), offline=True)


def compare_folder(
    folder: Folder,
    wanted: Sequence[Wanted],
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[Step]:
    """What is to be done about each wanted file.

    Args:
        report: told the bytes read and to be read.

    Raises:
        OSError: a file that is there cannot be read.
    """
    doubtful = [w for w in wanted if not _is_ready(folder, w) and folder.path(w.path).is_file()]
    total = sum(folder.path(w.path).stat().st_size for w in doubtful)
    done = 0
    steps = []
    for item in wanted:
        if item.unpacking is not None and item.path in folder.manifest.archives:
            steps.append(_compare_archive(folder, item))
        elif _is_ready(folder, item):
            steps.append(Step(item, READY))
        elif not folder.path(item.path).exists():
            steps.append(Step(item, FETCH))
        else:
            steps.append(Step(item, _compare_file(folder, item, lambda n, d=done: report(d + n, total))))
        if any(item is other for other in doubtful):
            done += folder.path(item.path).stat().st_size
    return steps


def _is_ready(folder: Folder, item: Wanted) -> bool:
    record = folder.manifest.files.get(item.path)
    if record is None or not folder.as_recorded(item.path):
        return False
    if item.expected.sha256:
        return record.sha256 == item.expected.sha256
    return record.origin.group == item.origin.group and record.origin.revision == item.origin.revision


def _compare_archive(folder: Folder, item: Wanted) -> Step:
    record = folder.manifest.archives[item.path]
    same = (
        record.sha256 == item.expected.sha256
        if item.expected.sha256
        else record.origin.group == item.origin.group and item.expected.size in (None, record.size)
    )
    if not same:
        return Step(item, FETCH)
    try:
        damaged = folder.damaged_members(item.path)
    except LlavaNextError:  # the list of members is lost: only unpacking again brings it back
        return Step(item, REPAIR)
    return Step(item, REPAIR, tuple(damaged)) if damaged else Step(item, READY)


def _compare_file(folder: Folder, item: Wanted, report: Callable[[int], None]) -> str:
    path = folder.path(item.path)
    record = folder.manifest.files.get(item.path)
    if not path.is_file():
        return CHANGED
    digests = hash_file(path, want_git=bool(item.expected.git_blob), report=report)
    if item.expected.version and not item.expected.fault(digests):
        return ADOPT
    if record is not None and record.sha256 == digests.sha256:
        if record.origin.group != item.origin.group:
            return FOREIGN
        return UPDATE if item.expected.version else ADOPT
    return CHANGED


@dataclass(frozen=True)
class Space:
    """Bytes: to transfer, of disk that is needed at the most, and free."""

    transfer: int
    needed: int
    free: int


def plan_space(folder: Folder, steps: Sequence[Step], keep_archives: bool, jobs: int) -> Space:
    """What the plan takes; partial files of what is wanted count as transferred."""
    transfer = needed = unpacked = 0
    archives: list[int] = []
    for step in steps:
        if step.status in (READY, ADOPT):
            continue
        item, size = step.wanted, step.wanted.expected.size or 0
        arrived = folder.bytes_on_their_way(item.path, item.expected.version or item.origin.revision)
        left = max(0, size - arrived)
        transfer += left
        if item.unpacking is None:
            needed += left
        else:
            archives.append(left)
            if step.only is None:
                tree = folder.bytes_on_their_way(item.path) - arrived
                unpacked += max(0, int(size * item.unpacking.growth) - tree)
    # An archive is deleted when it is unpacked, so only those on their way at one time count.
    needed += sum(archives) if keep_archives else sum(sorted(archives, reverse=True)[:jobs])
    there = next(p for p in (folder.root, *folder.root.absolute().parents) if p.exists())
    return Space(transfer, needed + unpacked, shutil.disk_usage(there).free)
