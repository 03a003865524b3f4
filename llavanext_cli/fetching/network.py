"""HTTP for plain addresses and ModelScope: one session, the servers that are asked, and errors in plain words.

Secrets stay out of every message: a token travels in a header or cookie for one host, `redact` removes passwords and
queries (which hold signatures) from addresses, and what a library raised is kept as a redacted `Cause` for `-v`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from urllib.parse import unquote, urljoin, urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.exceptions import InvalidHeader
from urllib3.response import BaseHTTPResponse
from urllib3.util.retry import Retry

from llavanext_cli.errors import ConfigError, FetchError
from llavanext_cli.fetching.registry import HUB, MODELSCOPE

BUSY = (429, 500, 502, 503, 504)
"""Answers after which the same request is sent again."""
LONGEST_WAIT = 60.0
"""Seconds. A server that asks for a longer wait gets an error in its place."""
DEFAULT_ENDPOINTS = {HUB: "https://huggingface.co", MODELSCOPE: "https://www.modelscope.cn"}
VARIABLES = {HUB: "HF_ENDPOINT", MODELSCOPE: "MODELSCOPE_DOMAIN"}
ELSEWHERE = "check the address and the network, or use a mirror (HF_ENDPOINT, --endpoint) or --source modelscope"
RESUME = "run the same command again: it resumes"


class UnreachableError(FetchError):
    """No answer at all: the network, the name service or a proxy is to blame, not what was asked for."""


# -------------------------------------------------------------------------------------------------------------- servers


def choose_endpoint(source: str, endpoint: str | None = None) -> str:
    """The server of a source: `endpoint`, or else the environment's, or else the usual one.

    Raises:
        ConfigError: it is not an http(s) address, or contains a password.
    """
    chosen = (endpoint or os.environ.get(VARIABLES[source], "")).strip() or DEFAULT_ENDPOINTS[source]
    if not endpoint and source == MODELSCOPE and "://" not in chosen:
        chosen = f"https://{chosen}"  # MODELSCOPE_DOMAIN holds a host name
    parts = urlsplit(chosen)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or "@" in parts.netloc:
        name = "--endpoint" if endpoint else VARIABLES[source]
        raise ConfigError(
            f"{name}: {redact(chosen)!r} is not an address such as https://host",
            "write a scheme and a host; a token belongs in HF_TOKEN or MODELSCOPE_API_TOKEN",
        )
    return chosen.rstrip("/")


def check_token(token: str, variable: str) -> str:
    """Raises `ConfigError` for a token that cannot be sent in a header."""
    if not (token.isascii() and token.isprintable()) or set(token) & set(' ;,"\\'):
        raise ConfigError(f"{variable}: the token has characters that a token cannot have", "copy the token again")
    return token


class _Session(requests.Session):
    def get_redirect_target(self, response: requests.Response) -> str | None:
        target = super().get_redirect_target(response)
        if target is not None:
            check_redirect(response.url, urljoin(response.url, target))
        return target


def check_redirect(source: str, target: str) -> None:
    """Raises `FetchError` for a redirect from https to http, or to neither."""
    allowed = ("https",) if source.startswith("https:") else ("http", "https")
    scheme = urlsplit(target).scheme
    if scheme not in allowed:
        raise FetchError(
            f"{urlsplit(source).hostname} redirects from {urlsplit(source).scheme} to {scheme}, which is not safe",
            "use another address, --endpoint or --source",
        )


class _Retry(Retry):
    def get_retry_after(self, response: BaseHTTPResponse) -> float | None:
        try:
            seconds = super().get_retry_after(response)
        except InvalidHeader:
            return None
        return seconds if seconds is None or seconds <= LONGEST_WAIT else None


def open_session(retries: int = 5, connections: int = 10) -> requests.Session:
    """A session that repeats requests without an answer and those a busy server refused, and checks redirects."""
    retry = _Retry(
        total=retries,
        connect=min(2, retries),  # nobody listens, or there is no such host: that rarely changes
        status_forcelist=BUSY,
        backoff_factor=0.5,
        raise_on_status=False,
    )
    session = _Session()
    session.headers.update({"User-Agent": "llavanext", "Accept-Encoding": "identity"})
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(max_retries=retry, pool_maxsize=connections))
    return session


# --------------------------------------------------------------------------------------------------------------- errors


class Cause(Exception):
    """What another library raised, redacted."""


def redact(text: str) -> str:
    """The text without `user:password@` and queries in addresses."""
    text = re.sub(r"(?<=//)[^/\s@'\"]+@", "***@", text)
    return re.sub(r"(?<=[^\s'\"?])\?[^\s'\"<>)]+", "?…", text)


def cause_of(fault: BaseException) -> Cause:
    return Cause(redact(f"{type(fault).__name__}: {fault}"))


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Turn what requests raises for `url` into an error of ours."""
    try:
        yield
    except requests.RequestException as fault:
        raise explain_unreachable(fault, url) from cause_of(fault)
    except OSError as fault:  # requests raises one without a number for a missing file of certificates
        if fault.errno is not None or "certificate" not in str(fault):
            raise
        raise ConfigError(
            f"the file of certificates is missing: {fault}", "correct or unset REQUESTS_CA_BUNDLE and CURL_CA_BUNDLE"
        ) from cause_of(fault)


