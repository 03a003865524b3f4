"""From names to files: which files are wanted, and how much disk they need. Nothing is written here.

names ──list──▶ Listing ──select──▶ Selection (RemoteFile, …) ──▶ run.py compares them with the folder
"""

from __future__ import annotations

import fnmatch
import re
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from llavanext_cli.errors import ConfigError, FetchError
from llavanext_cli.fetching.hub import size_on_disk
from llavanext_cli.fetching.manifest import Manifest
from llavanext_cli.fetching.network import UnreachableError
from llavanext_cli.fetching.registry import ARTIFACTS, Artifact, find_artifact
from llavanext_cli.fetching.remote import Listing, RemoteFile, check_name
from llavanext_cli.fetching.request import FetchRequest
from llavanext_cli.fetching.sources import Sources
from llavanext_cli.units import format_size


@dataclass(frozen=True)
class Selection:
    """The wanted files of one artifact, and how many it offers."""

    name: str
    listing: Listing
    files: tuple[RemoteFile, ...]
    offered: int


def plan_files(sources: Sources, request: FetchRequest, manifest: Manifest) -> list[Selection]:
    """Ask the sources what there is, and select what is wanted.

    Raises:
        ConfigError: an unknown name, options that do not fit, or two artifacts that need a folder each.
        DataError: a source offers a file whose name is not safe.
        FetchError: as `Sources.list_files`.
    """
    artifacts = [find_artifact(name) for name in dict.fromkeys(request.names)]
    if request.revision and len(artifacts) > 1:
        raise ConfigError("--revision applies to one artifact, but several are named", "fetch them one by one")
    shards = parse_shards(request.shards)
    selections = []
    for artifact in artifacts:
        try:
            selections.append(_select(artifact, sources.list_files(artifact), request.only, shards))
        except UnreachableError:
            recorded = _recorded_selection(manifest, artifact.name, request.revision)
            if recorded is None:
                raise
            selections.append(recorded)
    _check_clashes(selections, request.to)
    return selections


def _select(artifact: Artifact, listing: Listing, only: Sequence[str], shards: frozenset[int]) -> Selection:
    offered = [file for file in listing.files if any(_matches(file.path, pattern) for pattern in artifact.include)]
    if artifact.name in ARTIFACTS and any(file.path.endswith(".safetensors") for file in offered):
        offered = [f for f in offered if not f.path.startswith("pytorch_model")]  # the same weights, pickled
    chosen = _select_shards(artifact, offered, shards) if shards else offered
    if only:
        chosen = [f for f in chosen if any(_matches_loosely(f.path, pattern) for pattern in only)]
    if not chosen:
        names = ", ".join(file.path for file in listing.files[:6]) or "nothing"
        wanted = f" like {', '.join(only)}" if only else " that is wanted"
        raise ConfigError(f"{listing.where} has no file{wanted}", f"it has {names}{', …' * (len(listing.files) > 6)}")
    files = []
    for file in chosen:
        path = check_name(f"{artifact.under}/{file.path}" if artifact.under else file.path, listing.where)
        rule = artifact.unpacking
        files.append(replace(file, path=path, unpacking=rule if rule and _matches(path, rule.pattern) else None))
    return Selection(artifact.name, listing, tuple(files), len(offered))


def _recorded_selection(manifest: Manifest, name: str, revision: str | None) -> Selection | None:
    """What an earlier, complete fetch of an artifact recorded: enough without a network."""
    record = manifest.artifacts.get(name)
    if record is None or not manifest.is_complete(name) or revision not in (None, record.requested, record.revision):
        return None
    listing = Listing(record.source, record.where, record.requested, record.revision, ())
    return Selection(name, listing, tuple(manifest.wanted(record.paths)), record.offered)


def _matches(path: str, pattern: str) -> bool:
    """Whether a glob of the registry covers a path: one without a slash stays at the top, `**` is everything."""
    return pattern == "**" or (("/" in pattern or "/" not in path) and fnmatch.fnmatchcase(path, pattern))


def _matches_loosely(path: str, pattern: str) -> bool:
    """Whether a glob that a user typed covers a path: `*` crosses slashes, and the name alone is enough."""
    return any(pattern == name or fnmatch.fnmatchcase(name, pattern) for name in (path, path.rpartition("/")[2]))


def parse_shards(text: str | None) -> frozenset[int]:
    """`"1,3-5"` is {1, 3, 4, 5}; None and "" are empty. Raises `ConfigError`."""
    chosen: set[int] = set()
    for part in (text or "").split(","):
        match = re.fullmatch(r"\s*(?:(\d{1,6})(?:-(\d{1,6}))?)?\s*", part)
        if match is None or (match[2] and int(match[2]) < int(match[1])):
            raise ConfigError(
                f"--shards {text}: {part.strip()!r} is not a number or a range", "example: --shards 1,3-5"
            )
        if match[1]:
            chosen.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    return frozenset(chosen)


def _select_shards(artifact: Artifact, files: list[RemoteFile], shards: frozenset[int]) -> list[RemoteFile]:
    found = ((file.path, re.search(artifact.shards, file.path)) for file in files if artifact.shards)
    numbers = {path: int(match[1]) for path, match in found if match}
    if not numbers:
        raise ConfigError(f"{artifact.name} has no shards", "omit --shards, or choose files with --only")
    missing = sorted(shards - set(numbers.values()))
    if missing:
        raise ConfigError(
            f"{artifact.name} has no shard {', '.join(map(str, missing[:5]))}{', …' * (len(missing) > 5)}",
            f"choose from {min(numbers.values())} to {max(numbers.values())}",
        )
    return [file for file in files if numbers.get(file.path) is None or numbers[file.path] in shards]


def _check_clashes(selections: Sequence[Selection], to: Path) -> None:
    """Raises `ConfigError` when two artifacts want different files at the same path."""
    owners: dict[str, tuple[str, RemoteFile]] = {}
    for selection in selections:
        for file in selection.files:
            first, other = owners.setdefault(file.path, (selection.name, file))
            if other.digest != file.digest or not (file.digest or other.origin == file.origin):
                raise ConfigError(
                    f"{first} and {selection.name} both have a {file.path}: they need separate folders",
                    f"llavanext fetch {selection.name} --to {to / selection.name.rpartition('/')[2]}",
                )


@dataclass(frozen=True)
class Space:
    """Bytes: to transfer, of disk needed at the most, and of disk free."""

    transfer: int
    needed: int
    free: int

    def check(self, to: Path) -> None:
        """Raises `FetchError` when more disk is needed than is free."""
        if self.needed > self.free:
            raise FetchError(
                f"{to}: {format_size(self.needed)} are needed, but only {format_size(self.free)} are free",
                "make room, choose another disk with --to, or fetch less with --only or --shards",
            )


def plan_space(root: Path, files: Iterable[tuple[RemoteFile, Path]], keep_archives: bool, jobs: int) -> Space:
    """What the missing files take.

    Args:
        files: each file with the folder of what has arrived of it.
    """
    plain = unpacked = 0
    archives: list[int] = []
    for file, stage in files:
        size = file.size or 0
        left = max(0, size - size_on_disk(stage))
        if file.unpacking is None:
            plain += left
        else:
            archives.append(left)
            unpacked += size  # images and videos hardly shrink in an archive
    # An archive is deleted when it is unpacked, so at one time there are at most `jobs` of them.
    at_once = sum(sorted(archives, reverse=True)[: len(archives) if keep_archives else jobs])
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    return Space(plain + sum(archives), plain + at_once + unpacked, shutil.disk_usage(existing).free)
