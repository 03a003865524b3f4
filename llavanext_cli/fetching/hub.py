"""The Hub, through huggingface_hub: which files a repository has, and one file at a time into a staging folder.

`hf_hub_download(local_dir=...)` is what `snapshot_download` calls for each file: it resumes, uses its cache, xet,
HF_TOKEN and the HF_HUB_* variables. It is called here file by file, so that an archive of 5 GB can be checked, unpacked
and deleted while the next one arrives. Ours are the errors, and the wait when a server is busy or cuts a connection.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlsplit

import requests

from llavanext_cli.errors import FetchError, LlavaNextError
from llavanext_cli.fetching import network
from llavanext_cli.fetching.registry import DATASET, HUB, Place, near_names
from llavanext_cli.fetching.remote import Listing, Origin, RemoteFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoFile

T = TypeVar("T")


class Hub:
    """One endpoint of the Hub.

    Args:
        timeout: seconds of silence after which a connection is dead.
        retries: further attempts after one that brought nothing.
    """

    def __init__(self, endpoint: str, timeout: float, retries: int):
        from huggingface_hub import HfApi, constants, get_token
        from huggingface_hub.utils import disable_progress_bars
        from huggingface_hub.utils import logging as hub_logging

        hub_logging.set_verbosity(logging.CRITICAL)  # its warnings contain signed addresses
        if constants.HF_HUB_DISABLE_PROGRESS_BARS is None:
            disable_progress_bars()  # ours counts all files
        constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = timeout
        self.endpoint, self.timeout, self.retries = endpoint, timeout, retries
        self.host = urlsplit(endpoint).hostname or ""
        self.has_token = bool(network.check_token(get_token() or "", "HF_TOKEN"))
        self.api = HfApi(endpoint=endpoint, library_name="llavanext")

    def list_files(self, place: Place, revision: str | None) -> Listing:
        """The files below `place.folder`, with their sizes and digests, at one commit.

        Raises:
            FetchError: the repository, the revision or the folder is missing, or not for us.
            network.UnreachableError: no answer.
        """
        from huggingface_hub.hf_api import RepoFile

        requested = revision or place.revision or "main"

        def ask() -> tuple[str, list[RepoFile]]:
            commit = self.api.repo_info(place.repo, repo_type=place.kind, revision=requested, timeout=self.timeout).sha
            entries = self.api.list_repo_tree(
                place.repo, place.folder or None, recursive=True, revision=commit, repo_type=place.kind
            )
            return commit or "", [entry for entry in entries if isinstance(entry, RepoFile)]

        try:
            commit, entries = self._patiently(ask, place, f"{place.repo} at revision {requested}")
        except (KeyError, TypeError, AttributeError) as fault:  # of its reader of the answer's JSON
            raise network.explain_stranger(self.host, HUB) from network.cause_of(fault)
        files = []
        for entry in entries:
            digest = entry.lfs.sha256 if entry.lfs else ""
            size = entry.lfs.size if entry.lfs else entry.size
            path = entry.path.removeprefix(f"{place.folder}/") if place.folder else entry.path
            origin = Origin(HUB, place.repo, place.kind, commit, entry.path)
            files.append(RemoteFile(path, origin, size, digest, "" if digest else entry.blob_id))
        return Listing(HUB, self._page(place), requested, commit, tuple(files))

    def download(self, origin: Origin, stage: Path) -> Path:
        """Download one file into `stage`, a folder of its own, resuming what an earlier attempt left there.

        Returns:
            The file's path in `stage`. The caller checks its digest.

        Raises:
            FetchError: the file is missing, not for us, or does not arrive. What has arrived is kept.
            OSError: `stage` cannot be written.
        """
        from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url

        place = Place(origin.repo, origin.kind)

        def get() -> str:
            where = {"repo_type": origin.kind, "revision": origin.revision, "endpoint": self.endpoint}
            if self.endpoint.startswith("https:"):  # huggingface_hub would follow any redirect
                url = hf_hub_url(origin.repo, origin.path, **where)
                network.check_redirect(url, get_hf_file_metadata(url, timeout=self.timeout).location)
            return hf_hub_download(
                origin.repo, origin.path, local_dir=stage, library_name="llavanext", etag_timeout=self.timeout, **where
            )

        what = f"{origin.path} of {origin.repo}"
        return Path(self._patiently(get, place, what, lambda: size_on_disk(stage)))

    def _patiently(self, call: Callable[[], T], place: Place, what: str, arrived: Callable[[], int] = lambda: 0) -> T:
        """Call until it succeeds, or has failed `retries` times in a row without more bytes having `arrived`."""
        failures = 0
        while True:
            before = arrived()
            try:
                return call()
            except LlavaNextError:
                raise
            except (OSError, RuntimeError, ValueError) as raised:  # OSError: requests' errors; RuntimeError: hf_xet's
                if isinstance(raised, OSError) and raised.errno is not None:  # of the disk
                    raise
                # "Not in the cache either" is said of every failure before a download; its cause is the failure.
                fault = raised.__cause__ if isinstance(raised, FileNotFoundError) and raised.__cause__ else raised
                failures = 0 if arrived() > before else failures + 1
                pause = _pause(fault, failures)
                if pause is None or failures > self.retries:
                    raise self._explain(fault, place, what) from network.cause_of(fault)
                time.sleep(pause)

    def _explain(self, fault: BaseException, place: Place, what: str) -> LlavaNextError:
        """What huggingface_hub raised when it was asked for `what`, in our words."""
        from huggingface_hub import errors

        if isinstance(fault, errors.GatedRepoError):
            return FetchError(
                f"{place.repo} is gated: you must accept its terms first",
                f"log in, accept them at {self._page(place)}, and set HF_TOKEN to a token of that account",
            )
        if isinstance(fault, errors.RepositoryNotFoundError):
            private = "" if self.has_token else " If it is private, set HF_TOKEN."
            other = "" if place.kind == DATASET else f" A data set is written dataset:{place.repo}."
            return FetchError(
                f"{self.host} has no {place.kind} {place.repo}, or it is private",
                f"{near_names(place.repo) or 'check the name.'}{private}{other}",
            )
        if isinstance(fault, errors.OfflineModeIsEnabled):
            return network.UnreachableError("HF_HUB_OFFLINE is set, so nothing can be fetched", "unset HF_HUB_OFFLINE")
        if isinstance(fault, FileNotFoundError | errors.FileMetadataError | requests.JSONDecodeError):
            return network.explain_stranger(self.host, HUB)
        if isinstance(fault, requests.HTTPError) and fault.response is not None:
            answer = fault.response
            if answer.status_code == 401:
                return FetchError(f"{self.host} rejects the token (HTTP 401)", "make a new one and set HF_TOKEN")
            host = urlsplit(answer.url).hostname
            return network.explain_status(answer.status_code, what, host, answer.headers.get("Retry-After", ""))
        if isinstance(fault, requests.RequestException):
            return network.explain_unreachable(fault, self.endpoint)
        reason = network.redact((str(fault).splitlines() or [""])[0])[:200]
        return FetchError(
            f"{self.host} does not deliver {what}: {reason}",
            f"{network.RESUME}; if that does not help, HF_HUB_DISABLE_XET=1 avoids the Hub's xet storage",
        )

    def _page(self, place: Place) -> str:
        return f"{self.endpoint}/{'datasets/' if place.kind == DATASET else ''}{place.repo}"


def size_on_disk(folder: Path) -> int:
    """Bytes that have arrived in a staging folder; xet writes files with holes."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):  # renamed meanwhile
            total += path.stat().st_blocks * 512 if path.is_file() else 0
    return total


def _pause(fault: BaseException, failures: int) -> float | None:
    """Seconds until the next attempt; None when another one would not help."""
    pause = float(min(2 ** (failures - 1), 30)) if failures else 0.0
    response = getattr(fault, "response", None)
    if response is not None and response.status_code in network.BUSY:
        asked = response.headers.get("Retry-After", "")
        pause = float(asked) if asked.isdecimal() else pause
        return pause if pause <= network.LONGEST_WAIT else None
    # huggingface_hub has tried again itself after other errors, where that makes sense.
    return pause if isinstance(fault, requests.exceptions.ChunkedEncodingError) else None