def explain_unreachable(fault: requests.RequestException, url: str) -> UnreachableError:
    """The error for a request that got no answer, or half of one."""
    parts = urlsplit(url)
    host, text = parts.hostname, str(fault)
    if isinstance(fault, requests.exceptions.InvalidProxyURL | requests.exceptions.ProxyError):
        return UnreachableError(
            f"the proxy between here and {host} does not work", "check HTTP_PROXY, HTTPS_PROXY and NO_PROXY"
        )
    if isinstance(fault, requests.exceptions.ChunkedEncodingError):
        return UnreachableError(
            f"the connection to {host} broke before the answer was complete", f"{RESUME}; or {ELSEWHERE}"
        )
    if isinstance(fault, requests.exceptions.SSLError):
        return UnreachableError(
            f"the certificate of {host} is not trusted",
            "behind a company proxy, point REQUESTS_CA_BUNDLE to its certificate file. Is the clock right?",
        )
    if isinstance(fault, requests.TooManyRedirects):
        return UnreachableError(f"{host} redirects in a circle", "use another --endpoint or --source")
    if "NameResolutionError" in text or "getaddrinfo" in text:
        return UnreachableError(f"the host {host} cannot be found (DNS)", ELSEWHERE)
    if isinstance(fault, requests.Timeout) or "timed out" in text:
        return UnreachableError(f"{host} does not answer", f"{ELSEWHERE}; a slow connection needs a larger --timeout")
    if "refused" in text:
        return UnreachableError(f"{parts.netloc.rpartition('@')[2]} refuses the connection", ELSEWHERE)
    return UnreachableError(f"{host} cannot be reached", ELSEWHERE)


def explain_status(status: int, what: str, host: str | None, retry_after: str = "") -> FetchError:
    """The error for an answer that is not the file `what`."""
    if status in (404, 410):
        return FetchError(f"{host} does not have {what} (HTTP {status})", "check the address, or the --revision")
    if status in (401, 403):
        return FetchError(
            f"{host} does not give out {what} (HTTP {status})",
            "it may want a login or a token: HF_TOKEN for the Hub, MODELSCOPE_API_TOKEN for ModelScope",
        )
    if status in BUSY:
        wait = f" and asks to wait {retry_after} s" if retry_after.isdecimal() else ""
        more = "; fewer --jobs or a token (HF_TOKEN) may help" if status == 429 else ""
        return FetchError(f"{host} is busy (HTTP {status}){wait}: {what}", f"try later: the command resumes{more}")
    return FetchError(f"{host} answers HTTP {status} for {what}", "try later, or use another --source or --endpoint")


def explain_stranger(host: str, source: str) -> FetchError:
    """The error for an answer that `source` would not give."""
    name = {HUB: "a Hub", MODELSCOPE: "ModelScope"}[source]
    return FetchError(
        f"{host} does not answer as {name} does",
        f"check --endpoint and {VARIABLES[source]}. A login page or a proxy may be answering in its place.",
    )


def label(url: str) -> str:
    """A name for an address in messages: the last part of its path."""
    return unquote(urlsplit(url).path.rpartition("/")[2])
