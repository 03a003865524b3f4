"""The one way of `fetch` to the network: a requests session that waits, retries, counts, guards and can be stopped.

huggingface_hub, the ModelScope listing and our own downloads all use it, so that a policy is written once:

    request ──▶ GuardedSession ── is this redirect allowed? ──▶ GuardedAdapter ── 429, 5xx, no answer: wait, again
                                                                     │
    chunks  ◀── whole? too slow? stopped? how many bytes? ◀──────────┘

requests and urllib3 come with huggingface-hub, and honour HTTP_PROXY, HTTPS_PROXY, NO_PROXY and REQUESTS_CA_BUNDLE.
"""

from __future__ import annotations

import email.utils
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from requests.utils import select_proxy

from llavanext_cli.errors import ConfigError, FetchError
from llavanext_cli.fetching import guard
from llavanext_cli.fetching.deadline import POOLS
from llavanext_cli.fetching.endpoint import check_proxy
from llavanext_cli.fetching.faults import explain_certificates, explain_no_answer, is_lasting
from llavanext_cli.fetching.redaction import cause_of

CHUNK = 1 << 19
"""Bytes asked of the socket at once."""
LARGEST_ANSWER = 256 << 20
"""Bytes of an answer that is no download: a listing, an error page, the body of a redirect."""
BUSY = (429, 500, 502, 503, 504)
LONGEST_PAUSE = 20.0
LONGEST_RETURN = 86400.0
"""Seconds of a Retry-After that are worth telling."""


@dataclass(frozen=True)
class Limits:
    """How patient the client is.

    Attributes:
        connect: seconds to wait for a connection.
        stall: seconds without a byte, or below `least_rate`, after which a connection counts as dead.
        least_rate: bytes a second.
        retries: further attempts after one that brought (almost) nothing; progress starts the count again.
        pause: seconds before the first retry; doubled for each further one.
        longest_wait: the most seconds of a Retry-After that are waited out.
    """

    connect: float = 10.0
    stall: float = 30.0
    least_rate: float = 1000.0
    retries: int = 5
    pause: float = 0.5
    longest_wait: float = 300.0

    def __post_init__(self) -> None:
        if not 0 < self.stall <= 86400:  # also false for nan
            raise ConfigError("--timeout is a number of seconds between 0.1 and 86400", "Example: --timeout 60")

    def is_progress(self, count: int, seconds: float) -> bool:
        """Whether an attempt that brought so many bytes in so many seconds is worth another one."""
        return count > 0 and count >= self.least_rate * seconds

    def pause_before(self, attempt: int) -> float:
        """Seconds to wait before attempt 0, 1, 2, … of those that brought nothing."""
        return min(LONGEST_PAUSE, self.pause * 2**attempt)


class TransferBrokenError(requests.RequestException):
    """A body ended too early, or came too slowly."""


class StoppedError(Exception):
    """Another thread asked for the end."""


@dataclass
class Net:
    """What the sessions of one run share.

    Attributes:
        token_hosts: `host:port` of the servers that an Authorization header may be sent to.
        cookies: `host:port` → the Cookie header that this server, and no other, is sent.
        note: is told in a line what is being waited for.
        stop: set by whoever wants every transfer to end.
        received: bytes of content that came over the network.
        entered: what was set up along the way, to be undone at the end of the run.
    """

    limits: Limits = field(default_factory=Limits)
    token_hosts: frozenset[str] = frozenset()
    cookies: Mapping[str, str] = field(default_factory=dict)
    note: Callable[[str], None] = lambda line: None
    stop: threading.Event = field(default_factory=threading.Event)
    received: int = 0
    entered: ExitStack = field(default_factory=ExitStack)
    _setups: set[Callable[..., Any]] = field(default_factory=set)
    _local: threading.local = field(default_factory=threading.local)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def session(self) -> requests.Session:
        """This thread's session: requests' sessions are not to be shared."""
        if not hasattr(self._local, "session"):
            self._local.session = GuardedSession(self)
        return self._local.session

    @contextmanager
    def watched(self, watch: Callable[[int], None]) -> Iterator[None]:
        """Within, `watch(position)` is told how far into its file this thread's download is."""
        self._local.watch = watch
        try:
            yield
        finally:
            self._local.watch = None

    def enter_once(self, setup: Callable[[Net], AbstractContextManager[None]]) -> None:
        """Enter `setup(self)` until the end of the run, unless that was done before. Others wait until it is done, and
        it must not count or enter anything itself."""
        with self._lock:
            if setup not in self._setups:
                self.entered.enter_context(setup(self))
                self._setups.add(setup)

    def report(self, position: int) -> None:
        watch = getattr(self._local, "watch", None)
        if watch is not None:
            watch(position)

    def count(self, amount: int) -> None:
        with self._lock:
            self.received += amount

    def wait(self, seconds: float) -> None:
        """Sleep, unless stopped.

        Raises:
            StoppedError: the run is ending.
        """
        if self.stop.wait(seconds):
            raise StoppedError


