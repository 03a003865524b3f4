"""ModelScope through its plain HTTP API: the listing, and the address of a file.

    models     GET /api/v1/models/ORG/NAME/repo/files?Revision=master&Recursive=True     {"Data": {"Files": [...]}}
    datasets   GET /api/v1/datasets/ORG/NAME                                             {"Data": {"Id": 7, ...}}
               GET /api/v1/datasets/7/repo/tree?...&PageNumber=1&PageSize=100            {"Data": {"Files": [...]}}
    a file     GET /api/v1/{models|datasets}/ORG/NAME/repo?Revision=...&FilePath=...

A file's entry has Path, Size, Type ("blob" or "tree") and, for all but the smallest, Sha256. Source: modelscope's
`hub/api.py` and `hub/file_download.py`. A token (MODELSCOPE_API_TOKEN) travels as the cookie m_session_id.
"""

from __future__ import annotations

import os
import re
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import requests

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching import guard
from llavanext_cli.fetching.digest import Expected
from llavanext_cli.fetching.endpoint import checked_token
from llavanext_cli.fetching.faults import explain_no_answer
from llavanext_cli.fetching.net import Net
from llavanext_cli.fetching.redaction import cause_of, redact
from llavanext_cli.fetching.registry import DATASET, MODELSCOPE, Place, near_names
from llavanext_cli.fetching.remote import MOST_PAGES, Listing, Origin, RemoteFile

PAGE = 100


def file_url(origin: Origin) -> str:
    """The address of a file, as ModelScope's own client writes it."""
    kind = "datasets" if origin.kind == DATASET else "models"
    query = {"Revision": origin.revision, "FilePath": origin.path}
    if origin.kind == DATASET:
        query = {"Source": "SDK", **query}
    return f"{origin.endpoint}/api/v1/{kind}/{quote(origin.repo)}/repo?{urlencode(query)}"


def modelscope_cookies(endpoint: str) -> dict[str, str]:
    """The token as the cookie of one server; nothing when there is none, or when it would travel in the clear."""
    token = checked_token(os.environ.get("MODELSCOPE_API_TOKEN", "").strip(), "MODELSCOPE_API_TOKEN")
    parts = urlsplit(endpoint)
    safe = parts.scheme == "https" or guard.reach_of(parts.hostname or "", resolve=True) == guard.PRIVATE
    return {parts.netloc: f"m_session_id={token}"} if token and safe else {}


class ModelScope:
    """One endpoint of ModelScope."""

    def __init__(self, net: Net, endpoint: str):
        self.net, self.endpoint = net, endpoint

    def list_files(self, place: Place, revision: str | None) -> Listing:
        """The files below `place.folder`, with their sizes and digests.

        Raises:
            FetchError: the repository or the revision is not there, or not for us.
            UnreachableError: no answer.
        """
        revision = revision or place.revision or "master"
        listed = self._dataset(place, revision) if place.kind == DATASET else self._model(place, revision)
        files = []
        for entry in listed:
            if not isinstance(entry, dict) or not isinstance(entry.get("Path"), str):
                raise self._strange()
            if entry.get("Type") == "tree":
                continue
            path = entry["Path"]
            if place.folder and not path.startswith(place.folder + "/"):
                continue
            size, digest = entry.get("Size"), str(entry.get("Sha256") or "").lower()
            expected = Expected(
                size=size if type(size) is int and 0 <= size < 1 << 63 else None,
                sha256=digest if re.fullmatch(r"[0-9a-f]{64}", digest) else "",
            )
            origin = Origin(MODELSCOPE, self.endpoint, place.repo, place.kind, revision, path)
            files.append(RemoteFile(path.removeprefix(place.folder + "/") if place.folder else path, expected, origin))
        if len({file.path for file in files}) < len(files):
            raise self._strange()
        where = f"{self.endpoint}/{'datasets' if place.kind == DATASET else 'models'}/{place.repo}"
        return Listing(MODELSCOPE, where, revision, revision, tuple(files))

    def _model(self, place: Place, revision: str) -> list[Any]:
        query = urlencode({"Revision": revision, "Recursive": "True"})
        return self._files(self._get(f"/api/v1/models/{quote(place.repo)}/repo/files?{query}", place, revision))

    def _dataset(self, place: Place, revision: str) -> list[Any]:
        data = self._get(f"/api/v1/datasets/{quote(place.repo)}", place, revision)
        number = data.get("Id")
        if not isinstance(number, int):
            raise self._strange()
        entries: list[Any] = []
        for page in range(1, MOST_PAGES):
            query = urlencode(
                {
                    "Revision": revision,
                    "Root": "/",
                    "Recursive": "True",
                    "PageNumber": page,
                    "PageSize": PAGE,
                }
            )
            found = self._files(self._get(f"/api/v1/datasets/{number}/repo/tree?{query}", place, revision))
            if found and entries[-len(found) :] == found:
                break  # a server that does not count pages
            entries += found
            if len(found) < PAGE:
                break
        return entries

    def _get(self, path: str, place: Place, revision: str) -> dict[str, Any]:
        try:
            response = self.net.session().get(self.endpoint + path)
        except requests.RequestException as fault:
            raise explain_no_answer(fault, self.endpoint) from cause_of(fault)
        try:
            answer = response.json()
        except (ValueError, RecursionError):
            answer = None
        if response.status_code in (401, 403):
            raise FetchError(
                f"{urlsplit(self.endpoint).hostname} does not give out {place.repo} (HTTP {response.status_code})",
                f"See {self.endpoint}/models/{place.repo}; then set MODELSCOPE_API_TOKEN.",
            )
        code = answer.get("Code") if isinstance(answer, dict) else None
        if 404 in (response.status_code, code):
            raise FetchError(
                f"{urlsplit(self.endpoint).hostname} has no {place.kind} {place.repo} at revision {revision!r}",
                near_names(place.repo, MODELSCOPE) or "Names differ between ModelScope and the Hub: look it up there.",
            )
        if response.status_code != 200:
            raise FetchError(
                f"{urlsplit(self.endpoint).hostname} answers HTTP {response.status_code} for {place.repo}",
                "Try later, or use --source hf.",
            )
        if not isinstance(answer, dict) or not isinstance(code, int):
            raise self._strange()
        if code != 200:
            said = redact(str(answer.get("Message", "")))[:200].replace("\n", " ")
            raise FetchError(
                f"{urlsplit(self.endpoint).hostname} refuses {place.repo} (code {code}): {said}",
                f"See {self.endpoint}/models/{place.repo}.",
            )
        if not isinstance(answer.get("Data"), dict):
            raise self._strange()
        return answer["Data"]

    def _files(self, data: dict[str, Any]) -> list[Any]:
        files = data.get("Files")
        if files is None:
            return []
        if not isinstance(files, list):
            raise self._strange()
        return files

    def _strange(self) -> FetchError:
        return FetchError(
            f"{urlsplit(self.endpoint).hostname} answers, but not as ModelScope does",
            "Is the --endpoint right? A login page or a proxy may be answering in its place.",
        )
