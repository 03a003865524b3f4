"""The Hub's part, done by huggingface_hub: listing, cache, etags, resuming, xet, HF_TOKEN.

It downloads into a staging folder of ours; what comes out is checked against the listing before it gets its name. Its
HTTP goes through `net`, so that retries, guards and Ctrl-C are the same everywhere.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests

from llavanext_cli.errors import FetchError, LlavaNextError
from llavanext_cli.fetching.digest import Expected, Follower
from llavanext_cli.fetching.endpoint import hub_token
from llavanext_cli.fetching.faults import UnreachableError, explain_no_answer
from llavanext_cli.fetching.net import Net, TransferBrokenError
from llavanext_cli.fetching.redaction import cause_of
from llavanext_cli.fetching.registry import DATASET, HUB, Place, near_names
from llavanext_cli.fetching.remote import MOST_PAGES, Listing, Origin, RemoteFile

POLL_SECONDS = 0.5


class Hub:
    """One endpoint of the Hub. From the first one to the end of the run huggingface_hub uses the sessions of `net`."""

    def __init__(self, net: Net, endpoint: str):
        from huggingface_hub import HfApi

        net.enter_once(hub_backend)
        self.net, self.endpoint = net, endpoint
        # A manifest may name any server; the token goes only to the one that the user chose.
        self.token = hub_token(endpoint) if urlsplit(endpoint).netloc in net.token_hosts else False
        self.api = HfApi(endpoint=endpoint, token=self.token, library_name="llavanext")

    def list_files(self, place: Place, revision: str | None) -> Listing:
        """The files below `place.folder`, with their sizes and digests, at one commit.

        Raises:
            FetchError: the repository, the revision or the folder is not there, or not for us.
            UnreachableError: no answer.
        """
        from huggingface_hub import constants
        from huggingface_hub.hf_api import RepoFile

        requested = revision or place.revision or "main"
        if constants.HF_HUB_OFFLINE:
            raise UnreachableError("HF_HUB_OFFLINE is set", "Unset it to fetch.")
        with self._explained(place, requested):
            try:
                info = self.api.repo_info(place.repo, repo_type=place.kind, revision=requested)
                commit = info.sha
                with _no_page_twice(self.net.session()):
                    entries = list(
                        self.api.list_repo_tree(
                            place.repo, place.folder or None, recursive=True, revision=commit, repo_type=place.kind
                        )
                    )
                files = [self._remote(entry, place, commit) for entry in entries if isinstance(entry, RepoFile)]
                if len({file.path for file in files}) < len(files):
                    raise ValueError("a path that is listed twice")
            except (KeyError, TypeError, AttributeError, ValueError, RecursionError) as fault:
                # huggingface_hub takes the answer's JSON apart without looking.
                if isinstance(fault, requests.RequestException):
                    raise
                raise FetchError(f"{self.endpoint} answers, but not as a Hub does", _NO_HUB) from cause_of(fault)
        if not commit or not isinstance(commit, str):
            raise FetchError(f"{self.endpoint} does not say at which commit {place.repo} is", _NO_HUB)
        where = f"{self.endpoint}/{'datasets/' if place.kind == DATASET else ''}{place.repo}"
        return Listing(HUB, where, requested, commit, tuple(files))

    def _remote(self, entry: Any, place: Place, commit: str) -> RemoteFile:
        lfs = entry.lfs
        size, sha256 = (lfs.size, lfs.sha256.lower()) if lfs else (entry.size, "")
        git_blob = "" if lfs else entry.blob_id.lower()
        if not isinstance(entry.path, str) or type(size) is not int or not 0 <= size < 1 << 63:
            raise ValueError("a path or a size that is none")
        if not re.fullmatch(r"[0-9a-f]{64}|[0-9a-f]{40}", sha256 or git_blob):
            raise ValueError("a digest that is none")
        expected = Expected(size, sha256, git_blob)
        path = entry.path.removeprefix(place.folder + "/") if place.folder else entry.path
        origin = Origin(HUB, self.endpoint, place.repo, place.kind, commit, entry.path)
        return RemoteFile(path, expected, origin, xet=bool(getattr(entry, "xet_hash", None)))

    def download(self, origin: Origin, stage: Path, follower: Follower, report: Callable[[int], None]) -> Path:
        """Download one file into `stage`, a folder of its own, going on where an earlier attempt ended.

        Args:
            report: told the bytes that are there.

        Returns:
            The file's path in `stage`; its digest is still to be checked.

        Raises:
            FetchError, OSError, StoppedError: as `transfer.download_url`.
        """
        from huggingface_hub import hf_hub_download

        stage.mkdir(parents=True, exist_ok=True)

        def watch(position: int) -> None:
            follower.advance(position)
            report(position)

        follower.follow(lambda: _open_partial(stage, origin.path))
        attempt = 0
        while True:
            before, began = _partial_size(stage, "st_size"), time.monotonic()
            try:
                with (
                    self._explained(Place(origin.repo, origin.kind), origin.revision),
                    self.net.watched(watch),
                    _polled(stage, report),
                ):
                    return Path(
                        hf_hub_download(
                            origin.repo,
                            origin.path,
                            repo_type=origin.kind,
                            revision=origin.revision,
                            endpoint=self.endpoint,
                            token=self.token,
                            local_dir=stage,
                            library_name="llavanext",
                        )
                    )
            except TransferBrokenError as fault:
                reason = str(fault)
            except _InconsistentError as fault:
                reason = str(fault)
                shutil.rmtree(stage, ignore_errors=True)  # longer than it should be, or a range that was refused
                stage.mkdir(parents=True, exist_ok=True)
            brought = _partial_size(stage, "st_size") - before
            attempt = 0 if self.net.limits.is_progress(brought, time.monotonic() - began) else attempt + 1
            if attempt > self.net.limits.retries:
                raise FetchError(
                    f"{urlsplit(self.endpoint).hostname} does not deliver {origin.path}: {reason}",
                    "Run the same command again: what has arrived is kept. A slow line needs a larger --timeout.",
                )
            if attempt:
                self.net.wait(self.net.limits.pause_before(attempt - 1))

    # --------------------------------------------------------------------------------------------------- what it says

    @contextmanager
    def _explained(self, place: Place, revision: str) -> Iterator[None]:
        from huggingface_hub.errors import LocalEntryNotFoundError

        try:
            yield
        except (LlavaNextError, TransferBrokenError):
            raise
        except (requests.RequestException, OSError) as fault:
            # "Not in the cache either" is said of every failure of the request before a download.
            asked = fault.__cause__ if isinstance(fault, LocalEntryNotFoundError) and fault.__cause__ else fault
            explained = self._explain(asked, place, revision)
            if explained is None:
                raise
            raise explained from cause_of(asked)

    def _explain(self, fault: BaseException, place: Place, revision: str) -> Exception | None:
        """What huggingface_hub raised, in our words; None when it is not of its making."""
        from huggingface_hub import errors

        host = urlsplit(self.endpoint).hostname
        if isinstance(fault, errors.GatedRepoError):
            page = f"{self.endpoint}/{'datasets/' if place.kind == DATASET else ''}{place.repo}"
            return FetchError(
                f"{place.repo} is gated: its owner wants its terms accepted first",
                f"Log in, accept them at {page}, make a token at {self.endpoint}/settings/tokens, and set HF_TOKEN."
                + (" The token that is set is not of an account that did." if self.token else ""),
            )
        if isinstance(fault, errors.RevisionNotFoundError):
            return FetchError(f"{place.repo} has no revision {revision!r}", self._near_revisions(place, revision))
        if isinstance(fault, errors.RepositoryNotFoundError):
            return self._not_found(place)
        if isinstance(fault, errors.FileMetadataError | errors.LocalEntryNotFoundError | requests.JSONDecodeError):
            return FetchError(f"{host} answers, but not as a Hub does", _NO_HUB)
        if isinstance(fault, errors.EntryNotFoundError):
            return FetchError(
                f"{place.repo} does not have what is wanted of it at revision {revision[:12]}",
                "Another --revision may have it.",
            )
        if isinstance(fault, requests.HTTPError):
            status = fault.response.status_code if fault.response is not None else 0
            answered = urlsplit(fault.response.url if fault.response is not None else self.endpoint)
            if status == 416:
                return _InconsistentError("it refuses to go on where the download ended")
            if status == 401 and not self.token:
                return self._not_found(place)
            if answered.netloc != urlsplit(self.endpoint).netloc:
                return FetchError(
                    f"{answered.hostname}, where {host} keeps the files of {place.repo}, answers HTTP {status}",
                    "Try later, or use another --endpoint.",
                )
            return _refused(status, host, place, bool(self.token))
        if isinstance(fault, requests.RequestException):
            return explain_no_answer(fault, self.endpoint)
        if isinstance(fault, OSError) and fault.errno is None and "onsistency" in str(fault):
            return _InconsistentError("what arrived has not the size that was announced")
        return None

    def _not_found(self, place: Place) -> FetchError:
        near = self._near_repositories(place)
        names = near_names(place.repo)
        hint = f"Did you mean {' or '.join(near)}?" if near else names
        if not self.token:
            hint = f"{hint} If it is private, set HF_TOKEN.".strip()
        kind = "dataset" if place.kind == DATASET else "model"
        other = "" if place.kind == DATASET else f" A data set is written dataset:{place.repo}."
        return FetchError(
            f"{urlsplit(self.endpoint).hostname} has no {kind} {place.repo}, or it is private",
            f"{hint}{other}".strip() or f"Look its name up at {self.endpoint}.",
        )

    def _near_repositories(self, place: Place) -> list[str]:
        """Names that the server finds for it; an empty list when it does not answer well."""
        from difflib import get_close_matches

        try:
            answer = self.net.session().get(
                f"{self.endpoint}/api/{place.kind}s", params={"search": place.repo.partition("/")[2], "limit": 5}
            )
            names = [entry["id"] for entry in answer.json()] if answer.status_code == 200 else []
        except (requests.RequestException, LlavaNextError, ValueError, KeyError, TypeError):
            return []
        others = [name for name in names if isinstance(name, str) and name != place.repo]
        return get_close_matches(place.repo, others, n=3, cutoff=0.3)

    def _near_revisions(self, place: Place, revision: str) -> str:
        from difflib import get_close_matches

        try:
            refs = self.api.list_repo_refs(place.repo, repo_type=place.kind)
            names = [ref.name for ref in (*refs.branches, *refs.tags)]
        except (requests.RequestException, LlavaNextError, ValueError, KeyError, TypeError):
            names = []
        near = get_close_matches(revision, names, n=3, cutoff=0.5) or names[:5]
        return f"It has {', '.join(near)}." if near else "Leave --revision out for the usual one."


def uses_xet() -> bool:
    """Whether huggingface_hub brings files that the Hub keeps in xet by xet; else they come through our sessions."""
    from huggingface_hub.utils import is_xet_available

    return is_xet_available()


_NO_HUB = "Is the --endpoint (or HF_ENDPOINT) right? A login page or a proxy may be answering in its place."


class _InconsistentError(Exception):
    """What is staged does not fit what the server says; it is thrown away."""


def _refused(status: int, host: str | None, place: Place, has_token: bool) -> FetchError:
    if status == 401:
        return FetchError(f"{host} does not know the token that is set", "Make a new one and set HF_TOKEN.")
    if status == 403:
        return FetchError(
            f"{host} forbids access to {place.repo} (HTTP 403)",
            "The token lacks the right to read it: use one with read access." if has_token else "Set HF_TOKEN.",
        )
    return FetchError(f"{host} answers HTTP {status} for {place.repo}", "Try later, or use another --endpoint.")


@contextmanager
def _no_page_twice(session: requests.Session) -> Iterator[None]:
    """Within, a listing whose pages lead back to one another, or never end, is a `ValueError`."""
    pages: set[str] = set()

    def check(response: requests.Response, *args: Any, **named: Any) -> None:
        if response.status_code == 200 and (response.url in pages or len(pages) >= MOST_PAGES):
            raise ValueError("a listing without an end")
        pages.add(response.url)

    session.hooks["response"].append(check)
    try:
        yield
    finally:
        session.hooks["response"].remove(check)


@contextmanager
def hub_backend(net: Net) -> Iterator[None]:
    """Let huggingface_hub use our sessions, and be quiet: we show the progress, and its log lines hold signed URLs."""
    from huggingface_hub import configure_http_backend, constants
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    logger = logging.getLogger("huggingface_hub")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    ours_to_disable = constants.HF_HUB_DISABLE_PROGRESS_BARS is None and not are_progress_bars_disabled()
    if ours_to_disable:
        disable_progress_bars()
    hf_transfer = constants.HF_HUB_ENABLE_HF_TRANSFER
    constants.HF_HUB_ENABLE_HF_TRANSFER = False  # its connections are not ours, and cannot be resumed
    configure_http_backend(net.session)
    try:
        yield
    finally:
        configure_http_backend()
        if ours_to_disable:
            enable_progress_bars()
        constants.HF_HUB_ENABLE_HF_TRANSFER = hf_transfer
        logger.setLevel(level)


def _open_partial(stage: Path, path: str) -> int:
    """A descriptor of the file while it grows, or of the finished one."""
    for candidate in (*stage.rglob("*.incomplete"), stage / path):
        try:
            return os.open(candidate, os.O_RDONLY)
        except FileNotFoundError:
            continue
    raise FileNotFoundError(path)


def _partial_size(stage: Path, field: str) -> int:
    """`st_size` of the largest partial file, or what it takes on the disk (`st_blocks`, in bytes)."""
    sizes = []
    for candidate in stage.rglob("*.incomplete"):
        try:
            sizes.append(getattr(candidate.stat(), field))
        except FileNotFoundError:
            continue
    return max(sizes, default=0) * (512 if field == "st_blocks" else 1)


@contextmanager
def _polled(stage: Path, report: Callable[[int], None]) -> Iterator[None]:
    """Report from the size of the partial file, for transfers that do not go through our session."""
    ended = threading.Event()

    def poll() -> None:
        while not ended.wait(POLL_SECONDS):
            report(_partial_size(stage, "st_blocks"))  # xet may set the length first and fill it later

    thread = threading.Thread(target=poll, name="poll", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