class GuardedSession(requests.Session):
    """A session whose redirects are checked and whose requests go through `GuardedAdapter`."""

    def __init__(self, net: Net):
        super().__init__()
        self.net = net
        self.max_redirects = 10
        self.mount("http://", GuardedAdapter(net))
        self.mount("https://", GuardedAdapter(net))

    def get_redirect_target(self, resp: requests.Response) -> str | None:
        try:
            location = super().get_redirect_target(resp)
        except UnicodeError:
            location = "not-text:"
        if location is not None:
            guard.check_redirect(resp.url, location, is_proxied=self._is_proxied)
        return location

    def _is_proxied(self, url: str) -> bool:
        return bool(self.proxies) or guard.is_proxied(url)


class GuardedAdapter(HTTPAdapter):
    """One exchange, with patience: it comes back with an answer that is not "busy", or raises a `FetchError`."""

    def __init__(self, net: Net):
        self.net = net
        super().__init__(max_retries=0)

    def init_poolmanager(self, *args: Any, **options: Any) -> None:
        super().init_poolmanager(*args, **options)
        self.poolmanager.pool_classes_by_scheme = POOLS

    def proxy_manager_for(self, proxy: str, **options: Any) -> Any:
        manager = super().proxy_manager_for(proxy, **options)
        if "socks" not in proxy.partition(":")[0].lower():  # which has pools of its own
            manager.pool_classes_by_scheme = POOLS
        return manager

    def send(self, request: requests.PreparedRequest, stream: bool = False, **options: Any) -> requests.Response:
        limits = self.net.limits
        options["timeout"] = (limits.connect, limits.stall)
        request.headers["Accept-Encoding"] = "identity"  # ranges and digests are of the bytes themselves
        if proxy := select_proxy(request.url, options.get("proxies")):
            check_proxy(proxy)
        server = urlsplit(request.url).netloc
        if server in self.net.cookies:
            request.headers["Cookie"] = self.net.cookies[server]
        secret = request.headers.get("authorization")
        if secret and not _is_basic(secret) and server not in self.net.token_hosts:
            # A listing's "next" link is followed with the same headers, wherever it points.
            del request.headers["authorization"]
        attempt = 0
        while True:
            if self.net.stop.is_set():
                raise StoppedError
            try:
                response = super().send(request, stream=stream, **options)
            except requests.RequestException as fault:
                if attempt >= (0 if is_lasting(fault) else min(2, limits.retries)):
                    raise explain_no_answer(fault, request.url) from cause_of(fault)
                pause = limits.pause_before(attempt)
            except OSError as fault:  # requests' word for a certificate file that is not there
                raise explain_certificates() from cause_of(fault)
            else:
                if response.status_code not in BUSY:
                    return self._guarded(response, stream)
                pause = self._busy_pause(response, request.url, attempt)
                response.close()
            attempt += 1
            self.net.wait(pause)

    def _busy_pause(self, response: requests.Response, url: str, attempt: int) -> float:
        """Seconds to wait after a 429 or 5xx; an error when that is too long or was tried often enough."""
        host, status = urlsplit(url).hostname, response.status_code
        asked = retry_after(response.headers.get("Retry-After", ""))
        what = f"{host} asks us to slow down (429)" if status == 429 else f"{host} is in trouble (HTTP {status})"
        if asked is not None and asked > self.net.limits.longest_wait:
            raise FetchError(
                f"{what}, and to come back in {_duration(asked)}",
                "Run the same command then: what has arrived is kept."
                if asked <= LONGEST_RETURN
                else "Do not wait: try another day, or use another source. What has arrived is kept.",
            )
        if attempt >= self.net.limits.retries:
            raise FetchError(
                f"{what}, {attempt + 1} times in a row",
                "Run the same command later: what has arrived is kept."
                + (" A token (HF_TOKEN) raises the limit; so does a smaller --jobs." if status == 429 else ""),
            )
        pause = self.net.limits.pause_before(attempt) if asked is None else max(asked, 0.05)
        if pause >= 2:
            self.net.note(f"{what}; waiting {_duration(pause)}")
        return pause

    def _guarded(self, response: requests.Response, stream: bool) -> requests.Response:
        if not (stream and response.status_code in (200, 206)):
            response.iter_content = lambda *args, **named: self._answer(response)
            return response

        def download() -> Iterator[bytes]:
            position = content_range(response)[0] or 0
            for chunk in self._chunks(response):
                self.net.report(position)
                position += len(chunk)
                self.net.count(len(chunk))
                yield chunk
            self.net.report(position)

        response.iter_content = lambda *args, **named: download()
        return response

    def _answer(self, response: requests.Response) -> Iterator[bytes]:
        """The body of an answer that is no download. Raises `FetchError` when it has no end."""
        total = 0
        try:
            for chunk in self._chunks(response):
                total += len(chunk)
                if total > LARGEST_ANSWER:
                    host = urlsplit(response.url).hostname
                    raise FetchError(f"{host} sends an endless answer", "Is the --endpoint right?")
                yield chunk
        except TransferBrokenError as fault:  # as requests says it, which it overlooks in the body of a redirect
            raise requests.exceptions.ChunkedEncodingError(str(fault)) from None

    def _chunks(self, response: requests.Response) -> Iterator[bytes]:
        """The body as it comes, at most `CHUNK` bytes at once, watched.

        Unlike requests' own, it hands out everything that arrived before a connection was cut.

        Raises:
            TransferBrokenError: the body is shorter than announced, or stalls.
        """
        limits, raw = self.net.limits, response.raw
        packed = bool(response.headers.get("Content-Encoding"))
        bodiless = response.request.method == "HEAD" or response.status_code in (204, 304)
        announced = None if packed or bodiless else content_length(response)
        read = getattr(raw, "read1", None) or (lambda amount, **named: raw.read(min(amount, 1 << 16), **named))
        received, window_start, window_bytes = 0, time.monotonic(), 0
        while announced is None or received < announced:
            if self.net.stop.is_set():
                response.close()
                raise StoppedError
            try:
                chunk = read(CHUNK, decode_content=packed)
            except Exception as fault:  # urllib3's and http.client's own families, ssl.SSLError, OSError
                response.close()
                raise TransferBrokenError(_what_broke(fault)) from None
            if not chunk:
                if announced is not None:
                    response.close()
                    raise TransferBrokenError(f"the connection ended {announced - received} bytes early")
                break
            received += len(chunk)
            window_bytes += len(chunk)
            yield chunk
            now = time.monotonic()
            if now - window_start >= limits.stall:
                if window_bytes < limits.least_rate * (now - window_start):
                    response.close()
                    raise TransferBrokenError(f"less than {limits.least_rate:.0f} bytes a second")
                window_start, window_bytes = now, 0
        if announced is not None:
            raw.read()  # nothing is left, and this says so to urllib3, which then keeps the connection for the next


