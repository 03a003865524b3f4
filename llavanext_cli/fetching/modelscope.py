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
import re
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import requests

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching.network import check_token, explain_status, explained
from llavanext_cli.fetching.registry import DATASET, MODELSCOPE, Place, near_names
from llavanext_cli.fetching.remote import Listing, Origin, RemoteFile

PAGE = 100
MOST_PAGES = 10_000


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
        prefix = f"{place.folder}/" if place.folder else ""
        files = []
        for entry in self._dataset(place, revision) if place.kind == DATASET else self._model(place, revision):
            try:
                path, kind, size = entry["Path"], entry.get("Type"), entry.get("Size")
                digest = str(entry.get("Sha256") or "").lower()
            except (TypeError, KeyError, AttributeError):
                raise self._strange() from None
            if kind == "tree" or not path.startswith(prefix):
                continue
            origin = Origin(MODELSCOPE, place.repo, place.kind, revision, path)
            known = re.fullmatch(r"[0-9a-f]{64}", digest)
            files.append(
                RemoteFile(
                    path.removeprefix(prefix),
                    origin,
                    size=size if isinstance(size, int) else None,
                    sha256=digest if known else "",
                )
            )
        return Listing(MODELSCOPE, f"{self.endpoint}/{place.kind}s/{place.repo}", revision, revision, tuple(files))

    def _model(self, place: Place, revision: str) -> list[Any]:
        query = urlencode({"Revision": revision, "Recursive": "True"})
        return self._files(self._get(f"/api/v1/models/{quote(place.repo)}/repo/files?{query}", place, revision))

    def _dataset(self, place: Place, revision: str) -> list[Any]:
        number = self._get(f"/api/v1/datasets/{quote(place.repo)}", place, revision).get("Id")
        entries: list[Any] = []
        for page in range(1, MOST_PAGES):
            query = urlencode(
                {"Revision": revision, "Root": "/", "Recursive": "True", "PageNumber": page, "PageSize": PAGE}
            )
            found = self._files(self._get(f"/api/v1/datasets/{number}/repo/tree?{query}", place, revision))
            entries += found
            if len(found) < PAGE:
                break
        return entries

    def _get(self, path: str, place: Place, revision: str) -> dict[str, Any]:
        """The "Data" of an answer."""
        with explained(self.endpoint):
            response = self.session.get(self.endpoint + path, timeout=self.timeout)
        try:
            answer = response.json()
        except ValueError:
            answer = None
        code = answer.get("Code") if isinstance(answer, dict) else None
        if 404 in (response.status_code, code):
            raise FetchError(
                f"{self.host} has no {place.kind} {place.repo} at revision {revision!r}",
                near_names(place.repo, MODELSCOPE) or "Names differ between ModelScope and the Hub: look it up there.",
            )
        if response.status_code != 200:
            raise explain_status(response.status_code, place.repo, self.host, response.headers.get("Retry-After", ""))
        if code is None:
            raise self._strange()
        if code != 200:
            said = str(answer.get("Message", ""))[:200].replace("\n", " ")
            raise FetchError(
                f"{self.host} refuses {place.repo} (code {code}): {said}",
                f"See {self.endpoint}/{place.kind}s/{place.repo}.",
            )
        if not isinstance(answer.get("Data"), dict):
            raise self._strange()
        return answer["Data"]

    def _files(self, data: dict[str, Any]) -> list[Any]:
        files = data.get("Files") or []
        if not isinstance(files, list):
            raise self._strange()
        return files

    def _strange(self) -> FetchError:
        return FetchError(
            f"{self.host} does not answer as ModelScope does",
            "Check --endpoint and MODELSCOPE_DOMAIN. A login page or a proxy may be answering in its place.",
        )
