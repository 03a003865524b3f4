"""What `fetch` put into a folder, written beside it: source, revision and digest of every file.

    DIR/.llavanext/manifest.json     artifacts, files, archives that were unpacked
    DIR/.llavanext/unpacked/*.jsonl  one line for each file of an archive: path, size, sha256
    DIR/.llavanext/partial/          what is on its way
    DIR/.llavanext/lock

A manifest may come from somebody else, with the folder, so it is checked like any other input.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from llavanext_cli.errors import DataError
from llavanext_cli.fetching.paths import STATE, unsafe
from llavanext_cli.fetching.remote import Origin
from llavanext_cli.files import write_whole

VERSION = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class FileRecord:
    """A file that was fetched. `mtime_ns` is what the disk said then, so that a warm fetch need not read it again."""

    size: int
    sha256: str
    mtime_ns: int
    origin: Origin

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"origin": self.origin.to_dict()}


@dataclass(frozen=True)
class ArchiveRecord:
    """An archive that was unpacked into the folder `into`. `listing` is the file in `unpacked/` that names its members,
    and `tops` the names that stood at its top."""

    size: int
    sha256: str
    origin: Origin
    into: str
    tops: tuple[str, ...]
    listing: str
    members: int
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"origin": self.origin.to_dict(), "tops": list(self.tops)}


@dataclass(frozen=True)
class ArtifactRecord:
    """An artifact of which everything that was wanted is there (`complete`), or will be; `narrowed` when it has more
    files than were wanted."""

    source: str
    where: str
    requested: str
    revision: str
    paths: tuple[str, ...]
    complete: bool
    narrowed: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"paths": list(self.paths)}


@dataclass(frozen=True)
class Member:
    """One unpacked file, or a link with where it points; `path` is relative to the user's folder."""

    path: str
    size: int
    sha256: str
    link: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {key: value for key, value in asdict(self).items() if key != "link" or value}

    @classmethod
    def from_dict(cls, data: Any) -> Member:
        """Raises `ValueError`, `KeyError`, `TypeError` or `DataError` for what `to_dict` does not write."""
        link = data.get("link", "") if isinstance(data, dict) else ""
        if not isinstance(link, str):
            raise ValueError("a link that is no text")
        return cls(_safe(data["path"]), _size(data["size"]), "" if link else _sha256(data["sha256"]), link)


@dataclass
class Manifest:
    artifacts: dict[str, ArtifactRecord] = field(default_factory=dict)
    files: dict[str, FileRecord] = field(default_factory=dict)
    archives: dict[str, ArchiveRecord] = field(default_factory=dict)

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest of a folder; an empty one when there is none.

        Raises:
            DataError: it cannot be read, or names something outside the folder.
        """
        path = folder / STATE / MANIFEST
        if path.exists() and not path.is_file():  # a pipe would be waited for
            raise _broken(path)
        try:
            data = json.loads(path.read_bytes())
            if data["llavanext_fetch"] != VERSION:
                raise DataError(
                    f"{path} was written by another version of llavanext", "Update llavanext, or use another folder."
                )
            manifest = cls(
                {name: _artifact(value) for name, value in data["artifacts"].items()},
                {_safe(name): _file(value) for name, value in data["files"].items()},
                {_safe(name): _archive(value) for name, value in data["archives"].items()},
            )
        except FileNotFoundError:
            return cls()
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as fault:
            raise _broken(path) from fault
        except DataError as fault:
            raise fault if fault.hint else _broken(path, fault.what) from None
        for record in manifest.archives.values():
            if "/" in record.listing or unsafe(record.listing) or (record.into and unsafe(record.into)):
                raise _broken(path)
        return manifest

    def save(self, folder: Path) -> None:
        """Write the manifest whole or not at all."""
        data = {
            "llavanext_fetch": VERSION,
            "artifacts": {name: record.to_dict() for name, record in sorted(self.artifacts.items())},
            "files": {name: record.to_dict() for name, record in sorted(self.files.items())},
            "archives": {name: record.to_dict() for name, record in sorted(self.archives.items())},
        }
        text = json.dumps(data, indent=1, ensure_ascii=False) + "\n"
        write_whole(folder / STATE / MANIFEST, text.encode("utf-8"))


def write_members(path: Path, members: list[Member]) -> None:
    """Write the list of what an archive held, whole or not at all."""
    text = "".join(json.dumps(member.to_dict(), ensure_ascii=False) + "\n" for member in members)
    path.parent.mkdir(exist_ok=True)
    write_whole(path, text.encode("utf-8"))


def read_members(path: Path, count: int) -> Iterator[Member]:
    """The lines of a list of `count` members.

    Raises:
        DataError: it is missing, broken, of another length, or names something outside the folder.
    """
    left = count
    try:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield Member.from_dict(json.loads(line))
                left -= 1
        if left:
            raise ValueError("lines that are missing, or too many")
    except (OSError, ValueError, KeyError, TypeError, RecursionError, DataError) as fault:
        raise _broken(path) from fault


def _safe(path: Any) -> str:
    if not isinstance(path, str) or unsafe(path):
        raise DataError("it names a file outside its folder")
    return path


def _size(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError("no size")
    return value


def _sha256(value: Any) -> str:
    if not re.fullmatch(r"[0-9a-f]{64}", value):
        raise ValueError("no digest")
    return str(value)


def _file(data: dict[str, Any]) -> FileRecord:
    return FileRecord(
        _size(data["size"]), _sha256(data["sha256"]), int(data["mtime_ns"]), Origin.from_dict(data["origin"])
    )


def _archive(data: dict[str, Any]) -> ArchiveRecord:
    return ArchiveRecord(
        _size(data["size"]),
        _sha256(data["sha256"]),
        Origin.from_dict(data["origin"]),
        str(data["into"]),
        tuple(str(top) for top in data["tops"]),
        str(data["listing"]),
        _size(data["members"]),
        _size(data["bytes"]),
    )


def _artifact(data: dict[str, Any]) -> ArtifactRecord:
    return ArtifactRecord(
        str(data["source"]),
        str(data["where"]),
        str(data["requested"]),
        str(data["revision"]),
        tuple(_safe(path) for path in data["paths"]),
        bool(data["complete"]),
        bool(data["narrowed"]),
    )


def _broken(path: Path, why: str = "it is not what fetch writes") -> DataError:
    return DataError(
        f"{path} cannot be used: {why}",
        "Delete it and fetch again: files that are whole are recognised, not transferred again.",
    )
