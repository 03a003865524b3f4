"""ModelScope through its plain HTTP API: the listing, and the address of a file.

    models     GET /api/v1/models/ORG/NAME/repo/files?Revision=master&Recursive=True     {"Data": {"Files": [...]}}
    datasets   GET /api/v1/datasets/ORG/NAME                                             {"Data": {"Id": 7, ...}}
               GET /api/v1/datasets/7/repo/tree?...&PageNumber=1&PageSize=100            {"Data": {"Files": [...]}}
    a file     GET /api/v1/{models|datasets}/ORG/NAME/repo?Revision=...&FilePath=...

A file's entry has Path, Size, Type ("blob" or "tree") and, for all but the smallest, Sha256. Source: modelscope's
`hub/api.py` and `hub/file_download.py`.
"""

from __future__ import annotations

import os
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import msgspec
import requests

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching.network import check_token, explain_status, explain_stranger, explained
from llavanext_cli.fetching.registry import DATASET, MODELSCOPE, Place, near_names
from llavanext_cli.fetching.remote import Listing, Origin, RemoteFile

PAGE = 100
MOST_PAGES = 10_000


class _File(msgspec.Struct):
    Path: str
    Type: str = ""
    Size: int | None = None
    Sha256: str | None = None


class _Data(msgspec.Struct):
    Id: int = 0
    Files: list[_File] | None = None


class _Answer(msgspec.Struct):
    Code: int = 0
    Message: str = ""
    Data: Any = None


class ModelScope:
    """One endpoint of ModelScope. The token (MODELSCOPE_API_TOKEN) is a cookie of its host alone."""

    def __init__(self, session: requests.Session, endpoint: str, timeout: float):
        self.session, self.endpoint, self.timeout = session, endpoint, timeout
        self.host = urlsplit(endpoint).hostname or ""
        token = check_token(os.environ.get("MODELSCOPE_API_TOKEN", "").strip(), "MODELSCOPE_API_TOKEN")
        if token:
            session.cookies.set("m_session_id", token, domain=self.host)

    def file_url(self, origin: Origin) -> str:
        """The address of a file, as ModelScope's own client writes it."""
        query = {"Revision": origin.revision, "FilePath": origin.path}
        if origin.kind == DATASET:
            query = {"Source": "SDK", **query}
        return f"{self.endpoint}/api/v1/{origin.kind}s/{quote(origin.repo)}/repo?{urlencode(query)}"

    def list_files(self, place: Place, revision: str | None) -> Listing:
        """The files below `place.folder`, with their sizes and digests.

        Raises:
            FetchError: the repository or the revision is missing, or not for us.
            UnreachableError: no answer.
        """
        revision = revision or place.revision or "master"
        files = []
        for entry in self._dataset(place, revision) if place.kind == DATASET else self._model(place, revision):
            path = entry.Path.removeprefix(f"{place.folder}/") if place.folder else entry.Path
            if entry.Type == "tree" or (place.folder and path == entry.Path):
                continue
            origin = Origin(MODELSCOPE, place.repo, place.kind, revision, entry.Path)
            files.append(RemoteFile(path, origin, entry.Size, (entry.Sha256 or "").lower()))
        return Listing(MODELSCOPE, f"{self.endpoint}/{place.kind}s/{place.repo}", revision, revision, tuple(files))

    def _model(self, place: Place, revision: str) -> list[_File]:
        query = urlencode({"Revision": revision, "Recursive": "True"})
        return self._get(f"/api/v1/models/{quote(place.repo)}/repo/files?{query}", place, revision).Files or []

    def _dataset(self, place: Place, revision: str) -> list[_File]:
        number = self._get(f"/api/v1/datasets/{quote(place.repo)}", place, revision).Id
        query = urlencode({"Revision": revision, "Root": "/", "Recursive": "True", "PageSize": PAGE})
        files: list[_File] = []
        for page in range(1, MOST_PAGES):
            path = f"/api/v1/datasets/{number}/repo/tree?{query}&PageNumber={page}"
            found = self._get(path, place, revision).Files or []
            files += found
            if len(found) < PAGE:
                break
        return files

    def _get(self, path: str, place: Place, revision: str) -> _Data:
        """The "Data" of an answer."""
        with explained(self.endpoint):
            response = self.session.get(self.endpoint + path, timeout=self.timeout)
        try:
            answer = msgspec.json.decode(response.content, type=_Answer)
        except msgspec.MsgspecError:
            answer = _Answer()
        if 404 in (response.status_code, answer.Code):
            raise FetchError(
                f"{self.host} has no {place.kind} {place.repo} at revision {revision!r}",
                near_names(place.repo, MODELSCOPE)
                or "look the name up on ModelScope: it may differ from that on the Hub",
            )
        if response.status_code != 200:
            raise explain_status(response.status_code, place.repo, self.host, response.headers.get("Retry-After", ""))
        if answer.Code not in (0, 200):
            raise FetchError(
                f"{self.host} refuses {place.repo} (code {answer.Code}): {answer.Message[:200]}",
                f"see {self.endpoint}/{place.kind}s/{place.repo}",
            )
        try:
            return msgspec.convert(answer.Data, _Data)
        except msgspec.ValidationError as fault:
            raise explain_stranger(self.host, MODELSCOPE) from fault
