"""Download one plain address: ranges over several connections, resumed after any kind of death.

    part file   [########------------####------------------]     a journal knows what is there
                         └ piece ┘       └ piece ┘└ piece ┘      missing stretches, cut into pieces
                            ▲                ▲        ▲
                       connection 1     connection 2  3          each takes the next piece when it is done

The first request asks for one byte: its answer tells size, version and whether ranges work. A server without ranges is
read from the start over one connection. Used for COCO and for ModelScope; the Hub has huggingface_hub.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import requests

from llavanext_cli.errors import FetchError
from llavanext_cli.fetching.crew import Crew
from llavanext_cli.fetching.faults import explain_no_answer, explain_status, file_label
from llavanext_cli.fetching.journal import Journal, journal_path
from llavanext_cli.fetching.net import Limits, Net, StoppedError, TransferBrokenError, content_length, content_range
from llavanext_cli.fetching.redaction import cause_of

SMALLEST_PIECE = 1 << 20
LARGEST_PIECE = 64 << 20
LARGEST_JOURNAL_STEP = 8 << 20
RESTARTS = 2
"""How often a file may change on the server while it is being downloaded."""


class FileChangedError(Exception):
    """The server has another version of the file than the one that was begun."""


def download_url(
    net: Net,
    url: str,
    part: Path,
    *,
    size: int | None = None,
    version: str = "",
    connections: int = 4,
    report: Callable[[int, int], None] = lambda done, prefix: None,
) -> int:
    """Download `url` to `part`, going on where an earlier attempt ended.

    Args:
        size: bytes the file must have; None when not known.
        version: what names the version wanted, such as its digest, if the caller checks it afterwards. Without one the
            server's ETag or date has to, and a server that gives none cannot be resumed from.
        connections: how many ranges are asked for at once.
        report: told the bytes that are there, and how many of them from the start without a hole.

    Returns:
        Bytes that came over the network. `part` is complete, and its journal is gone.

    Raises:
        FetchError: the server refuses, lies, or brings nothing however often it is asked. `part` and its journal stay.
        OSError: `part` cannot be written.
        StoppedError: the run is ending.
    """
    transferred = 0
    for _attempt in range(RESTARTS + 1):
        transfer = Transfer(net, url, part, size, version, report)
        try:
            transfer.run(connections)
            return transferred + transfer.received
        except FileChangedError:
            transferred += transfer.received
            journal_path(part).unlink(missing_ok=True)
    raise FetchError(
        f"the file changes while it is being downloaded: {file_label(url)}",
        "Try again later, or use another source.",
    )


def probe_size(net: Net, url: str) -> int | None:
    """Bytes of the file at an address, as its server says; None when it does not. Raises `FetchError`."""
    transfer = Transfer(net, url, Path(), None, "", lambda done, prefix: None)
    with transfer.ask({"Range": "bytes=0-0"}) as response:
        _, total = content_range(response)
        if response.status_code == 200:
            return content_length(response)
        if response.status_code not in (206, 416) or total is None:
            raise explain_status(response, url)
        return total


class Transfer:
    """One version of one file, from probe to the last byte."""

    def __init__(
        self,
        net: Net,
        url: str,
        part: Path,
        size: int | None,
        version: str,
        report: Callable[[int, int], None],
    ):
        self.net, self.url, self.part, self.report = net, url, part, report
        self.expected, self.version = size, version
        self.received = 0
        self.journal: Journal | None = None
        self.validator = ""
        self.cancelled = threading.Event()
        self._lock = threading.Lock()

    @property
    def limits(self) -> Limits:
        return self.net.limits

    def run(self, connections: int) -> None:
        for attempt in range(self.limits.retries + 1):
            response = self.ask({"Range": "bytes=0-0"})
            if response.status_code == 200:
                whole = self._receive_whole(response, last=attempt == self.limits.retries)
                if whole:
                    return
                self.net.wait(self.limits.pause_before(attempt))
                continue
            size = self._size_of(response)
            self.validator = _validator(response)
            if response.headers.get("Content-Length") == "1":
                with contextlib.suppress(TransferBrokenError):
                    self.net.count(-len(response.content))  # read to its end, so that the connection can be used again
            response.close()
            self._receive_ranges(size, connections)
            return

    # ------------------------------------------------------------------------------------------ a server with ranges

    def _size_of(self, response: requests.Response) -> int:
        start, total = content_range(response)
        if response.status_code == 416 and total == 0:
            return self._checked(0)  # there is no byte 0 in an empty file
        if response.status_code != 206 or start != 0 or total is None:
            raise explain_status(response, self.url)
        return self._checked(total)

    def _checked(self, total: int) -> int:
        if self.expected is not None and total != self.expected:
            raise FetchError(
                f"{file_label(self.url)} has {total} bytes at {urlsplit(self.url).hostname}, not {self.expected}",
                "The server has another file, or a proxy answers for it: use another source.",
            )
        there = self.part.stat().st_blocks * 512 if self.part.is_file() else 0
        free = shutil.disk_usage(self.part.parent).free
        if self.expected is None and total - there > free:  # the plan could not count it
            raise FetchError(
                f"{file_label(self.url)} needs {total - there} more bytes, and {free} are free on the disk",
                "Make room, or choose another disk with --to. Is it the file that you meant?",
            )
        return total

    def _receive_ranges(self, size: int, connections: int) -> None:
        self.journal = Journal(self.part, size, self.version or self.validator)
        try:
            holes = self.journal.missing()
            lacking = sum(end - start for start, end in holes)
            piece = min(LARGEST_PIECE, max(SMALLEST_PIECE, -(-lacking // (4 * connections))))
            self._tell()
            with open(self.part, "r+b") as file:
                Crew(self, file.fileno(), deque(holes), piece).work(min(connections, -(-lacking // piece)))
            if self.journal.missing():
                raise StoppedError
        except BaseException:
            self.journal.close()
            raise
        self.journal.remove()

    def receive_piece(self, descriptor: int, start: int, end: int) -> None:
        """Write bytes start..end-1, over as many requests as it takes.

        Raises:
            FetchError: nothing came, however often it was asked for.
            FileChangedError: the server's file is another one now.
        """
        step = min(LARGEST_JOURNAL_STEP, max(1 << 16, self.journal.size // 256))
        attempt = 0
        while start < end:
            before = recorded = start
            began = time.monotonic()
            reason = "the answer is shorter than its range"
            try:
                response = self.ask({"Range": f"bytes={start}-{end - 1}"})
                self._check_piece(response, start)
                for chunk in response.iter_content(None):
                    if self.cancelled.is_set():
                        raise StoppedError
                    if start >= end:  # more than it was asked for
                        break
                    chunk = chunk[: end - start]
                    _write(descriptor, chunk, start)
                    start += len(chunk)
                    if start - recorded >= step:
                        self._record(recorded, start)
                        recorded = start
                response.close()
            except TransferBrokenError as fault:
                reason = str(fault)
            finally:
                self._record(recorded, start)
            if start >= end:
                return
            attempt = 0 if self.limits.is_progress(start - before, time.monotonic() - began) else attempt + 1
            if attempt > self.limits.retries:
                raise FetchError(
                    f"{urlsplit(self.url).hostname} does not deliver {file_label(self.url)}: {reason}",
                    "Run the same command again: what has arrived is kept. A slow line needs a larger --timeout.",
                )
            if attempt:
                self.net.wait(self.limits.pause_before(attempt - 1))

    def _check_piece(self, response: requests.Response, start: int) -> None:
        first, total = content_range(response)
        if response.status_code not in (200, 206):
            raise explain_status(response, self.url)
        same = bool(self.version) or _validator(response) == self.validator
        if response.status_code == 200 or total != self.journal.size or not same:
            response.close()
            raise FileChangedError
        if first != start:
            response.close()
            raise FetchError(
                f"{urlsplit(self.url).hostname} sends byte {first} when asked for byte {start}",
                "A proxy on the way confuses ranges: use another source.",
            )

    def _record(self, start: int, end: int) -> None:
        self.journal.add(start, end)
        with self._lock:  # told in order: a prefix shorter than one told before means that the file was begun anew
            self.received += max(0, end - start)
            self._tell()

    def _tell(self) -> None:
        self.report(self.journal.done, self.journal.prefix)

    # --------------------------------------------------------------------------------------- a server without ranges

    def _receive_whole(self, response: requests.Response, last: bool) -> bool:
        """The whole file in one answer; False when it broke off and may be tried again."""
        announced = response.headers.get("Content-Length")
        length = content_length(response)
        if length is not None:
            self._checked(length)
        elif announced:  # never waited for: such an answer has no end
            response.close()
            raise FetchError(
                f"{urlsplit(self.url).hostname} announces a length that is none: {announced[:20]!r}",
                "The server, or a proxy on the way, is misbehaving: use another source.",
            )
        position = 0
        journal_path(self.part).unlink(missing_ok=True)  # of an earlier attempt by ranges, whose bytes go now
        try:
            with open(self.part, "wb") as file:
                for chunk in response.iter_content(None):
                    file.write(chunk)
                    position += len(chunk)
                    self.received += len(chunk)
                    self.report(position, position)
                    if self.expected is not None and position > self.expected:
                        self._checked(position)
        except TransferBrokenError as fault:
            if last:
                raise FetchError(
                    f"{urlsplit(self.url).hostname} does not deliver {file_label(self.url)} whole: {fault}",
                    "This server cannot resume a download: use another source, or a steadier line.",
                ) from None
            return False
        self._checked(position)
        return True

    # --------------------------------------------------------------------------------------------------------- both

    def ask(self, headers: dict[str, str]) -> requests.Response:
        try:
            response = self.net.session().get(self.url, headers=headers, stream=True)
        except requests.RequestException as fault:
            raise explain_no_answer(fault, self.url) from cause_of(fault)
        if response.status_code in (200, 206) and response.headers.get("Content-Encoding"):
            response.close()
            raise FetchError(
                f"{urlsplit(self.url).hostname} sends {file_label(self.url)} compressed, though asked not to",
                "A proxy on the way changes files: use another source.",
            )
        page = response.headers.get("Content-Type", "").lower().startswith("text/html")
        meant = urlsplit(self.url).path.lower().endswith((".html", ".htm"))
        known = self.expected is not None or self.version
        if response.status_code in (200, 206) and page and not (meant or known):
            response.close()
            raise FetchError(
                f"{urlsplit(self.url).hostname} answers with a web page in place of a file: {file_label(self.url)}",
                "Name a repository as ORG/REPO or dataset:ORG/REPO, or write the address of the file itself.",
            )
        return response


def _write(descriptor: int, data: bytes, offset: int) -> None:
    view = memoryview(data)
    while view:
        count = os.pwrite(descriptor, view, offset)
        view, offset = view[count:], offset + count


def _validator(response: requests.Response) -> str:
    """What names this version of the file: a strong ETag, or else the date of its last change."""
    etag = response.headers.get("ETag", "")
    return etag if etag and not etag.startswith("W/") else response.headers.get("Last-Modified", "")
