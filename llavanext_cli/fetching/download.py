"""Download one plain address to a partial file; the sha256 is computed while the bytes arrive.

    partial file   [################------------]     its size says where to resume:  Range: bytes=SIZE-
    NAME.version   "etag of the server's file"        ... unless the file changed:    If-Range: "etag"

Without a digest to compare, the server's ETag or date must prove that both parts are of the same file. A server that
has neither, or no ranges, is read from the start. Used for COCO and for ModelScope; the Hub has huggingface_hub.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import requests
from urllib3.exceptions import HTTPError

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching.network import RESUME, cause_of, explain_status, explained
from llavanext_cli.fetching.remote import BLOCK, StoppedError

CHUNK = 1 << 20
LONGEST_PAUSE = 30


@dataclass
class Download:
    """One file on its way.

    Attributes:
        part: the partial file.
        label: the file's name in messages.
        size: bytes it must have; None when unknown.
        pinned: its digest is known, so a wrong mixture of two versions would be noticed.
        retries: further attempts after one that brought nothing.
    """

    session: requests.Session
    url: str
    part: Path
    label: str
    size: int | None = None
    pinned: bool = False
    timeout: float = 30.0
    retries: int = 5
    stop: threading.Event = field(default_factory=threading.Event)
    _digest: Any = field(default_factory=hashlib.sha256)
    _hashed: int = 0

    def run(self) -> str:
        """Download the file, over as many requests as it takes.

        Returns:
            Its sha256. The caller compares it.

        Raises:
            FetchError: the server refuses, or brings nothing however often it is asked. The part is kept.
            OSError: the part cannot be written.
            StoppedError: `stop` was set.
        """
        failures = 0
        while True:
            before = self._arrived()
            try:
                self._request()
                if self.size is None or self._hashed >= self.size:
                    return str(self._digest.hexdigest())
                fault: Exception = HTTPError(f"{self.size - self._hashed} bytes are missing")
            except HTTPError as broken:  # urllib3's family: a connection that broke or fell silent
                fault = broken
            failures = 0 if self._arrived() > before else failures + 1
            if failures > self.retries:
                raise FetchError(
                    f"{urlsplit(self.url).hostname} does not deliver {self.label}: {_reason(fault)}",
                    f"{RESUME}; a slow connection needs a larger --timeout",
                ) from cause_of(fault)
            if failures and self.stop.wait(min(2 ** (failures - 1), LONGEST_PAUSE)):
                raise StoppedError

    def _arrived(self) -> int:
        return self.part.stat().st_size if self.part.exists() else 0

    def _request(self) -> None:
        """Ask for what is missing and append it to the part."""
        arrived = self._arrived()
        headers = self._range_headers(arrived)
        if arrived and arrived == self.size and headers:
            self._hash_part(arrived)
            return
        with _get(self.session, self.url, headers, self.timeout) as response:
            first, total = _content_range(response)
            if response.status_code == 416 and headers:  # the part is longer than the file, so it is of another one
                self.part.unlink()
                self._hashed = 0
                return self._request()
            check_answer(response, self.label, known=self.size is not None or self.pinned)
            if response.status_code == 200:
                first, total = 0, _length(response)
            if first is None or first not in (0, arrived):
                raise FetchError(
                    f"{urlsplit(self.url).hostname} sends byte {first} of {self.label} when asked for byte {arrived}",
                    "a proxy may be ignoring byte ranges: use another --source",
                )
            if None not in (total, self.size) and total != self.size:
                raise FetchError(
                    f"{self.label} has {total} bytes at {urlsplit(self.url).hostname}, not {self.size}",
                    "the server has another file, or a proxy answers in its place: use another --source",
                )
            self._version.write_text(_version(response))
            self._hash_part(first)
            with self.part.open("r+b" if first else "wb") as file:
                file.seek(first)
                file.truncate()
                for chunk in response.raw.stream(CHUNK, decode_content=False):
                    if self.stop.is_set():
                        raise StoppedError
                    file.write(chunk)
                    self._digest.update(chunk)
                    self._hashed += len(chunk)

    @property
    def _version(self) -> Path:
        return self.part.with_name(self.part.name + ".version")

    def _range_headers(self, arrived: int) -> dict[str, str]:
        version = self._version.read_text() if self._version.exists() else ""
        if not arrived or not (version or self.pinned):
            return {}
        return {"Range": f"bytes={arrived}-"} | ({} if self.pinned else {"If-Range": version})

    def _hash_part(self, size: int) -> None:
        """Bring the digest to the first `size` bytes of the part."""
        if self._hashed == size:
            return
        self._digest, self._hashed = hashlib.sha256(), 0
        if size:
            with self.part.open("rb", buffering=0) as file:
                while self._hashed < size and (block := file.read(min(BLOCK, size - self._hashed))):
                    self._digest.update(block)
                    self._hashed += len(block)


def probe_size(session: requests.Session, url: str, label: str, timeout: float) -> int | None:
    """Bytes of the file at an address; None when its server does not say. Raises `FetchError`."""
    with _get(session, url, {"Range": "bytes=0-0"}, timeout) as response:
        total = _content_range(response)[1]
        if response.status_code == 416 and total == 0:
            return 0
        check_answer(response, label, known=False)
        return total if response.status_code == 206 else _length(response)


def check_answer(response: requests.Response, label: str, known: bool) -> None:
    """Raises `FetchError` for an answer without a file, or with a web page where the file is not `known`."""
    host, path = urlsplit(response.url).hostname, urlsplit(response.url).path.lower()
    if response.status_code not in (200, 206):
        raise explain_status(response.status_code, label, host, response.headers.get("Retry-After", ""))
    is_page = response.headers.get("Content-Type", "").lower().startswith("text/html")
    if is_page and not known and not path.endswith((".html", ".htm")):
        raise FetchError(
            f"{host} answers with a web page instead of the file {label}",
            "name a repository as ORG/REPO or dataset:ORG/REPO, or write the address of the file itself",
        )


@contextmanager
def _get(session: requests.Session, url: str, headers: dict[str, str], timeout: float) -> Iterator[requests.Response]:
    with explained(url):
        response = session.get(url, headers=headers, stream=True, timeout=timeout)
    with response:
        yield response


def _length(response: requests.Response) -> int | None:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isdecimal() else None


def _content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, size of the file) of a Content-Range header."""
    found = re.fullmatch(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", response.headers.get("Content-Range", ""))
    if found is None:
        return None, None
    first, total = found.groups()
    return int(first) if first else None, int(total) if total != "*" else None


def _version(response: requests.Response) -> str:
    """What names this version of the file: a strong ETag, or else the date of its last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")


def _reason(fault: Exception) -> str:
    text = str(fault)
    if "timed out" in text:
        return "no byte came for too long"
    return text if "missing" in text else "the connection broke"
