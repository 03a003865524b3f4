"""What a source says about a file, and where it was found: the same for the Hub, ModelScope and a plain address."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import urlsplit

from llavanext_cli.errors import DataError
from llavanext_cli.fetching.digest import Expected
from llavanext_cli.fetching.paths import unsafe
from llavanext_cli.fetching.redaction import public_url
from llavanext_cli.fetching.registry import DATASET, HUB, MODEL, MODELSCOPE, URL, is_repository

MOST_PAGES = 10_000
"""Pages of a listing."""


@dataclass(frozen=True)
class Origin:
    """Where a file comes from; enough to fetch it again.

    Attributes:
        source: HUB, MODELSCOPE or URL.
        endpoint: the server of a repository.
        revision: commit, tag or branch of a repository.
        path: the file's path in its repository.
        url: the address of a plain file; may hold a secret, which `to_dict` leaves out.
    """

    source: str
    endpoint: str = ""
    repo: str = ""
    kind: str = ""
    revision: str = ""
    path: str = ""
    url: str = ""

    def to_dict(self) -> dict[str, str]:
        return {key: public_url(value) if key == "url" else value for key, value in asdict(self).items() if value}

    @classmethod
    def from_dict(cls, data: Any) -> Origin:
        """Raises `DataError` when a field is missing, unknown or no text."""
        names = cls.__dataclass_fields__
        good = (
            isinstance(data, dict)
            and data.get("source") in (HUB, MODELSCOPE, URL)
            and all(key in names and isinstance(value, str) for key, value in data.items())
            and (_is_web(data.get("url", "")) if data["source"] == URL else _is_in_repository(data))
        )
        if not good:
            raise DataError("a file's origin is not complete")
        return cls(**data)

    @property
    def group(self) -> tuple[str, str, str]:
        """Equal for files that are the same thing whatever their revision: (source, repository or address, path)."""
        return self.source, self.repo or public_url(self.url), self.path


def _is_web(url: str) -> bool:
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def _is_in_repository(data: dict[str, str]) -> bool:
    return (
        is_repository(data.get("repo", ""))
        and data.get("kind") in (MODEL, DATASET)
        and _is_web(data.get("endpoint", ""))
        and not unsafe(data.get("path", ""))
    )


@dataclass(frozen=True)
class RemoteFile:
    """One file of a listing; `path` is what comes below the artifact's folder."""

    path: str
    expected: Expected
    origin: Origin
    xet: bool = False


@dataclass(frozen=True)
class Listing:
    """What a source offers of an artifact, and the exact revision that it is; `offline` when it could not be asked."""

    source: str
    where: str
    requested: str
    revision: str
    files: tuple[RemoteFile, ...]
    offline: bool = False