def content_length(response: requests.Response) -> int | None:
    """Bytes that the Content-Length header announces; None when it says none, or not a number."""
    return _integer(response.headers.get("Content-Length"))


def content_range(response: requests.Response) -> tuple[int | None, int | None]:
    """(first byte, total size) of a Content-Range header; None for what is not said or not a number."""
    unit, _, rest = response.headers.get("Content-Range", "").partition(" ")
    span, _, total = rest.partition("/")
    if unit.lower() != "bytes":
        return None, None
    return _integer(span.partition("-")[0]), _integer(total)


def retry_after(value: str) -> float | None:
    """Seconds of a Retry-After header, which holds a number or a date; None when it holds neither."""
    seconds = _integer(value.strip())
    if seconds is not None:
        return float(seconds)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError, OverflowError):
        return None


def _what_broke(fault: Exception) -> str:
    if "Decode" in type(fault).__name__:
        return "it comes compressed, though asked not to, and cannot be unpacked"
    return "no byte came for too long" if "timed out" in str(fault).lower() else "the connection broke"


def _is_basic(header: str | bytes) -> bool:
    """A user and password written into the address by the user; requests drops them itself on another host."""
    text = header.decode("latin1") if isinstance(header, bytes) else header
    return text.lower().startswith("basic ")


def _integer(text: str | None) -> int | None:
    return int(text) if text and text.isascii() and text.isdigit() and len(text) < 19 else None


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds > LONGEST_RETURN:
        return "more than a day"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
