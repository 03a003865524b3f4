"""What the user asked `fetch` for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llavanext_cli.fetching.registry import HUB


@dataclass(frozen=True)
class FetchRequest:
    """The arguments and options of one `llavanext fetch`.

    Attributes:
        to: the folder to fill, or with `--check` to read.
        names: artifacts of the registry, `org/repo`, `dataset:org/repo`, or plain addresses; none for `--check`.
        endpoint: the server of `source`, in place of HF_ENDPOINT (or MODELSCOPE_DOMAIN) and the usual one.
        revision: commit, tag or branch, in place of the registry's.
        only: globs; other files are left out.
        shards: numbers of the shards wanted, as "1,3-5".
        jobs: downloads at once.
        timeout: seconds of silence after which a connection is dead.
        retries: further attempts after one that brought nothing.
        force: replace files that exist and differ.
    """

    to: Path
    names: tuple[str, ...] = ()
    source: str = HUB
    endpoint: str | None = None
    revision: str | None = None
    only: tuple[str, ...] = ()
    shards: str | None = None
    keep_archives: bool = False
    jobs: int = 4
    timeout: float = 30.0
    retries: int = 5
    dry_run: bool = False
    force: bool = False
